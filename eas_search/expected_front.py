"""Which few of many candidates to keep when their accuracies are not known for sure.

The non-dominated ones by the estimates are a poor choice: a candidate that noise puts a thousandth above its faster
neighbours "dominates" them all, and their places stay empty. Kept are those whose hypervolume is largest on average
over what the accuracies may be. The hypervolume is submodular, so that adding the best one time and again reaches at
least 1 - 1/e of the best choice (Nemhauser, Wolsey & Fisher, Mathematical Programming 14, 1978), and a candidate whose
gain was too small before need not be looked at again (Minoux, Accelerated greedy algorithms, 1978).
"""

from __future__ import annotations

import heapq

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

FloatArray = NDArray[np.float64]
DRAWS = 128
MARGIN = 0.1  # the reference point lies this share of an objective's range beyond its worst value


def most_promising(accuracy: ArrayLike, variance: ArrayLike, costs: ArrayLike, count: int) -> list[int]:
    """Positions of at most `count` candidates that together promise the largest hypervolume, in ascending order.

    The most accurate one by expectation has its place beforehand: it is what those who can afford no loss look for, and
    so near to the reference, where nothing is saved, its area is hardly anything.

    The accuracies are independent normal variables. Every objective is scaled to its range, so that no unit counts for
    more. The draws are the same at every call.

    Args:
        accuracy, variance: [n], expected accuracy, higher is better, and how unsure it is.
        costs: [n] or [n, m], lower is better.
        count: places; some stay empty only when there are fewer candidates with finite values.
    """
    mean, deviation = np.asarray(accuracy, dtype=float), np.sqrt(np.asarray(variance, dtype=float))
    cost = np.asarray(costs, dtype=float)
    cost = cost[:, None] if cost.ndim == 1 else cost
    finite = np.flatnonzero(np.isfinite(mean) & np.isfinite(deviation) & np.isfinite(cost).all(axis=1))
    losses = _losses(mean[finite], deviation[finite])
    cost = _scaled(cost[finite])
    if not count or not len(finite):
        return []
    chosen = [int(mean[finite].argmax())]
    reached = _expected_area(losses[:, chosen], cost[chosen])
    heap = [(-np.inf, row, -1) for row in range(len(finite)) if row != chosen[0]]
    while heap and len(chosen) < count:
        gain, row, known_at = heapq.heappop(heap)
        if known_at == len(chosen):
            chosen.append(row)
            reached -= gain
            continue
        together = [*chosen, row]
        heapq.heappush(heap, (reached - _expected_area(losses[:, together], cost[together]), row, len(chosen)))
    return sorted(finite[chosen].tolist())


def _losses(mean: FloatArray, deviation: FloatArray) -> FloatArray:
    """[draws, n]: what each accuracy falls short of the best expected one, in units of their range."""
    quantiles, rng = ndtri((np.arange(DRAWS) + 0.5) / DRAWS), np.random.default_rng(0)
    # Stratified: every candidate meets the same quantiles, in an order of its own.
    noise = np.stack([rng.permutation(quantiles) for _ in mean], axis=1) if len(mean) else np.empty((DRAWS, 0))
    best, span = mean.max(initial=0.0), float(np.ptp(mean)) if len(mean) else 0.0
    return np.asarray((best - mean - deviation * noise) / (span or deviation.max(initial=0.0) or 1.0))


def _scaled(costs: FloatArray) -> FloatArray:
    """Every cost from 0, the smallest, to 1."""
    if not len(costs):
        return costs
    span = np.ptp(costs, axis=0)
    return np.asarray((costs - costs.min(axis=0)) / np.where(span > 0, span, 1.0))


def _expected_area(losses: FloatArray, costs: FloatArray) -> float:
    """Mean over draws of the hypervolume of k points below the reference; losses [draws, k], costs [k, m]."""
    reference = 1 + MARGIN
    if costs.shape[1] > 1:
        volumes = [moocore.hypervolume(np.column_stack([one, costs]), ref=reference) for one in losses]
        return float(np.mean(volumes))
    order = np.argsort(costs[:, 0], kind="stable")
    heights = np.maximum.accumulate(np.maximum(reference - losses[:, order], 0.0), axis=1)
    widths = np.diff(costs[order, 0], append=reference)
    return float((heights @ widths).mean())
