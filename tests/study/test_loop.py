"""The trial loop with made-up evaluations: budgets, resuming, duplicates, failures and interruptions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from eas_search.objective import TrialResult
from eas_search.samplers import FrontSampler, make_sampler
from eas_search.search_space import SearchSpace
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.study import pareto_front, trials_frame
from eas_search.study.loop import TooManyFailures, TrialLoop, run_here

Fake = Callable[..., TrialResult]


class Bench:
    """A loop around a fake evaluation, which counts what it is asked for."""

    def __init__(self, space: SearchSpace, evaluate: Fake, budget: int = 6, study: optuna.Study | None = None) -> None:
        self.study = study or optuna.create_study(directions=["maximize", "minimize"])
        self.sampler: Any = FrontSampler(space, range(len(space.sites)), seed=0)
        self.study.sampler = self.sampler
        self.told: list[int] = []
        self.evaluated: list[SkipConfig] = []
        self.evaluate = evaluate
        settings = SearchSettings(budget=budget)
        self.loop = TrialLoop(self.study, space, self.sampler, settings, lambda number, *_: self.told.append(number))

    def count(self, config: SkipConfig) -> TrialResult:
        self.evaluated.append(config)
        return self.evaluate(config)

    def run(self) -> Bench:
        self.loop.run(run_here(self.count), 1)
        return self

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study.trials]


def test_the_budget_is_a_total(small_space: SearchSpace, fake_result: Fake) -> None:
    first = Bench(small_space, fake_result, budget=4).run()
    assert first.states() == ["COMPLETE"] * 4
    assert first.told == [0, 1, 2, 3]
    assert Bench(small_space, fake_result, 4, first.study).run().evaluated == []
    assert Bench(small_space, fake_result, 3, first.study).run().evaluated == []
    more = Bench(small_space, fake_result, 7, first.study).run()
    assert len(more.evaluated) == 3
    assert len(more.study.trials) == 7


def test_stopping_and_resuming_gives_the_trials_of_one_run(small_space: SearchSpace, fake_result: Fake) -> None:
    straight = Bench(small_space, fake_result, budget=9).run()
    halves = Bench(small_space, fake_result, budget=4).run()
    halves = Bench(small_space, fake_result, 9, halves.study).run()
    assert [t.params for t in halves.study.trials] == [t.params for t in straight.study.trials]
    assert [t.values for t in halves.study.trials] == [t.values for t in straight.study.trials]


def test_a_configuration_proposed_again_is_told_without_evaluation(small_space: SearchSpace, fake_result: Fake) -> None:
    bench = Bench(small_space, fake_result, budget=3)
    for _ in range(3):
        bench.study.enqueue_trial(small_space.to_params(small_space.config([1, 4])))
    bench.run()
    assert len(bench.evaluated) == 1
    assert bench.states() == ["COMPLETE"] * 3
    assert len({tuple(trial.values) for trial in bench.study.trials}) == 1
    again = Bench(small_space, fake_result, 4, bench.study)
    again.study.enqueue_trial(small_space.to_params(small_space.config([1, 4])))
    assert again.run().evaluated == []  # known from the storage


def test_results_and_origins_are_recorded(small_space: SearchSpace, fake_result: Fake) -> None:
    bench = Bench(small_space, fake_result, budget=2)
    queued = small_space.config([7])
    bench.study.enqueue_trial(small_space.to_params(queued), user_attrs={"origin": "ranking prefix"})
    bench.run()
    trials = bench.study.trials
    assert TrialResult(**trials[0].user_attrs["result"]) == fake_result(queued)
    assert SkipConfig(**trials[0].user_attrs["config"]) == queued
    assert trials[0].values == [fake_result(queued).accuracy, fake_result(queued).latency]
    assert trials[0].user_attrs["origin"] == "ranking prefix"
    assert trials[1].user_attrs["origin"].removeprefix("front: ") in FrontSampler.moves
    frame = trials_frame(bench.study)
    assert frame["skip"].tolist()[0] == (7,)
    assert frame["accuracy"].tolist() == [trial.values[0] for trial in trials]
    assert pareto_front(bench.study)["latency"].is_monotonic_increasing


@pytest.mark.parametrize("name", ["eas", "tpe", "random"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["accuracy", "latency"])
def test_a_result_that_is_not_finite_fails_and_is_replaced(
    small_space: SearchSpace, fake_result: Fake, field: str, value: float, name: str
) -> None:
    odd: list[SkipConfig] = []

    def evaluate(config: SkipConfig) -> TrialResult:
        odd[:] = odd or [config]
        result = fake_result(config).to_dict()
        return TrialResult(**{**result, **({field: value} if config == odd[0] else {})})

    bench = Bench(small_space, evaluate, budget=4)
    bench.sampler = bench.loop.sampler = bench.study.sampler = make_sampler(name, small_space, range(6), 1, 0)
    bench.run()
    assert bench.states().count("COMPLETE") == 4
    assert bench.states()[0] == "FAIL"
    assert "not finite" in bench.study.trials[0].user_attrs["error"]
    assert 0 not in bench.told
    assert 0 not in pareto_front(bench.study)["number"].tolist()


def test_an_evaluation_that_raises_fails_and_is_replaced(small_space: SearchSpace, fake_result: Fake) -> None:
    calls: list[int] = []

    def evaluate(config: SkipConfig) -> TrialResult:
        calls.append(1)
        if len(calls) in (2, 3, 5, 6):
            raise RuntimeError("out of memory\nand a second line")
        return fake_result(config)

    bench = Bench(small_space, evaluate, budget=5).run()  # never three in a row
    assert bench.states().count("COMPLETE") == 5
    assert bench.study.trials[1].user_attrs["error"] == "RuntimeError: out of memory"


def test_three_failures_in_a_row_end_the_search_with_the_cause(small_space: SearchSpace, fake_result: Fake) -> None:
    calls: list[int] = []

    def evaluate(config: SkipConfig) -> TrialResult:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory\nTried to allocate 3 GiB")
        return fake_result(config)

    bench = Bench(small_space, evaluate)
    with pytest.raises(TooManyFailures, match="RuntimeError: out of memory") as error:
        bench.run()
    assert "\n" not in str(error.value)
    assert bench.states() == ["COMPLETE"] * 2 + ["FAIL"] * 3


@pytest.mark.parametrize("late", [0, 3])
def test_after_the_deadline_no_trial_starts(small_space: SearchSpace, fake_result: Fake, late: int) -> None:
    bench = Bench(small_space, fake_result, budget=50)

    def evaluate(config: SkipConfig) -> TrialResult:
        if len(bench.evaluated) == late:
            bench.loop.deadline = time.monotonic() - 1
        return fake_result(config)

    bench.evaluate = evaluate
    bench.loop.deadline = time.monotonic() + (1000 if late else -1)
    bench.run()
    assert bench.states() == ["COMPLETE"] * late


@pytest.mark.parametrize("slots", [2, 4])
def test_several_slots_keep_to_the_budget_and_tell_every_result(
    small_space: SearchSpace, fake_result: Fake, slots: int
) -> None:
    bench = Bench(small_space, fake_result, budget=11)
    with ThreadPoolExecutor(slots) as pool:

        def submit(config: SkipConfig) -> Future[TrialResult]:
            return pool.submit(lambda: time.sleep(0.002 * len(config.skip)) or bench.count(config))

        bench.loop.run(submit, slots)
    assert bench.states() == ["COMPLETE"] * 11
    assert sorted(bench.told) == list(range(11))
    assert len(set(bench.evaluated)) == 11


def test_ctrl_c_passes_through_and_leaves_its_trial_to_be_cleaned_up(
    small_space: SearchSpace, fake_result: Fake
) -> None:
    def evaluate(config: SkipConfig) -> TrialResult:
        if len(bench.evaluated) == 3:
            raise KeyboardInterrupt
        return fake_result(config)

    bench = Bench(small_space, evaluate)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert [trial.state for trial in bench.study.trials] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING]
