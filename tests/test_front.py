"""Numbers on (accuracy, latency) points, against hand-computed values and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eas_search.exceptions import ConfigError
from eas_search.report.front import hypervolume, knee_point, non_dominated, prefer

# Few distinct values, so that ties and duplicates are common; some that no comparison may trust.
VALUE = st.one_of(st.integers(0, 6).map(lambda i: i / 4), st.sampled_from([math.nan, math.inf, -math.inf]))
POINTS = st.lists(st.tuples(VALUE, VALUE), max_size=12)


def columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in points], [t for _, t in points]


def on_front(points: list[tuple[float, float]], i: int) -> bool:
    """The definition, word by word."""
    accuracy, latency = points[i]
    if not (math.isfinite(accuracy) and math.isfinite(latency)):
        return False
    for j, (a, t) in enumerate(points):
        if not (math.isfinite(a) and math.isfinite(t)):
            continue
        better = a >= accuracy and t <= latency and (a > accuracy or t < latency)
        earlier_twin = j < i and (a, t) == (accuracy, latency)
        if better or earlier_twin:
            return False
    return True


@given(POINTS)
def test_front_is_what_the_definition_says(points: list[tuple[float, float]]) -> None:
    assert non_dominated(*columns(points)).tolist() == [on_front(points, i) for i in range(len(points))]


@given(POINTS)
def test_hypervolume_is_the_counted_area(points: list[tuple[float, float]]) -> None:
    step = 0.25  # every finite value lies on this grid, so counting dominated cells is exact
    finite = [(a, t) for a, t in points if math.isfinite(a) and math.isfinite(t)]
    cells = [
        (i, j) for i in range(6) for j in range(4) if any(a >= (i + 1) * step and t <= j * step for a, t in finite)
    ]
    assert hypervolume(*columns(points)) == pytest.approx(len(cells) * step * step)


@given(POINTS)
def test_knee_and_preferred_point_are_on_the_front(points: list[tuple[float, float]]) -> None:
    front = non_dominated(*columns(points))
    if not front.any():
        with pytest.raises(ConfigError, match="no knee point"):
            knee_point(*columns(points))
        return
    assert front[knee_point(*columns(points))]
    assert front[prefer(*columns(points), minimum_accuracy=-1.0)]


def test_literals() -> None:
    accuracy, latency = [0.9, 0.8, 0.8, 0.5, math.nan], [1.0, 0.75, 0.75, 0.5, 0.1]
    assert non_dominated(accuracy, latency).tolist() == [True, True, False, True, False]
    assert hypervolume(accuracy, latency) == pytest.approx(0.8 * 0.25 + 0.5 * 0.25)
    assert hypervolume(accuracy, latency, reference=(0.5, 2.0)) == pytest.approx(0.4 * 1.0 + 0.3 * 0.25)


def test_points_beyond_the_reference_contribute_nothing() -> None:
    assert hypervolume([], []) == 0.0
    assert hypervolume([0.9, -0.1], [1.2, 0.5]) == 0.0
    assert hypervolume([0.9, 0.5], [1.2, 0.5]) == pytest.approx(0.25)


def test_knee_is_furthest_from_the_chord() -> None:
    accuracy, latency = [0.80, 0.79, 0.75, 0.40], [1.0, 0.8, 0.7, 0.6]
    # scaled losses (0, 1), (.025, .5), (.125, .25), (1, 0): distances 0, .475, .625, 0
    assert knee_point(accuracy, latency) == 2
    assert knee_point(np.flip(accuracy), np.flip(latency)) == 1
    assert knee_point([0.1, *accuracy], [2.0, *latency]) == 3  # a dominated point does not move the chord


@pytest.mark.parametrize(
    ("accuracy", "latency", "expected"),
    [
        ([0.7], [0.9], 0),
        ([0.7, 0.8], [0.9, 1.0], 1),  # two points: the more accurate
        ([0.5, 0.8, 0.6], [0.5, 1.0, 0.9], 1),  # inner point on the wrong side of the chord
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], 2),  # straight line
    ],
)
def test_knee_of_small_fronts(accuracy: list[float], latency: list[float], expected: int) -> None:
    assert knee_point(accuracy, latency) == expected


def test_prefer_takes_the_fastest_that_is_accurate_enough() -> None:
    accuracy, latency = [0.80, 0.79, 0.78, 0.40], [1.0, 0.8, 0.8, 0.6]
    assert prefer(accuracy, latency, 0.78) == 1
    assert prefer(accuracy, latency, 0.80) == 0
    assert prefer(accuracy, latency, 0.0) == 3


def test_prefer_names_the_best_there_is() -> None:
    with pytest.raises(ConfigError, match=r"0\.9500: the best available is 0\.8000"):
        prefer([0.8, 0.7, math.nan], [1.0, 0.9, 0.1], 0.95)
    with pytest.raises(ConfigError, match="no point has a finite"):
        prefer([math.nan], [0.5], 0.1)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="size"):
        non_dominated([0.1, 0.2], [0.3])


def test_the_baseline_keeps_the_most_accurate_point_in_the_running() -> None:
    """Without the baseline an end of the front cannot win; here it is nearly as accurate as all others and fast."""
    accuracy, latency = [0.28, 0.41, 0.73, 0.9625], [0.653, 0.660, 0.689, 0.700]
    assert knee_point(accuracy, latency) == 1
    assert knee_point(accuracy, latency, baseline=(0.97, 1.0)) == 3
    assert knee_point([0.96], [0.7], baseline=(0.97, 1.0)) == 0
