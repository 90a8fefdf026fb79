"""Who becomes a finalist: fronts by layers, and races whose truth is known."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from eas_search.racing import race, round_ends, select_finalists, shrink
from eas_search.search_space import SearchSpace
from eas_search.settings import SpaceSettings
from eas_search.skip_config import SkipConfig
from eas_search.tasks.splits import divided


def test_finalists_are_the_front_then_the_front_of_the_rest() -> None:
    accuracy = [0.9, 0.8, 0.7, 0.85, 0.5, float("nan")]
    latency = [1.0, 0.8, 0.6, 1.0, 0.9, 0.1]
    assert select_finalists(accuracy, latency, 3) == [0, 1, 2]
    # Of the rest, (0.85, 1.0) and (0.5, 0.9) do not dominate each other; what is not finite never takes a place.
    assert select_finalists(accuracy, latency, 9) == [0, 1, 2, 3, 4]


def area(accuracy: np.ndarray, cost: np.ndarray, rows: tuple[int, ...]) -> float:
    """Hypervolume of some points over (0, 1), as a sum of rectangles."""
    order = sorted(rows, key=lambda row: cost[row])
    rights = [*cost[order[1:]], 1.0]
    return sum(accuracy[row] * (right - cost[row]) for row, right in zip(order, rights, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_a_long_front_is_thinned_where_it_loses_least(seed: int) -> None:
    """As good as the best of all subsets with the same ends but for what greed costs; evenly spaced rows are not."""
    rng = np.random.default_rng(seed)
    accuracy = np.sort(1 - rng.random(10) ** 3)  # most of a front is flat, a few points fall off
    cost = np.sort(rng.random(10))
    kept = select_finalists(accuracy, cost, 5)
    assert len(kept) == 5
    assert {0, 9} <= set(kept)
    best = max(area(accuracy, cost, (0, *inner, 9)) for inner in combinations(range(1, 9), 3))
    assert area(accuracy, cost, tuple(kept)) >= 0.98 * best


def test_an_even_front_is_thinned_evenly() -> None:
    accuracy = [0.1 * i for i in range(10)]
    kept = select_finalists(accuracy, accuracy, 4)
    assert max(np.diff(kept)) <= 4
    (only,) = select_finalists(accuracy, accuracy, 1)
    assert 3 <= only <= 6  # one place: a compromise


def test_finalists_by_several_costs() -> None:
    accuracy, costs = [0.9, 0.9, 0.8], [[0.9, 64.0], [0.95, 32.0], [0.95, 64.0]]
    assert select_finalists(accuracy, costs, 2) == [0, 1]
    assert select_finalists(accuracy, costs, 3) == [0, 1, 2]


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
    return np.stack([np.array(latency)[:, None]] * 3)


def test_the_hopeless_drop_out_first_and_cost_least() -> None:
    track = Track([0.9, 0.88, 0.8, 0.5], 400)
    left = race(track, exact([0.7] * 4), 1, round_ends(400))
    assert list(left) == [0]
    assert left[0].tolist() == track.scores[0].tolist()[: len(left[0])]
    seen = {row: max(end for other, _, end in track.asked if other == row) for row in range(4)}
    assert seen[3] == 100
    assert seen[3] <= seen[2] <= seen[1] <= seen[0]
    # No sample is scored twice.
    assert sum(end - start for _, start, end in track.asked) == sum(seen.values())


def test_a_faster_candidate_stays_however_inaccurate() -> None:
    left = race(Track([0.9, 0.5, 0.4], 400), exact([0.9, 0.7, 0.8]), 1, round_ends(400))
    assert list(left) == [0, 1]


def test_the_race_ends_when_no_more_are_left_than_there_are_places() -> None:
    track = Track([0.9, 0.4, 0.89, 0.3], 800)
    left = race(track, exact([0.7] * 4), 2, round_ends(800))
    assert list(left) == [0, 2]
    assert all(len(scores) == 100 for scores in left.values())
    assert race(track, exact([0.7] * 4), 4, round_ends(800)).keys() == {0, 1, 2, 3}


@pytest.mark.parametrize("equal", [2, 6])
def test_one_that_is_as_good_as_all_others_is_rarely_lost(equal: int) -> None:
    """Independent answers, which is harder than answers that go together; with many rivals it is lost more often."""
    lost = 0
    for seed in range(200):
        scores = (np.random.default_rng(seed).random((equal, 400)) < 0.85).astype(float)
        latency = [0.7] * equal
        lost += 0 not in race(lambda row, start, end, s=scores: s[row, start:end], exact(latency), 1, round_ends(400))
    # Against each rival 2.5 % of the races, one-sided, shared out among the rounds.
    assert lost / 200 <= 0.025 * (equal - 1) + 0.03


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
