"""Trials that are stopped early: what is spared, and that they count but never win."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from eas_search import objective
from eas_search.objective import TrialResult, evaluate
from eas_search.rungs import Rival, pack, unpack
from eas_search.samplers import make_sampler
from eas_search.search_space import SearchSpace
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stages import empty_supernet
from eas_search.study import pareto_front, trials_frame
from eas_search.study.loop import TrialLoop, run_here
from eas_search.study.storage import load_or_create, open_storage
from eas_search.study.trials import Trials
from eas_search.workbench import Workbench

SAMPLES = 120  # a rung at a half of them; a quarter would be too few


@pytest.fixture(scope="module")
def bench(make_settings: Callable[..., SearchSettings], tiny_values: dict[str, Any]) -> Workbench:
    """The tiny model with enough validation samples for a rung, every trial timed."""
    samples = {**tiny_values["samples"], "validation": SAMPLES, "selection": 8}
    return Workbench.open(make_settings(samples=samples, latency="measured", trial={"steps": 0}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """How many samples are scored and how many models are timed."""
    found = SimpleNamespace(samples=0, timed=0)
    score, measure = objective.sample_scores, objective.measure_latency

    def scoring(model: Any, split: Any, **others: Any) -> Any:
        found.samples += len(split)
        return score(model, split, **others)

    def measuring(*arguments: Any, **others: Any) -> Any:
        found.timed += 1
        return measure(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "sample_scores", scoring)
        patch.setattr(objective, "measure_latency", measuring)
        yield found


def test_a_lost_trial_is_neither_scored_to_the_end_nor_timed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, config = empty_supernet(bench), bench.space.config([site.index for site in bench.sites[:2]])
    scores = [0.0] * len(bench.sites)
    with counted(monkeypatch) as whole:
        free = evaluate(bench, supernet, scores, config)
    assert (whole.samples, whole.timed) == (SAMPLES, 1)
    answers = unpack(free.scores)
    assert answers.mean() == free.accuracy < 0.8  # so that a rival without a mistake is surely better
    with counted(monkeypatch) as part:
        stopped = evaluate(bench, supernet, scores, config, Rival(1.0, pack(np.ones(SAMPLES)), 0.625))
    assert (part.samples, part.timed) == (SAMPLES // 2, 0)
    assert stopped.stopped_at == SAMPLES // 2
    assert stopped.accuracy == pytest.approx(answers[: SAMPLES // 2].mean())
    assert stopped.latency == 0.625
    assert math.isnan(stopped.latency_low)
    assert (stopped.kv_bytes, stopped.parameters) == (free.kv_bytes, free.parameters)
    with counted(monkeypatch) as equal:
        unhurt = evaluate(bench, supernet, scores, config, Rival(free.accuracy, free.scores, 0.625))
    assert (equal.samples, equal.timed) == (SAMPLES, 1)
    assert (unhurt.accuracy, unhurt.scores, unhurt.stopped_at) == (free.accuracy, free.scores, None)


def test_who_asks_for_rungs_gets_rivals_and_a_cost_that_is_not_foretold_stops_nothing(bench: Workbench) -> None:
    one, other = bench.space.config([bench.sites[0].index]), bench.space.config([bench.sites[1].index])
    known = {one: TrialResult(0.5, 0.9, 0.9, 0.9, 0.0, 0, 0, 0, 0.0, "cpu", pack(np.eye(2)[0]))}

    def rival(**changes: Any) -> Rival | None:
        altered = replace(bench, settings=bench.settings.model_copy(update=changes))
        trials = Trials(None, altered, None, [], Path(), None)  # type: ignore[arg-type]
        return trials._rivals(SimpleNamespace(known=known))(other)  # type: ignore[arg-type]

    assert rival() == Rival(0.5, pack([1, 0]), 0.9)
    assert rival(objectives=("accuracy", "latency", "kv_bytes")) is not None
    assert rival(objectives=("accuracy", "latency", "parameters")) is None
    assert rival(rungs=()) is None


def test_stopped_trials_count_to_the_budget_and_are_on_no_front(
    small_space: SearchSpace, fake_result: Callable[..., TrialResult], tmp_path: Path
) -> None:
    evaluated: list[SkipConfig] = []

    def every_other(config: SkipConfig) -> TrialResult:
        """Those that are stopped would win if their estimates were believed."""
        evaluated.append(config)
        result = replace(fake_result(config), scores="bits:0:")
        return replace(result, accuracy=0.99, latency=0.1, scores="", stopped_at=100) if len(evaluated) % 2 else result

    def loop(budget: int) -> optuna.Study:
        settings = SearchSettings(budget=budget)
        study = load_or_create(open_storage(None, tmp_path), "s", settings)
        sampler = make_sampler("random", small_space, range(6), 0, len(study.trials))
        study.sampler = sampler
        TrialLoop(study, small_space, sampler, settings, lambda *_: None).run(run_here(every_other), 1)
        return study

    loop(5)
    study = loop(8)
    assert len(evaluated) == 8
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8
    frame = trials_frame(study)
    assert frame["state"].tolist() == ["STOPPED", "COMPLETE"] * 4
    assert frame["stopped_at"].dropna().tolist() == [100] * 4
    assert set(pareto_front(study)["number"]) <= {1, 3, 5, 7}
    study.enqueue_trial(small_space.to_params(evaluated[0]))  # a stopped configuration proposed again
    assert loop(9).trials[-1].values == [0.99, 0.1]
    assert len(evaluated) == 8
