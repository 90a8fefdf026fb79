"""How sure a comparison of points is: pure functions of arrays.

Scores are [points, samples], from 0 to 1, higher is better, and every point is scored on the same samples: what one
sample is harder than another cancels out of a difference. Costs (latency ratios and the like) are smaller when better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

FloatArray = NDArray[np.float64]
CONFIDENCE = 0.95


def paired_difference(
    scores: ArrayLike, others: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Difference of two mean scores on the same samples, and its interval.

    With d the N differences per sample, S = Σ d and Q = Σ d²,

        S / (N + 2)  ±  z · sqrt( Q + u² - S² / (N + 2) ) / (N + 2)

    which for right-or-wrong answers, u = 1, is the McNemar-type interval of two matched proportions after half an
    observation was added to each of their four cells (Agresti and Min, Simple improved confidence intervals for
    comparing matched proportions, Statistics in Medicine 24, 2005). Unlike Wald's it has a width when no sample tells
    the two apart, and keeps its confidence when few do. Of other scores u is the range: likelihoods of .03 differ by
    thousandths, and half an answer more or less would drown them. The difference returned is the plain S / N.

    Args:
        scores, others: [..., N]; leading dimensions are broadcast.
        confidence: of the two-sided interval.

    Returns:
        (difference, low, high), each of the leading dimensions; positive where `scores` are better.

    Raises:
        ValueError: the numbers of samples differ, or there is none.
    """
    difference, variance = mean_difference(scores, others)
    count = np.shape(scores)[-1]
    centre, half = difference * count / (count + 2), norm.ppf((1 + confidence) / 2) * np.sqrt(variance)
    return difference, centre - half, centre + half


def mean_difference(scores: ArrayLike, others: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Mean difference of scores [..., N] on the same samples, and its variance with the added observations.

    Both as in `paired_difference`, whose interval is ± z times the root of this variance.
    """
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    count = a.shape[-1]
    if count != b.shape[-1] or count == 0:
        raise ValueError(f"{count} and {b.shape[-1]} samples, expected equally many and at least one")
    differences, unit = a - b, 1.0
    if not all(((one == 0) | (one == 1)).all() for one in (a, b)):
        unit = np.maximum(a.max(axis=-1), b.max(axis=-1)) - np.minimum(a.min(axis=-1), b.min(axis=-1))
    total, squares = differences.sum(axis=-1), (differences**2).sum(axis=-1)
    return total / count, (squares + unit**2 - total**2 / (count + 2)) / (count + 2) ** 2


def lead_in_scores(scores: ArrayLike, confidence: float = CONFIDENCE) -> tuple[FloatArray, FloatArray]:
    """By how much point i leads point j in mean score, and the lower end of that lead's interval: [points, points]."""
    values = np.asarray(scores, dtype=np.float64)
    pairs = [paired_difference(values, one, confidence) for one in values]
    return np.stack([pair[0] for pair in pairs], axis=1), np.stack([pair[1] for pair in pairs], axis=1)


def dominance(
    scores: ArrayLike, costs: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Who dominates whom, by the estimates, and beyond the interval.

    i dominates j when it is at least as good in every objective and better in one; *beyond the interval* when moreover
    the whole interval of its lead in accuracy is above 0. To be surely cheaper is not enough: of two points that are as
    accurate as far as samples tell, the dearer one may be the more accurate, and then belongs to the front.

    Args:
        scores: [points, samples], on the same samples.
        costs: [points, costs], smaller is better.
        confidence: of the intervals of score differences.

    Returns:
        Two [points, points] arrays; entry (i, j) says that i dominates j. NaN dominates nothing.
    """
    lead, low = lead_in_scores(scores, confidence)
    values = np.asarray(costs, dtype=np.float64)
    saved = values[None, :, :] - values[:, None, :]
    as_good = (lead >= 0) & (saved >= 0).all(axis=-1)
    nominal = np.asarray(as_good & ((lead > 0) | (saved > 0).any(axis=-1)))
    return nominal, np.asarray(nominal & (low > 0))


def paired_bootstrap(scores: ArrayLike, resamples: int = 1000, seed: int = 0) -> FloatArray:
    """Mean scores on redrawn samples, the same draw for all points: [points, samples] to [resamples, points]."""
    values = np.asarray(scores, dtype=np.float64)
    count = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn @ values.T / count


def basic_interval(estimate: float, redrawn: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Basic bootstrap interval: 2·estimate minus the quantiles (Davison and Hinkley, Bootstrap Methods, 1997, eq. 5.6).

    For figures that pick the best of several, such as a hypervolume: redrawing moves these up once more, by about what
    the estimate itself is too high, so that quantiles as they are would miss the truth on the same side.
    """
    low, high = np.quantile(np.asarray(redrawn, float), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(2 * estimate - high), float(2 * estimate - low)


def mean_variance(mean: ArrayLike, count: ArrayLike) -> FloatArray:
    """Variance of a mean of `count` right-or-wrong scores, p (1 - p) / n with p = (n mean + 1) / (n + 2).

    It is an upper bound for scores between 0 and 1. The added observations (Agresti and Coull, The American
    Statistician 52, 1998) keep a mean of 0 or 1 from counting as certain.
    """
    n = np.asarray(count, dtype=np.float64)
    p = (n * np.asarray(mean, dtype=np.float64) + 1) / (n + 2)
    return p * (1 - p) / n


def collapsed(accuracy: ArrayLike, variance: ArrayLike) -> NDArray[np.bool_]:
    """Which accuracies lie so far from the bulk that nothing is to be learned from one for the other.

    Further from the median than 5 robust standard deviations (1.4826 × the median absolute deviation) and than 4 of
    their noise; `variance` is that of the noise. [n] each.
    """
    values = np.asarray(accuracy, dtype=np.float64)
    away = np.abs(values - np.median(values))
    limit = np.maximum(5 * 1.4826 * np.median(away), 4 * np.sqrt(np.asarray(variance, dtype=np.float64)))
    return np.asarray(away > limit)
