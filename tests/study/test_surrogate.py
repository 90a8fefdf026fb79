"""The surrogate: its posterior against textbook formulas, what it learns, and what the sampler makes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from eas_search.report.front import hypervolume
from eas_search.samplers import FrontSampler, ranking_prefixes
from eas_search.samplers.front import MOST_TRIALS
from eas_search.samplers.improvement import Front
from eas_search.samplers.surrogate import GRID, Encoder, Surrogate, Variances, likeliest, logit, sigmoid
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.skip_config import SkipConfig

PRIOR = Variances(sites=1.0, pairs=0.1, rest=0.3, noise=1 / 400)
RANKINGS = [[0.3, -0.2, 0.9, 0.0, 0.5, 0.1], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]


def space_of(sites: int, towers: tuple[str, ...] = ("text",), **choices: Any) -> SearchSpace:
    """Sites of the towers in turn, with one rank and one placement unless told otherwise."""
    places: Any = tuple(
        SimpleNamespace(index=i, name=f"layers.{i}", tower=towers[i % len(towers)]) for i in range(sites)
    )
    return SearchSpace(
        places, SpaceSettings(**{"pia_dims": (8,), "placements": ("parallel",), **choices}), SkipConfig()
    )


def damage(space: SearchSpace, config: SkipConfig) -> float:
    """A made-up truth: early sites matter, and two of them even more together."""
    skip = {int(index) for index in config.skip}
    logits = 3.0 - sum(2.0 / (1 + index) for index in skip) - (1.5 if {2, 3} <= skip else 0.0)
    return float(sigmoid(np.array(logits)))


def some(space: SearchSpace, count: int, seed: int = 0) -> list[SkipConfig]:
    rng, every = np.random.default_rng(seed), list(space.every())
    return [every[i] for i in rng.choice(len(every), size=count, replace=False)]


def trial_of(space: SearchSpace, config: SkipConfig, accuracy: float | None, number: int) -> FrozenTrial:
    state = TrialState.RUNNING if accuracy is None else TrialState.COMPLETE
    values = None if accuracy is None else [accuracy, 1.0]
    trial = create_trial(
        state=state, params=space.to_params(config), distributions=space.distributions(), values=values
    )
    trial.number = number
    return trial


def test_the_posterior_is_that_of_the_joint_normal_distribution(small_space: SearchSpace) -> None:
    """Against the conditional of the joint normal distribution, by plain inversion."""
    encoder = Encoder(small_space, RANKINGS)
    tried, new = some(small_space, 12), some(small_space, 5, seed=1)
    accuracies = np.random.default_rng(0).uniform(0.2, 0.9, 12)
    mean, deviation = Surrogate(encoder, tried, accuracies.tolist(), PRIOR).predict(new)
    joint = encoder([*tried, *new]).covariance(encoder([*tried, *new]), PRIOR)
    y = np.log(accuracies / (1 - accuracies))
    inverse = np.linalg.inv(joint[:12, :12] + np.diag(1 / 400 / (accuracies * (1 - accuracies))))
    assert mean == pytest.approx(joint[12:, :12] @ inverse @ y, abs=1e-6)
    left = joint[12:, 12:] - joint[12:, :12] @ inverse @ joint[:12, 12:]
    assert deviation**2 == pytest.approx(left.diagonal(), abs=1e-6)


def test_a_covariance_is_one(small_space: SearchSpace) -> None:
    features = Encoder(small_space, RANKINGS)(list(small_space.every()))
    for variances in GRID:
        matrix = features.covariance(features, variances)
        assert features.variance(variances) == pytest.approx(matrix.diagonal())
        assert matrix == pytest.approx(matrix.T)
        assert np.linalg.eigvalsh(matrix).min() > -1e-8


def test_it_foretells_sets_it_has_not_seen() -> None:
    """40 of 1,023 noisy sets; the order of all others is foretold far better than by their size alone."""
    space = space_of(10)
    tried, rng = some(space, 40), np.random.default_rng(0)
    noisy = [rng.binomial(400, damage(space, config)) / 400 for config in tried]
    others = [config for config in space.every() if config not in tried]
    truth = np.array([damage(space, config) for config in others])
    surrogate = Surrogate(Encoder(space, [list(range(10))]), tried, noisy)
    error = np.abs(surrogate.accuracy(others) - truth).mean()
    sizes = np.array([len(config.skip) for config in others])
    by_size = np.array([truth[sizes == size].mean() for size in range(11) if (sizes == size).any() or size])[sizes - 1]
    assert error < 0.3 * np.abs(by_size - truth).mean()
    mean, deviation = surrogate.predict(others)
    inside = np.abs(logit(truth) - mean) < 2 * deviation
    assert inside.mean() > 0.85


def test_lucky_trials_are_shrunk() -> None:
    """The best of many equally good sets was lucky; its posterior is nearer to the truth than its score."""
    space, rng = space_of(10), np.random.default_rng(3)
    tried = some(space, 80)
    scores = rng.binomial(100, 0.7, size=80) / 100
    shrunk = Surrogate(Encoder(space, [[0.0] * 10]), tried, scores.tolist()).accuracy(tried)
    assert abs(shrunk[scores.argmax()] - 0.7) < 0.75 * (scores.max() - 0.7)
    assert np.abs(shrunk - 0.7).mean() < 0.85 * np.abs(scores - 0.7).mean()


def test_variances_follow_the_data() -> None:
    """Drawn from the prior itself, the noise that the data have is found again."""
    space = space_of(10)
    features = Encoder(space, [[0.0] * 10])(some(space, 120))
    for noise in (1 / 1000, 1 / 60):
        truth, rng = Variances(1.0, 0.1, 0.1, noise), np.random.default_rng(1)
        draw = rng.multivariate_normal(np.zeros(120), features.covariance(features, truth) + 0.0 * np.eye(120))
        y = np.clip(draw - draw.mean(), -2, 2)
        p = sigmoid(y)
        assert likeliest(features, y + rng.normal(size=120) * np.sqrt(noise / (p * (1 - p)))).noise == noise


def test_extreme_scores_stay_finite(small_space: SearchSpace) -> None:
    tried = some(small_space, 6)
    surrogate = Surrogate(Encoder(small_space, [[0.0] * 6]), tried, [0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    assert np.isfinite(surrogate.predict(tried)).all()
    assert (surrogate.predict(tried)[1] > 0).all()


def test_ranks_and_placements_count() -> None:
    """The same skip sets with a larger rank are better by a fixed step in logits; the surrogate sees it elsewhere."""
    space = space_of(6, pia_dims=(4, 16), placements=("parallel", "ffn"))
    tried = [config for config in some(space, 90) if len(config.skip) > 2]

    def truth(config: SkipConfig) -> float:
        return 0.9 - 0.1 * len(config.skip) + 0.1 * (config.pia_dim == 16) - 0.15 * (config.placement == "ffn")

    surrogate = Surrogate(Encoder(space, [[0.0] * 6]), tried, [truth(config) for config in tried])
    low, high, ffn = surrogate.accuracy([space.config((0, 1, 2, 3), 0), space.config((0, 1, 2, 3), 1),
                                         space.config((0, 1, 2, 3), 1, 1)])  # fmt: skip
    assert high - low > 0.03
    assert high - ffn > 0.05


def test_an_expected_gain_is_a_mean_of_hypervolumes() -> None:
    """Against the report's hypervolume at latencies 1 - size/10 and a Monte-Carlo mean over the accuracy."""
    space, rng = space_of(10), np.random.default_rng(0)
    tried = [space.config(range(size)) for size in (2, 5, 8)]
    accuracies = np.array([0.8, 0.7, 0.3])
    front = Front(space, tried, accuracies)
    latency = 1 - np.array([2, 5, 8]) / 10
    for size, mean, deviation in ((6, 0.5, 0.7), (3, 1.2, 0.2), (9, -1.0, 1.0)):
        drawn = sigmoid(rng.normal(mean, deviation, size=4000))
        alone = hypervolume(accuracies, latency)
        gains = [hypervolume([*accuracies, one], [*latency, 1 - size / 10]) - alone for one in drawn]
        found = front.expected_gain([space.config(range(size))], np.array([mean]), np.array([deviation]))[0] / 10
        assert found == pytest.approx(np.mean(gains), rel=0.1, abs=2e-4)


def test_sites_of_two_towers_are_counted_apart() -> None:
    space = space_of(8, towers=("text", "vision"))  # even indexes are text
    text, vision, both = space.config((0, 2)), space.config((1, 3)), space.config((0, 1, 2, 3))
    front = Front(space, [text, vision], np.array([0.9, 0.5]))
    assert set(front.members) == {text, vision}  # neither takes the other's place
    assert front.levels[2, 0] == front.levels[1, 0] == 0.9
    assert front.levels[0, 2] == 0.5
    assert front.levels[1, 1] == 0.0
    assert Front(space, [text, vision, both], np.array([0.9, 0.5, 0.6])).members == [text, both]


def test_sites_with_no_attention_behind_them_count_twice() -> None:
    pooled = space_of(4)
    unpooled = replace(pooled, student=SkipConfig(pooling="none"), ends=((3, 2, 1, 0),))
    for space, rows in ((pooled, [1, 2, 2, 4]), (unpooled, [2, 4, 5, 8])):
        tried = [space.config(skip) for skip in ([0], [0, 3], [2, 3], [0, 1, 2, 3])]
        front = Front(space, tried, np.array([0.9, 0.8, 0.7, 0.1]))
        assert front.loads(tried)[:, 0].tolist() == rows
        # Of two sets of one size the later one is also on the front if it is less accurate.
        assert front.members == [tried[0], tried[1], *([tried[2]] if space is unpooled else []), tried[3]]


def test_the_sampler_does_better_than_chance_on_a_made_up_truth() -> None:
    """40 noisy trials: the skip sets found hold more hypervolume than those of random draws, on every seed."""
    space = space_of(10)

    def play(guided: bool, seed: int) -> float:
        sampler, rng = FrontSampler(space, [0.0] * 10, seed), np.random.default_rng(seed)
        trials: list[FrozenTrial] = []
        for number in range(40):
            config = sampler.propose(trials, rng)[0] if guided else sampler._draw(rng)
            trials.append(trial_of(space, config, rng.binomial(400, damage(space, config)) / 400, number))
        tried = [space.to_config(trial.params) for trial in trials]
        return hypervolume([damage(space, one) for one in tried], [1 - len(one.skip) / 20 for one in tried])

    for seed in range(3):
        assert play(True, seed) > 1.05 * play(False, seed)


def test_trials_under_way_are_not_asked_for_twice_over() -> None:
    """Eight workers at once: their proposals differ in more than one site somewhere."""
    space, rng = space_of(10), np.random.default_rng(0)
    trials = [trial_of(space, one, damage(space, one), i) for i, one in enumerate(some(space, 20))]
    sampler, found = FrontSampler(space, [0.0] * 10, 0), []
    for number in range(8):
        config, _ = sampler.propose(trials, rng)
        found.append(config)
        trials.append(trial_of(space, config, None, 20 + number))
    assert len(set(found)) == 8
    assert len({len(config.skip) for config in found}) > 1


def test_many_trials_do_not_make_the_fit_slow() -> None:
    """Only the trials nearest to the front of their size are fitted; the best of every size is among them."""
    space = space_of(12)
    trials = [trial_of(space, one, damage(space, one), i) for i, one in enumerate(some(space, 700))]
    kept = FrontSampler(space, [0.0] * 12, 0)._best(trials)
    assert len(kept) == MOST_TRIALS
    best: dict[int, float] = {}
    for trial in trials:
        size = len(space.to_config(trial.params).skip)
        best[size] = max(best.get(size, 0.0), trial.values[0])
    held = {(len(space.to_config(trial.params).skip), trial.values[0]) for trial in kept}
    assert set(best.items()) <= held


def test_prefixes_of_several_rankings_are_distinct(small_space: SearchSpace) -> None:
    rankings = {"first": RANKINGS[0], "second": RANKINGS[1], "same": RANKINGS[0]}
    found = ranking_prefixes(small_space, rankings, 50)
    assert found[:6] == ranking_prefixes(small_space, RANKINGS[0], 6)
    assert [config.skip for config in found[6:]] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)]
    assert ranking_prefixes(small_space, rankings, 8) == found[:8]
