"""Which candidates promise most: against all subsets where accuracies are sure, against known means where not."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eas_search.expected_front import MARGIN, most_promising


def area(accuracy: np.ndarray, cost: np.ndarray, rows: tuple[int, ...]) -> float:
    """Hypervolume of some points, every objective scaled to its range, as a sum of rectangles."""
    height = (accuracy - accuracy.min()) / np.ptp(accuracy) + MARGIN
    place = (cost - cost.min()) / np.ptp(cost)
    order = sorted(rows, key=lambda row: place[row])
    best, total = 0.0, 0.0
    for position, row in enumerate(order):
        right = place[order[position + 1]] if position + 1 < len(order) else 1 + MARGIN
        best = max(best, height[row])
        total += best * (right - place[row])
    return total


@pytest.mark.parametrize("seed", range(8))
def test_sure_candidates_are_nearly_the_best_subset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    accuracy, cost = np.sort(1 - rng.random(10) ** 3), np.sort(rng.random(10))  # a front: flat, then falling off
    kept = most_promising(accuracy, np.zeros(10), cost, 5)
    assert len(kept) == 5
    best = max(area(accuracy, cost, rows) for rows in combinations(range(10), 5))
    assert area(accuracy, cost, tuple(kept)) >= 0.97 * best  # what greed costs; its bound is 0.63


def test_what_noise_may_have_put_behind_keeps_its_place() -> None:
    """A faster one dominates both others by the estimates, one of them by a tenth of the noise, one surely."""
    accuracy, latency = [0.8, 0.95, 0.949], [0.9, 0.6, 0.8]
    assert most_promising(accuracy, np.full(3, 0.01**2), latency, 2) == [1, 2]
    assert most_promising(accuracy, np.zeros(3), latency, 1) == [1]


def test_the_most_accurate_has_a_place() -> None:
    """Next to the slowest it adds next to nothing to the area; the five others are worth more to it."""
    latency = np.array([1.0, 0.98, 0.8, 0.7, 0.6, 0.5])
    accuracy = np.array([0.5, 0.951, 0.95, 0.93, 0.9, 0.8])
    for count in (1, 2, 4):
        assert 1 in most_promising(accuracy, np.zeros(6), latency, count)


def test_what_is_unsure_may_surprise() -> None:
    accuracy, variance, latency = [0.9, 0.88, 0.88], [0.0, 0.0, 0.05**2], [0.5, 0.5, 0.5]
    assert most_promising(accuracy, variance, latency, 2) == [0, 2]


def test_several_costs() -> None:
    accuracy, costs = [0.9, 0.9, 0.8], [[0.9, 64.0], [0.95, 32.0], [0.95, 64.0]]
    assert most_promising(accuracy, np.zeros(3), costs, 2) == [0, 1]
    rng = np.random.default_rng(0)
    accuracy, variance, cost = rng.random(8), rng.random(8) * 0.01, rng.random((8, 1))
    # A cost that all share changes nothing.
    both = np.column_stack([cost, np.full(8, 3.0)])
    assert most_promising(accuracy, variance, both, 4) == most_promising(accuracy, variance, cost, 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.2, 2)), max_size=12), st.integers(0, 14))
def test_places_are_filled_with_different_candidates(rows: list[tuple[float, float, float]], count: int) -> None:
    accuracy, variance, cost = np.array(rows).reshape(-1, 3).T
    chosen = most_promising(accuracy, variance, cost, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(rows))
    assert chosen == sorted(chosen)


def test_what_is_not_finite_takes_no_place() -> None:
    nan, inf = float("nan"), float("inf")
    assert most_promising([0.9, nan, 0.8, 0.7], [0, 0, 0, nan], [[0.5], [0.4], [inf], [0.3]], 4) == [0]
