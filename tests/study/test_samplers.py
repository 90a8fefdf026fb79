"""Proposals: what comes first, what follows from what, and what is never proposed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from eas_search.bandit import BanditConfig
from eas_search.exceptions import ConfigError
from eas_search.names import SAMPLERS
from eas_search.objective import TrialResult
from eas_search.samplers import LIBRARY, EasBanditSampler, FrontSampler, check_budget, make_sampler, ranking_prefixes
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
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


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_resumed_study_does_not_repeat_the_draws_of_the_first_run(
    small_space: SearchSpace, fake_result: Fake, name: str
) -> None:
    first = play(new_study(make_sampler(name, small_space, REDUNDANCY, 0, done=0)), small_space, fake_result, 5)
    resumed = play(new_study(make_sampler(name, small_space, REDUNDANCY, 0, done=5)), small_space, fake_result, 5)
    assert first != resumed


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_configuration_is_proposed_twice_until_none_is_left(
    small_space: SearchSpace, fake_result: Fake, name: str
) -> None:
    """Three sites, three ranks, two placements: (2³ − 1) · 6 = 42 configurations."""
    space = SearchSpace(small_space.sites[:3], small_space.choices, small_space.student)
    assert space.size == 42
    asked = play(new_study(make_sampler(name, space, [0.1, 0.2, 0.0], 0, 0)), space, fake_result, 42)
    assert len(set(asked)) == 42
    assert set(asked) == set(space.every())
    assert all(config.skip for config in asked)


@pytest.mark.parametrize(("dims", "count"), [((0,), 7), ((0, 8), 21)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_plain_deletion_is_tried_once_for_all_placements(
    small_space: SearchSpace, fake_result: Fake, name: str, dims: tuple[int, ...], count: int
) -> None:
    """2³ − 1 skip sets: with rank 0 in one form, with rank 8 in two."""
    choices = SpaceSettings(pia_dims=dims, placements=("parallel", "ffn"))
    space = replace(small_space, sites=small_space.sites[:3], choices=choices)
    asked = play(new_study(make_sampler(name, space, [0.1, 0.2, 0.0], 0, 0)), space, fake_result, count)
    assert len({(config.skip, config.pia_dim, config.pia_dim and config.placement) for config in asked}) == count


def test_a_deletion_stored_with_another_placement_is_known(small_space: SearchSpace) -> None:
    """Parameters that a person has queued need not be those that `to_params` gives."""
    choices = SpaceSettings(pia_dims=(0, 8), placements=("parallel", "ffn"))
    space = replace(small_space, sites=small_space.sites[:1], choices=choices)
    stored = create_trial(
        params={"skip_00": 1, "pia_dim_choice": 0, "placement_choice": 1},
        distributions=space.distributions(),
        values=[0.5, 1.0],
    )
    study = new_study(make_sampler("brute", space, [0.0], 0, 1))
    study.add_trial(stored)
    asked = [space_config(space, study.ask(space.distributions())) for _ in range(2)]
    assert [(config.pia_dim, config.placement) for config in asked] == [(8, "parallel"), (8, "ffn")]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_fixed_number_of_sites_is_kept(small_space: SearchSpace, fake_result: Fake, name: str) -> None:
    space = replace(small_space, fixed_k=4)
    asked = play(new_study(make_sampler(name, space, REDUNDANCY, 0, 0)), space, fake_result, 25)
    assert {len(config.skip) for config in asked} == {4}
    assert len(set(asked)) == 25


def test_a_fixed_number_of_sites_leaves_one_prefix_and_fewer_configurations(small_space: SearchSpace) -> None:
    space = replace(small_space, fixed_k=2)
    assert [config.skip for config in ranking_prefixes(space, REDUNDANCY, 9)] == [(2, 4)]
    assert space.size == math.comb(6, 2) * 6 == len(list(space.every()))
    assert {config.skip for config in space.every()} == set(combinations((0, 1, 2, 3, 4, 7), 2))


def test_more_sites_than_there_are_cannot_be_skipped(small_space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match=r"fixed_k is 7; expected at most 6.*\Z"):
        replace(small_space, fixed_k=7)


def test_an_exhaustive_search_needs_the_budget_for_it(small_space: SearchSpace) -> None:
    with pytest.raises(ConfigError, match="all 378 configurations of 6 sites, but the budget is 377") as error:
        check_budget("brute", small_space, 377)
    assert "\n" not in str(error.value)
    check_budget("brute", small_space, 378)
    check_budget("eas", small_space, 1)


def test_the_bandits_scores_follow_from_the_completed_trials(small_space: SearchSpace) -> None:
    """Written out for METER's rule: r_i += η (R_j − R̄) p_i (1 − p_i); only two full groups of one size count."""
    rule = BanditConfig(policy="sigmoid", candidates=2, learning_rate=3.0)
    sampler = EasBanditSampler(small_space, 0, rule)
    trials = [
        known(small_space, small_space.config([0, 7]), 0.9),
        known(small_space, small_space.config([4]), 0.1),  # alone of its size
        known(small_space, small_space.config([1, 2]), 0.5, TrialState.RUNNING),
        known(small_space, small_space.config([2, 7]), 0.7),
        known(small_space, small_space.config([0, 1]), 0.4),
        known(small_space, small_space.config([0, 2]), 0.8),
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    first = 3.0 * 0.1 * 0.25  # p = ½ at r = 0
    r0, r2 = first, -first
    slopes = {site: (p := 1 / (1 + math.exp(-r))) * (1 - p) for site, r in ((0, r0), (1, 0.0), (2, r2))}
    expected = [
        r0 + 3.0 * (-0.2 + 0.2) * slopes[0],
        3.0 * -0.2 * slopes[1],
        r2 + 3.0 * 0.2 * slopes[2],
        0.0,
        0.0,
        0.0,  # site 7 was in both sets of the first group
    ]
    assert sampler.bandit(trials).scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert sampler.bandit(trials[::-1]).scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_resumed_bandit_goes_on_where_it_was(small_space: SearchSpace, fake_result: Fake) -> None:
    straight = play(new_study(make_sampler("bandit", small_space, REDUNDANCY, 0, 0)), small_space, fake_result, 24)
    study = new_study(make_sampler("bandit", small_space, REDUNDANCY, 0, 0))
    first = play(study, small_space, fake_result, 11)
    study.sampler = make_sampler("bandit", small_space, REDUNDANCY, 0, 11)
    assert first + play(study, small_space, fake_result, 13) == straight


def test_a_round_of_the_bandit_ends_with_the_top_k(small_space: SearchSpace, fake_result: Fake) -> None:
    """Skipping deep sites costs nothing in the made-up evaluation, so that they end up on top."""
    space = replace(small_space, fixed_k=2)
    rule = BanditConfig(policy="sigmoid", candidates=3, learning_rate=20.0)
    sampler = EasBanditSampler(space, 0, rule)
    study = new_study(sampler)
    asked = play(study, space, fake_result, 40)
    tops = [config for number, config in enumerate(asked) if sampler.origins[number] == "bandit: top k"]
    assert all(number % 4 == 3 for number, origin in sampler.origins.items() if origin == "bandit: top k")
    assert tops
    assert sampler.bandit(study.trials).top(2) == (4, 5)  # the sites with the indexes 4 and 7
