"""Shared by the studies: how sure a mean or a median is."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def mean_interval(values: ArrayLike, rng: np.random.Generator, draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap interval of the mean of `values` [n]."""
    found = np.asarray(values, dtype=float)
    drawn = rng.choice(found, size=(draws, len(found))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(found.mean()), float(low), float(high)


def median_interval(values: ArrayLike, rng: np.random.Generator, draws: int = 10_000) -> tuple[float, float, float]:
    """(median, low, high): the same of the median, which some infinite `values` do not spoil."""
    found = np.asarray(values, dtype=float)
    drawn = np.quantile(rng.choice(found, size=(draws, len(found))), 0.5, axis=1, method="lower")
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return float(np.quantile(found, 0.5, method="lower")), float(low), float(high)
