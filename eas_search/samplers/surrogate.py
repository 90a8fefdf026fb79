"""What trials tell about configurations not tried: Bayesian regression of accuracy on which sites are skipped.

The model is a Gaussian process on the logit of the accuracy. Its covariance is a sum: linear in the number of skipped
sites, in every metric's sum over the skipped sites (so the data decide which metric to believe), in every site, in
every pair, and in what replaces the attentions; and a rest, for whatever else sites do together, that falls with the
number of sites in which two skip sets differ. The variances are those with the highest marginal likelihood (Rasmussen
and Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig

Array = NDArray[np.float64]
LOGIT_RANGE = (0.005, 0.995)  # accuracies beyond are taken for these: the logit of 0 or 1 is infinite
# Prior variances in logits; features of a whole skip set are scaled to about 1.
LEVEL, SIZE, METRICS, DRESS = 9.0, 9.0, 9.0, 0.25
REACH = 0.4  # share of all sites in which two skip sets differ when the correlation of their rests is 1 / e


@dataclass(frozen=True)
class Variances:
    """Of the prior, in logits.

    Attributes:
        sites: variance of the sum of all sites.
        pairs: variance of the sum of all pairs of sites.
        rest: variance of what is not linear.
        noise: noise / (p (1 - p)) is the variance of a trial's accuracy p. 1 / noise is thus the number of
            right-or-wrong samples that a trial is worth; more than it has, because all trials see the same ones.
    """

    sites: float
    pairs: float
    rest: float
    noise: float


GRID = [Variances(*one) for one in product((1.0, 10.0), (0.1, 3.0), (0.1, 0.5, 2.0), (1 / 1000, 1 / 250, 1 / 60))]


@dataclass(frozen=True)
class Features:
    """Configurations as numbers: `skip` [n, L] of 0 and 1, and `linear` [n, p], scaled by prior deviations."""

    skip: Array
    linear: Array

    def covariance(self, other: Features, variances: Variances) -> Array:
        """A priori, of two sets of configurations, [n, m]."""
        shared = self.skip @ other.skip.T / self.skip.shape[1]
        apart = self.skip.mean(axis=1)[:, None] + other.skip.mean(axis=1) - 2 * shared
        rest = variances.rest * np.exp(-apart / REACH)
        return LEVEL + self.linear @ other.linear.T + variances.sites * shared + variances.pairs * shared**2 + rest

    def variance(self, variances: Variances) -> Array:
        """The diagonal of `covariance` with itself, [n]."""
        share = self.skip.mean(axis=1)
        linear = (self.linear**2).sum(axis=1) + variances.sites * share + variances.pairs * share**2
        return LEVEL + linear + variances.rest


class Encoder:
    """Turns configurations of a space into features.

    Args:
        space: the search space.
        rankings: scores of its sites by any number of metrics, higher is more redundant.
    """

    def __init__(self, space: SearchSpace, rankings: Sequence[Sequence[float]]) -> None:
        self.space = space
        self.column = {site.index: i for i, site in enumerate(space.sites)}
        # As ranks and as values: one tells the order, the other how much worse the worst site is.
        forms = [form(np.asarray(one, dtype=float)) for one in rankings for form in (ranks, spread)]
        self.metrics = np.stack(forms, axis=1) if forms else np.zeros((len(self.column), 0))
        self.rows: dict[SkipConfig, Array] = {}  # most are asked for again at every proposal

    def __call__(self, configs: Sequence[SkipConfig]) -> Features:
        """The features of these configurations."""
        sites = len(self.column)
        skip, dress = np.split(np.stack([self._row(config) for config in configs]), [sites], axis=1)
        share = skip.mean(axis=1, keepdims=True)
        metrics = skip @ self.metrics / sites / np.sqrt(max(1, self.metrics.shape[1]))
        parts = (np.sqrt(SIZE) * share, np.sqrt(METRICS) * metrics, np.sqrt(DRESS) * dress * share)
        return Features(skip, np.concatenate(parts, axis=1))

    def _row(self, config: SkipConfig) -> Array:
        """Which sites are skipped, the rank, and which placement."""
        if config not in self.rows:
            dims, placements, sites = self.space.choices.pia_dims, self.space.choices.placements, len(self.column)
            row = self.rows[config] = np.zeros(sites + 1 + len(placements))
            row[[self.column[int(index)] for index in config.skip]] = 1.0
            row[sites] = np.log2(1 + config.pia_dim) / (np.log2(1 + max(dims)) or 1.0)
            row[sites + 1 + placements.index(config.placement)] = 1.0
        return self.rows[config]


class Surrogate:
    """The posterior given trials.

    Args:
        encoder: of the space.
        configs: what was tried.
        accuracies: their scores from 0 to 1; noisy.
        variances: of the prior; None: the likeliest ones.
        share: of the samples on which each was scored, [n]; its noise is that much larger. None: all of them.
    """

    def __init__(
        self,
        encoder: Encoder,
        configs: Sequence[SkipConfig],
        accuracies: Sequence[float],
        variances: Variances | None = None,
        *,
        share: Array | None = None,
    ) -> None:
        self.encoder, self.known = encoder, encoder(configs)
        y = logit(np.asarray(accuracies, dtype=float))
        share = np.ones(len(y)) if share is None else share
        self.variances = variances or likeliest(self.known, y, share)
        self.factor = _factor(self.known, y, self.variances, share)
        self.weights = cho_solve((self.factor, True), y)

    def predict(self, configs: Sequence[SkipConfig]) -> tuple[Array, Array]:
        """Mean and standard deviation of the logit of the true accuracy, [n] each."""
        features = self.encoder(configs)
        cross = self.known.covariance(features, self.variances)
        explained = (solve_triangular(self.factor, cross, lower=True) ** 2).sum(axis=0)
        variance = features.variance(self.variances) - explained
        return cross.T @ self.weights, np.sqrt(np.maximum(variance, 1e-12))

    def accuracy(self, configs: Sequence[SkipConfig]) -> Array:
        """Posterior median of the true accuracy, [n]: what a trial's score shrinks to in the light of all others."""
        return sigmoid(self.encoder(configs).covariance(self.known, self.variances) @ self.weights)


def likeliest(known: Features, y: Array, share: Array | float = 1.0) -> Variances:
    """The variances of `GRID` under which trials with the logits y [n], of a `share` of the samples, are likeliest."""

    def likelihood(variances: Variances) -> float:
        factor = _factor(known, y, variances, share)
        return float(-0.5 * y @ cho_solve((factor, True), y) - np.log(factor.diagonal()).sum())

    return max(GRID, key=likelihood)


def _factor(known: Features, y: Array, variances: Variances, share: Array | float) -> Array:
    p = sigmoid(y)
    return cholesky(known.covariance(known, variances) + np.diag(variances.noise / (p * (1 - p)) / share), lower=True)


def logit(p: Array) -> Array:
    """log(p / (1 - p)), kept finite."""
    inside = np.clip(p, *LOGIT_RANGE)
    return np.log(inside / (1 - inside))


def sigmoid(y: Array) -> Array:
    """Inverse of `logit`."""
    return 1 / (1 + np.exp(-y))


def ranks(scores: Array) -> Array:
    """0 for the most redundant site, 1 for the least."""
    return np.argsort(np.argsort(-scores, kind="stable"), kind="stable") / max(1, len(scores) - 1)


def spread(scores: Array) -> Array:
    """0 for the most redundant site, 1 for the least, in proportion to the scores in between."""
    return (scores.max() - scores) / (np.ptp(scores) or 1.0)
