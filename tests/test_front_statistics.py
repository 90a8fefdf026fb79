"""What comparisons of points are worth: literal numbers, other formulas, and simulations with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, sem
from scipy.stats import t as student_t

from eas_search.front_statistics import (
    basic_interval,
    collapsed,
    dominance,
    lead_in_scores,
    mean_variance,
    paired_bootstrap,
    paired_difference,
)
from eas_search.report.front import hypervolume, hypervolume_interval

Floats = NDArray[np.float64]


def answers(accuracy: Floats, samples: int, rng: np.random.Generator, shared: float = 0.7) -> Floats:
    """Right or wrong [points, samples], in which a hard sample is hard for all points."""
    hard = math.sqrt(shared) * rng.normal(size=samples)
    own = math.sqrt(1 - shared) * rng.normal(size=(len(accuracy), samples))
    return (hard + own < norm.ppf(accuracy)[:, None]).astype(float)


def test_paired_difference_is_agresti_and_mins_interval() -> None:
    """Their formula on the table of matched pairs with half an observation more in every cell."""
    a = np.array([1] * 40 + [1] * 9 + [0] * 3 + [0] * 8, dtype=float)
    b = np.array([1] * 40 + [0] * 9 + [1] * 3 + [0] * 8, dtype=float)
    n10, n01, n = 9.5, 3.5, 62.0
    centre, half = (n10 - n01) / n, 1.959964 * math.sqrt(n10 + n01 - (n10 - n01) ** 2 / n) / n
    estimate, low, high = paired_difference(a, b)
    assert estimate == pytest.approx(6 / 60)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-7)
    assert (low, high) == pytest.approx((-0.0142, 0.2077), abs=5e-4)


def test_answers_that_never_differ_are_not_surely_equal() -> None:
    estimate, low, high = paired_difference(np.ones(100), np.ones(100))
    assert estimate == 0
    assert low == -high
    assert high == pytest.approx(1.959964 / 102)
    with pytest.raises(ValueError, match="3 and 4 samples"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least one"):
        paired_difference(np.ones(0), np.ones(0))


@pytest.mark.parametrize(("samples", "gap"), [(100, 0.0), (400, 0.05), (1000, 0.02)])
def test_paired_interval_covers_the_true_difference_and_is_narrower_than_unpaired(samples: int, gap: float) -> None:
    rng, runs = np.random.default_rng(0), 1000
    accuracy = np.array([0.85, 0.85 - gap])
    scores = np.stack([answers(accuracy, samples, rng) for _ in range(runs)])
    _, low, high = paired_difference(scores[:, 0], scores[:, 1])
    assert 0.93 <= ((low <= gap) & (gap <= high)).mean() <= 0.99
    unpaired = 2 * 1.96 * np.sqrt((accuracy * (1 - accuracy)).sum() / samples)
    assert (high - low).mean() < 0.8 * unpaired


def test_a_lead_is_positive_for_the_better_point() -> None:
    scores = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=float)
    lead, low = lead_in_scores(scores)
    assert lead.tolist() == [[0, 0.5], [-0.5, 0]]
    assert low[0, 1] == pytest.approx(float(paired_difference(scores[0], scores[1])[1]))


def test_small_scores_are_told_apart_as_students_t_would() -> None:
    """Likelihoods of about .03, a few thousandths apart, and the same scores ten times as large."""
    rng = np.random.default_rng(0)
    one = 1 / (30 * np.exp(rng.normal(0, 0.25, 400)))
    other = one * np.exp(rng.normal(math.log(30 / 34), 0.05, 400))
    for scale in (1.0, 10.0):
        a, b = scale * other, scale * one
        difference, low, high = paired_difference(a, b)
        t = student_t.interval(0.95, 399, loc=(a - b).mean(), scale=sem(a - b))
        assert difference == pytest.approx((a - b).mean())
        # Half an observation more on either side, of at most the range, moves the ends by 1.96 ranges / 402 at most.
        slack = scale * 1.96 * np.ptp([one, other]) / 402
        assert (low, high) == pytest.approx(t, abs=slack)
        assert high < 0


def test_scores_in_steps_have_a_width_when_no_sample_tells_them_apart() -> None:
    scores = np.resize([0.0, 0.3, 0.6, 1.0], 100)  # as of the VQA accuracy
    assert paired_difference(scores, scores)[2] == pytest.approx(1.959964 / 102)


def test_dominance_beyond_the_interval_needs_a_sure_lead_in_accuracy() -> None:
    good, same = np.repeat([1.0, 0.0], [90, 10]), np.repeat([1.0, 0.0], [89, 11])
    bad = np.repeat([1.0, 0.0], [60, 40])
    scores = np.stack([good, same, bad, same])
    latency = np.array([0.70, 0.71, 0.72, 0.90])[:, None]
    nominal, beyond = dominance(scores, latency)
    assert nominal.tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, False],
        [False, False, False, False],
    ]
    # One answer of a hundred is not sure, however much time is saved; thirty are.
    assert beyond[0].tolist() == [False, False, True, False]
    assert not nominal[0, 0]
    assert not dominance(scores, np.full_like(latency, np.nan))[0].any()
    dear = np.concatenate([latency, latency[::-1]], axis=1)  # of two costs one favours each
    assert not dominance(scores, dear)[0][0].any()


@pytest.mark.parametrize("samples", [100, 400])
def test_a_slower_point_that_is_truly_more_accurate_is_rarely_ruled_out(samples: int) -> None:
    rng, lost, runs = np.random.default_rng(samples), 0, 1000
    for _ in range(runs):
        scores = answers(np.array([0.90, 0.91]), samples, rng)
        lost += int(dominance(scores, [[0.7], [0.8]])[1][0, 1])
    assert lost / runs <= 0.025


def test_paired_bootstrap_redraws_the_same_samples_for_all_points() -> None:
    rng = np.random.default_rng(1)
    one = answers(np.array([0.8]), 200, rng)[0]
    redrawn = paired_bootstrap([one, one, 1 - one], resamples=500, seed=3)
    assert redrawn.shape == (500, 3)
    assert redrawn[:, 0].tolist() == redrawn[:, 1].tolist()
    assert redrawn[:, 0] + redrawn[:, 2] == pytest.approx(np.ones(500))
    assert redrawn[:, 0].std() == pytest.approx(math.sqrt(one.mean() * (1 - one.mean()) / 200), rel=0.1)
    assert basic_interval(0.5, np.linspace(0.5, 0.7, 1001)) == pytest.approx((0.305, 0.495))


def test_hypervolume_interval_covers_that_of_the_true_accuracies() -> None:
    rng, runs, covered = np.random.default_rng(0), 60, 0
    for _ in range(runs):
        latency = np.sort(rng.uniform(0.6, 0.98, 8))
        accuracy = 0.9 - 0.35 * (1 - latency) + 0.02 * rng.normal(size=8)
        low, high = hypervolume_interval(answers(accuracy, 500, rng), latency)
        covered += low <= hypervolume(accuracy, latency) <= high
        assert high - low < 0.1
    assert covered >= 0.88 * runs


def test_hypervolume_of_three_objectives_is_the_counted_volume() -> None:
    accuracy, costs = [0.5, 0.75], [[0.25, 0.5], [0.5, 0.75]]
    # Boxes 0.5 × 0.75 × 0.5 and 0.75 × 0.5 × 0.25, of which 0.5 × 0.5 × 0.25 is common.
    assert hypervolume(accuracy, costs) == pytest.approx(0.1875 + 0.09375 - 0.0625)


def test_variance_of_a_mean_is_never_zero() -> None:
    assert mean_variance([0.5, 1.0], [100, 98]) == pytest.approx([0.0025, 0.99 * 0.01 / 98])


def test_collapsed_accuracies_are_those_far_from_all_others() -> None:
    bulk = np.array([0.93, 0.94, 0.92, 0.95, 0.935, 0.91])
    noise = mean_variance(np.append(bulk, 0.6), np.full(7, 400))
    assert collapsed(np.append(bulk, 0.6), noise).tolist() == [False] * 6 + [True]
    falling = np.linspace(0.9, 0.3, 7)
    assert not collapsed(falling, mean_variance(falling, np.full(7, 400))).any()
    assert not collapsed([0.93] * 5 + [0.9], np.full(6, 0.01**2)).any()  # explained by the noise
