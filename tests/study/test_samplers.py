"""Proposals: what comes first, what follows from what, and what is never proposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from eas_search.objective import TrialResult
from eas_search.samplers import FrontSampler, make_sampler, ranking_prefixes
from eas_search.search_space import SearchSpace
from eas_search.settings import SAMPLERS
from eas_search.skip_config import SkipConfig

REDUNDANCY = [0.3, -0.2, 0.9, 0.0, 0.5, 0.1]  # of the sites 0, 1, 2, 3, 4, 7
Fake = Callable[..., TrialResult]


def new_study(sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def play(study: optuna.Study, space: SearchSpace, result: Fake, rounds: int, noise: int = 0) -> list[SkipConfig]:
    """Ask and tell; latencies are random numbers from the seed `noise`."""
    rng, asked = np.random.default_rng(noise), []
    for _ in range(rounds):
        trial = study.ask(space.distributions())
        asked.append(space.to_config(trial.params))
        figures = result(asked[-1], factor=float(rng.uniform(0.5, 2)))
        study.tell(trial, [figures.accuracy, figures.latency])
    return asked


def known(space: SearchSpace, config: SkipConfig, accuracy: float, state: Any = TrialState.COMPLETE) -> FrozenTrial:
    values = [accuracy, 1.0] if state == TrialState.COMPLETE else None
    return create_trial(state=state, params=space.to_params(config), distributions=space.distributions(), values=values)


def test_ranking_prefixes_are_nested_and_start_with_the_most_redundant_sites(small_space: SearchSpace) -> None:
    prefixes = ranking_prefixes(small_space, REDUNDANCY, 6)
    assert [config.skip for config in prefixes] == [
        (2,), (2, 4), (0, 2, 4), (0, 2, 4, 7), (0, 2, 3, 4, 7), (0, 1, 2, 3, 4, 7)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 50])
def test_fewer_prefixes_spread_over_all_sizes(small_space: SearchSpace, count: int) -> None:
    sizes = [len(config.skip) for config in ranking_prefixes(small_space, REDUNDANCY, count)]
    assert len(sizes) == min(count, 6)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert count == 1 or sizes[-1] == 6


def test_equally_redundant_sites_are_ranked_in_their_order(small_space: SearchSpace) -> None:
    assert [config.skip for config in ranking_prefixes(small_space, [0.0] * 6, 2)] == [(0,), (0, 1, 2, 3, 4, 7)]


def test_same_seed_same_proposals_whatever_the_latencies(small_space: SearchSpace, fake_result: Fake) -> None:
    runs = [
        play(new_study(FrontSampler(small_space, REDUNDANCY, seed=3)), small_space, fake_result, 30, noise)
        for noise in (1, 2)
    ]
    other = play(new_study(FrontSampler(small_space, REDUNDANCY, seed=4)), small_space, fake_result, 30)
    assert runs[0] == runs[1] != other


def test_a_known_configuration_is_not_proposed_again(small_space: SearchSpace, fake_result: Fake) -> None:
    asked = play(new_study(FrontSampler(small_space, REDUNDANCY, 0)), small_space, fake_result, 80)
    assert len(set(asked)) == 80


def test_an_exhausted_space_still_gives_proposals(small_space: SearchSpace, fake_result: Fake) -> None:
    space = SearchSpace(small_space.sites[:1], small_space.choices, small_space.student)
    asked = play(new_study(FrontSampler(space, [0.0], 0)), space, fake_result, 10)
    assert len(set(asked)) == 6  # one site, three ranks, two placements


def test_pending_trials_are_not_proposed_again(small_space: SearchSpace) -> None:
    study = new_study(FrontSampler(small_space, REDUNDANCY, 0))
    asked = [space_config(small_space, study.ask(small_space.distributions())) for _ in range(40)]
    assert len(set(asked)) == 40


def space_config(space: SearchSpace, trial: optuna.Trial) -> SkipConfig:
    return space.to_config(trial.params)


def test_an_interruption_does_not_change_the_next_proposals(small_space: SearchSpace, fake_result: Fake) -> None:
    straight = play(new_study(FrontSampler(small_space, REDUNDANCY, 0)), small_space, fake_result, 12)
    study = new_study(FrontSampler(small_space, REDUNDANCY, 0))
    before = play(study, small_space, fake_result, 5)
    lost = study.ask(small_space.distributions())
    study.tell(lost, state=TrialState.FAIL)
    study.enqueue_trial(lost.params)
    study.sampler = FrontSampler(small_space, REDUNDANCY, 0)
    assert before + play(study, small_space, fake_result, 7) == straight


def test_a_configuration_that_failed_by_itself_is_not_proposed_again(
    small_space: SearchSpace, fake_result: Fake
) -> None:
    study = new_study(FrontSampler(small_space, REDUNDANCY, 0))
    play(study, small_space, fake_result, 5)
    failed = []
    for _ in range(10):
        trial = study.ask(small_space.distributions())
        trial.set_user_attr("error", "ValueError: not finite")
        study.tell(trial, state=TrialState.FAIL)
        failed.append(space_config(small_space, trial))
    assert len(set(failed)) == 10


@pytest.mark.parametrize("move", FrontSampler.moves)
def test_moves_do_what_their_names_say(small_space: SearchSpace, move: str) -> None:
    sampler, rng = FrontSampler(small_space, REDUNDANCY, 0), np.random.default_rng(0)
    parent = small_space.config([0, 3, 7], 1, 1)
    results = [sampler._apply(move, parent, rng) for _ in range(60)]
    assert all(config is not None for config in results)
    sizes = {len(config.skip) for config in results if config}
    shared = {len({0, 3, 7} & set(config.skip)) for config in results if config}
    dressed = {(config.pia_dim, config.placement) for config in results if config}
    if move == "draw":
        assert sizes == {1, 2, 3, 4, 5, 6}
        assert len(dressed) == 6
        return
    assert sizes == {{"swap": 3, "grow": 4, "shrink": 2, "dress": 3}[move]}
    assert shared <= {"swap": {2, 3}, "grow": {3}, "shrink": {2}, "dress": {3}}[move]
    assert len(dressed) == (6 if move == "dress" else 1)


@pytest.mark.parametrize(
    ("move", "skip"), [("grow", (0, 1, 2, 3, 4, 7)), ("shrink", (4,)), ("shrink", ()), ("dress", ())]
)
def test_a_move_that_is_impossible_gives_nothing(small_space: SearchSpace, move: str, skip: tuple[int, ...]) -> None:
    sampler = FrontSampler(small_space, REDUNDANCY, 0)
    assert sampler._apply(move, small_space.config(skip), np.random.default_rng(0)) is None


def test_redundant_sites_are_added_first_and_removed_last(small_space: SearchSpace) -> None:
    """Site 2 is the most and site 1 the least redundant; 300 moves each, far from any chance result."""
    sampler, rng = FrontSampler(small_space, REDUNDANCY, 0), np.random.default_rng(0)
    grown, shrunk, drawn = Counter[int](), Counter[int](), Counter[int]()
    whole = small_space.config([site.index for site in small_space.sites])
    for _ in range(300):
        grown.update(sampler._apply("grow", small_space.config(()), rng).skip)  # type: ignore[union-attr]
        shrunk.update(set(whole.skip) - set(sampler._apply("shrink", whole, rng).skip))  # type: ignore[union-attr]
        drawn.update(sampler._apply("draw", whole, rng).skip)  # type: ignore[union-attr]
    assert grown[2] > 2 * grown[1]
    assert shrunk[1] > 2 * shrunk[2]
    assert drawn[2] > 1.2 * drawn[1]
    assert min(*grown.values(), *shrunk.values()) > 5  # a prior, not a rule


def test_only_the_front_of_accuracy_and_size_has_children(small_space: SearchSpace) -> None:
    good, bad = small_space.config([2, 4]), small_space.config([1])
    trials = [
        known(small_space, good, 0.9),
        known(small_space, bad, 0.5),
        known(small_space, small_space.config([0, 3]), 0.6),
    ]
    sampler, rng = FrontSampler(small_space, REDUNDANCY, 0), np.random.default_rng(1)
    for _ in range(100):
        config, origin = sampler.propose(trials, rng)
        if origin in ("front: grow", "front: swap"):
            assert len({2, 4} & set(config.skip)) >= len(config.skip) - 1
        assert origin == "draw" or origin.removeprefix("front: ") in FrontSampler.moves


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes_configurations_of_the_space(
    small_space: SearchSpace, fake_result: Fake, name: str
) -> None:
    study = new_study(make_sampler(name, small_space, REDUNDANCY, seed=0, done=0))
    asked = play(study, small_space, fake_result, 13)
    again = play(new_study(make_sampler(name, small_space, REDUNDANCY, 0, 0)), small_space, fake_result, 13)
    assert asked == again
    assert len(set(asked)) > 6


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "eas"])
def test_a_resumed_study_does_not_repeat_the_draws_of_the_first_run(
    small_space: SearchSpace, fake_result: Fake, name: str
) -> None:
    first = play(new_study(make_sampler(name, small_space, REDUNDANCY, 0, done=0)), small_space, fake_result, 5)
    resumed = play(new_study(make_sampler(name, small_space, REDUNDANCY, 0, done=5)), small_space, fake_result, 5)
    assert first != resumed
