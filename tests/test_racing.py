"""Who becomes a finalist: races whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eas_search.racing import Candidates, furthest, race, round_ends, shrink, winners
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.skip_config import SkipConfig
from eas_search.tasks.splits import divided


def test_rounds_double_up_to_all_samples() -> None:
    assert round_ends(600) == [100, 200, 400, 600]
    assert round_ends(400) == [100, 200, 400]
    assert round_ends(30) == [30]


class Track:
    """Candidates with known accuracies, all scored on the same samples; counts what is asked for."""

    def __init__(self, accuracy: list[float], samples: int, seed: int = 0) -> None:
        draws = np.random.default_rng(seed).random(samples)
        self.scores = (draws < np.array(accuracy)[:, None]).astype(float)
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, row: int, start: int, end: int) -> np.ndarray:
        self.asked.append((row, start, end))
        return self.scores[row, start:end]


def exact(latency: list[float]) -> np.ndarray:
    return np.array(latency)[:, None]


def test_the_hopeless_drop_out_first_and_cost_least() -> None:
    track = Track([0.9, 0.88, 0.8, 0.5], 400)
    raced = race(track, exact([0.7] * 4), 1, round_ends(400))
    assert furthest(raced) == [0, 1]
    assert all(values.tolist() == track.scores[row].tolist()[: len(values)] for row, values in raced.items())
    seen = {row: max(end for other, _, end in track.asked if other == row) for row in range(4)}
    assert seen[3] == 100
    assert seen[3] <= seen[2] <= seen[1] <= seen[0]
    # No sample is scored twice.
    assert sum(end - start for _, start, end in track.asked) == sum(seen.values())


def test_a_faster_candidate_stays_however_inaccurate() -> None:
    raced = race(Track([0.9, 0.5, 0.4], 400), exact([0.9, 0.7, 0.8]), 1, round_ends(400))
    assert furthest(raced) == [0, 1]


def test_the_race_ends_when_no_more_are_left_than_there_are_places() -> None:
    track = Track([0.9, 0.4, 0.89, 0.3], 800)
    raced = race(track, exact([0.7] * 4), 2, round_ends(800))
    assert all(len(scores) == 100 for scores in raced.values())
    # Nothing is to be decided when there is a place for everyone.
    assert not any(map(len, race(track, exact([0.7] * 4), 4, round_ends(800)).values()))


def test_the_most_accurate_of_candidates_that_are_a_trade_off_is_rarely_lost() -> None:
    """Twelve, each a point more accurate and 4 % slower than the one before."""
    accuracy, latency, lost = np.linspace(0.80, 0.91, 12), np.linspace(0.6, 1.04, 12).tolist(), 0
    for seed in range(100):
        scores = (np.random.default_rng(seed).random((12, 400)) < accuracy[:, None]).astype(float)
        raced = race(lambda row, start, end, s=scores: s[row, start:end], exact(latency), 4, round_ends(400))
        lost += 11 not in furthest(raced)
    assert lost <= 10


@pytest.mark.parametrize("equal", [2, 6])
def test_one_that_is_as_good_as_all_others_is_rarely_lost(equal: int) -> None:
    """Independent answers, which is harder than answers that go together; with many rivals it is lost more often."""
    lost = 0
    for seed in range(200):
        scores = (np.random.default_rng(seed).random((equal, 400)) < 0.85).astype(float)
        latency = [0.7] * equal
        raced = race(lambda row, start, end, s=scores: s[row, start:end], exact(latency), 1, round_ends(400))
        lost += 0 not in furthest(raced)
    # Against each rival 2.5 % of the races, one-sided, shared out among the rounds.
    assert lost / 200 <= 0.025 * (equal - 1) + 0.03


def field(accuracy: list[float], deviation: float, latency: list[float]) -> Candidates:
    configs = [SkipConfig(skip=(row,), pia_dim=0) for row in range(len(accuracy))]
    return Candidates(configs, np.array(accuracy), np.full(len(accuracy), deviation**2), exact(latency))


def test_harder_samples_do_not_count_against_those_that_saw_more_of_them() -> None:
    """The second half of the samples is hopeless for everyone; row 1 dropped out before it."""
    raced = {0: np.r_[np.ones(190), np.zeros(210)], 1: np.r_[np.ones(80), np.zeros(20)]}
    raced[0][:5] = 0  # 95 % of the first 100, where row 1 has 80 %
    assert winners(field([0.9, 0.9], 0.05, [0.7, 0.7]), raced, 1) == [0]


def test_winners_weigh_what_the_search_and_the_race_saw() -> None:
    """Against Bayes' rule for normal variables, written out for two candidates of equal cost."""
    rng = np.random.default_rng(4)
    for prior in (0.9, 0.91, 0.93, 0.99):
        raced = {row: (rng.random(400) < share).astype(float) for row, share in enumerate((0.9, 0.85))}
        deviation = 0.02
        differences = raced[1] - raced[0]
        # Each differs from the mean of the two by half of that.
        noise = ((differences**2).sum() / 4 + 1 - (differences.sum() / 2) ** 2 / 402) / 402**2
        weight = deviation**2 / (deviation**2 + noise)
        lead = (1 - weight) * (prior - 0.9) / 2 + weight * differences.mean() / 2
        assert winners(field([0.9, prior], deviation, [0.7, 0.7]), raced, 1) == [int(lead > 0)]


def test_what_fine_tuning_may_still_change_keeps_a_second_one_of_a_poor_kind() -> None:
    """Two poor and fast ones differ little now; after more steps the other may be the better one by far."""
    accuracy, latency = [0.38, 0.37, 0.95, 0.945], [0.66, 0.66, 0.75, 0.755]
    for change, kept in ((0.0, [0, 2, 3]), (0.3, [0, 1, 2])):
        candidates = replace(field(accuracy, 0.004, latency), change=change)
        assert candidates.most_promising(candidates.accuracy, candidates.variance, 3) == kept


def searched(seed: int) -> tuple[SearchSpace, list[SkipConfig], np.ndarray, np.ndarray]:
    """(space, configurations, true accuracies, accuracies on 400 samples) of an invented search of 50 trials."""
    rng = np.random.default_rng(seed)
    sites = tuple(SimpleNamespace(index=i, name=f"layers.{i}", tower="text") for i in range(12))
    space = SearchSpace(sites, SpaceSettings(), SkipConfig(adapter_dim=2))  # type: ignore[arg-type]
    skips = {tuple(sorted(rng.choice(12, rng.integers(0, 12), replace=False).tolist())) for _ in range(50)}
    configs = [space.config(skip) for skip in sorted(skips)]
    loss = rng.gamma(1.0, 0.2, 12)
    logits = np.array([2.7 - sum(loss[i] for i in config.skip) + 0.05 * rng.normal() for config in configs])
    truth = 1 / (1 + np.exp(-logits))
    return space, configs, truth, rng.binomial(400, truth) / 400


def test_shrinking_reduces_the_error_and_the_winners_curse() -> None:
    plain, shrunken, cursed, cured = [], [], [], []
    for seed in range(20):
        space, configs, truth, seen = searched(seed)
        mean, variance = shrink(space, configs, seen, np.full(len(seen), 400.0))
        plain.append(((seen - truth) ** 2).mean())
        shrunken.append(((mean - truth) ** 2).mean())
        cursed.append(seen.max() - truth[seen.argmax()])
        cured.append(mean.max() - truth[mean.argmax()])
        assert (variance > 0).all()
    assert np.mean(shrunken) < 0.8 * np.mean(plain)
    assert abs(np.mean(cured)) < 0.5 * np.mean(cursed)


def test_few_samples_count_for_little() -> None:
    """Every second trial was stopped after 25 of 400 samples; against taking all of them for equally sure."""
    known, equal = [], []
    for seed in range(30):
        space, configs, truth, _ = searched(seed)
        seen = np.where(np.arange(len(configs)) % 2, 25, 400)
        accuracy = np.random.default_rng([seed, 1]).binomial(seen, truth) / seen
        whole = seen == 400
        for errors, counts in ((known, seen), (equal, np.full(len(seen), 400))):
            mean, _ = shrink(space, configs, accuracy, counts)
            errors.append(((mean - truth)[whole] ** 2).mean())
    assert np.mean(known) < 0.9 * np.mean(equal)


def test_what_has_collapsed_neither_moves_nor_moves_others() -> None:
    space, configs, _, seen = searched(0)
    good = seen > 0.8
    few, values = [config for config, keep in zip(configs, good, strict=True) if keep], seen[good]
    without, _ = shrink(space, few, values, np.full(len(few), 400.0))
    ruined = space.config(range(12))
    within, variance = shrink(space, [*few, ruined], np.append(values, 0.1), np.full(len(few) + 1, 400.0))
    assert within[:-1].tolist() == without.tolist()
    assert within[-1] == 0.1
    assert variance[-1] == pytest.approx(0.1 * 0.9 / 400, rel=0.05)


def test_search_and_selection_never_share_a_sample_if_there_are_two() -> None:
    assert divided(range(10), 4, 5) == ([0, 1, 2, 3], [4, 5, 6, 7, 8], None)
    search, selection, note = divided(range(10), 40, 60)
    assert (search, selection) == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])
    assert note == "the 10 validation examples are divided: 4 for the search, 6 for the selection"
    assert divided(range(9), None, None)[:2] == ([0, 1, 2, 3], [4, 5, 6, 7, 8])
    assert divided(range(2), 1000, 1)[:2] == ([0], [1])
    assert divided([7], 4, 4)[:2] == ([7], [7])
