"""`LatencyPredictor`: the time of any skip configuration from a few that were measured.

Attentions of one class (see `terms`) cost the same, so that a prefill takes

    t / t_baseline = base + sum over classes c of (ζ_c k_c² - λ_c m_c + sum over forms f of k_cf (δ_cf + ε_cf · rank))

with k_cf sites of class c skipped in form f (a placement, or plain deletion), δ what one of them saves less what its
PIA costs, ε the PIA's cost per rank, and ζ the little by which caches and what is done once per pass bend the line. Of
the sites, m_c stand at the end of a stack with no attention behind them (`terms`): λ is the FFN of one of these for the
tokens that nobody asks for. Without that, it is the law S(k) = 1 / (1 - a k/L) of whole-sublayer deletion with the
stand-ins' cost added.

Folded stand-ins cost little, so that forms differ little, and ε and ζ are small: a priori each of these makes a normal
difference with standard deviation `SMALL` where it is largest. With as few measurements as are affordable least squares
would fit their noise instead; the quieter the measurements, the less the prior counts.

All ratios of a run share the error of its one timing of the original model: they can all be 5 % too large, and no
residual shows it. So the original is timed among the candidates, too. Its ratio is known to be 1; whatever the fit
makes of it is that error, and taken out. `base` is a student that skips nothing: its hooks cost a small difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from eas_search.exceptions import EasSearchError
from eas_search.latency.statistics import process_deviation
from eas_search.latency.terms import BASE, LAST, ORIGINAL, RANK, SQUARED, Row

Matrix = NDArray[np.float64]
SMALL = 0.03  # of the original model's time


def independent_terms(rows: Sequence[Row]) -> list[str]:
    """The terms that `rows` tell apart; one that always goes with others, like the only rank there is, is left out."""
    kept: list[str] = []
    for term in sorted(
        {term for row in rows for term in row}, key=lambda term: (term.count(","), term.endswith(SQUARED))
    ):
        if np.linalg.matrix_rank(_scaled(rows, [*kept, term])[0]) > len(kept):
            kept.append(term)
    return kept


def _scaled(rows: Sequence[Row], terms: Sequence[str]) -> tuple[Matrix, Matrix]:
    """(matrix [rows, terms], its columns' units [terms]); the largest entry of each is 1, or ranks drown the rest."""
    matrix = np.array([[row.get(term, 0.0) for term in terms] for row in rows])
    units = np.abs(matrix).max(axis=0, initial=1e-300)
    return matrix / units, units


@dataclass(frozen=True)
class LatencyPredictor:
    """A fitted predictor of the ratio of a merged model's prefill time to the original model's.

    Attributes:
        coefficients: of the terms that were told apart.
        known: all terms that occurred among the measured configurations.
        spread: covariance of the coefficients for a residual variance of 1, in the order of `coefficients`.
        residual_sd: standard deviation of the relative residuals, without the prior's pull; that of the timings where
            it is larger.
        freedom: degrees of freedom behind it.
        errors: predicted / measured - 1 of every measured configuration, from a fit to all the others.
        confidence: of the intervals.
        process_sd: see `LatencyConfig`.
        effective: sum over the measured configurations of the variances of their predictions, for a residual variance
            of 1; about the number of coefficients that the measurements decide, rather than the prior.
    """

    coefficients: dict[str, float]
    known: tuple[str, ...]
    spread: tuple[tuple[float, ...], ...]
    residual_sd: float
    freedom: int
    errors: tuple[float, ...]
    confidence: float = 0.95
    process_sd: float = 0.0
    effective: float = 0.0

    @property
    def leave_one_out(self) -> float:
        """Mean absolute relative error on a measured configuration of a fit that did not see it."""
        return float(np.abs(self.errors).mean())

    @property
    def standard_error(self) -> float:
        """Root mean square of the relative standard errors of the fitted ratios."""
        return float(self.residual_sd * np.sqrt(self.effective / len(self.errors)))

    def describe(self) -> str:
        """One line on how good it is."""
        return (
            f"Latency of trials is predicted from {len(self.errors)} measured ones; leave-one-out error "
            f"{100 * self.leave_one_out:.1f} % on average, {100 * max(map(abs, self.errors)):.1f} % at most"
        )

    def predict(self, row: Row) -> tuple[float, float, float]:
        """(ratio, low, high): the interval is for a measurement like those that were fitted, in another process.

        Where the original was among these, residuals are those of one timing, instead of a ratio of two.

        Raises:
            EasSearchError: a term that no measured configuration has, or a ratio that is not positive.
        """
        unknown = row.keys() - set(self.known)
        x = np.array([row.get(term, 0.0) for term in self.coefficients])
        ratio = float(x @ np.array(list(self.coefficients.values())))
        if unknown or ratio <= 0:
            why = f"nothing like {sorted(unknown)[0]!r} was measured" if unknown else f"the fit gives {ratio:.3g}"
            raise EasSearchError(
                f"latency cannot be predicted: {why}; expected a ratio above 0: use --latency measured"
            )
        relative = x / ratio - np.array([term == ORIGINAL for term in self.coefficients])
        tail, timings = (1 + self.confidence) / 2, 1 + (ORIGINAL in self.known)  # in what the interval is for
        fit = self.residual_sd * np.sqrt(timings + relative @ np.array(self.spread) @ relative)
        process = float(stats.norm.ppf(tail)) * self.process_sd * 2**0.5
        half = float(np.hypot(stats.t.ppf(tail, self.freedom) * fit, process))
        return ratio, ratio * float(np.exp(-half)), ratio * float(np.exp(half))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyPredictor:
        """Inverse of `to_dict`, also after JSON has made lists of tuples."""
        spread = tuple(tuple(line) for line in values["spread"])
        return cls(**{**values, "known": tuple(values["known"]), "spread": spread, "errors": tuple(values["errors"])})


def fit_predictor(
    rows: Sequence[Row],
    ratios: Sequence[float],
    confidence: float = 0.95,
    process_sd: float | None = 0.0,
    noise: float = 0.0,
) -> LatencyPredictor:
    """Least squares of the relative errors, because timings scatter in proportion to what they measure.

    The prior adds a row for each small difference, as in ridge regression, with the weight σ / `SMALL`, where σ is the
    noise's standard deviation, as the residuals tell without it, or the timings themselves: the residuals of few
    measurements may be small by chance.

    Args:
        rows: measured configurations, from `terms_of`, and `ORIGINAL` alone for the original model as a candidate.
        ratios: their measured times over the baseline's.
        confidence: of the predictor's intervals.
        process_sd: standard deviation of the log ratio between processes, as in `LatencyConfig`; None judges it from
            the residuals.
        noise: standard deviation of the relative error of a measured ratio, by the scatter of its own timings.

    Raises:
        ValueError: no more rows than independent terms, so that nothing would say how good the fit is.
    """
    terms, measured = independent_terms(rows), np.asarray(ratios, dtype=np.float64)
    freedom = len(rows) - len(terms)
    if freedom < 1:
        raise ValueError(f"{len(rows)} measured configurations for {len(terms)} terms; expected more of them")
    scaled, scale = _scaled(rows, terms)
    relative = scaled / measured[:, None]  # times the coefficients: predicted / measured

    every, prior, residual_sd = np.arange(len(rows)), _small_differences(terms, scale), 0.0

    def solve(index: NDArray[np.intp]) -> Matrix:
        """Coefficients from these measurements, at the noise known so far."""
        system = np.concatenate([relative[index], residual_sd / SMALL * prior])
        wanted = np.concatenate([np.ones(len(index)), np.zeros(len(prior))])
        return np.asarray(np.linalg.lstsq(system, wanted, rcond=None)[0])

    residuals = relative @ solve(every) - 1
    # Half of a ratio's variance is the original's, which all ratios share: `ORIGINAL` takes it up, not the residuals.
    own_noise = noise / 2**0.5 if ORIGINAL in terms else noise
    residual_sd = max(own_noise, float(np.sqrt(residuals @ residuals / freedom)))
    found = solve(every)
    errors = tuple(float(relative[i] @ solve(np.delete(every, i)) - 1) for i in every)
    inverse = np.linalg.inv(relative.T @ relative + (residual_sd / SMALL) ** 2 * prior.T @ prior)
    if ORIGINAL in terms:
        one = terms.index(ORIGINAL)
        inverse, relative, found = inverse / found[one] ** 2, relative * found[one], found / found[one]
        relative[:, one] -= 1.0
    spread = inverse / np.outer(scale, scale)
    return LatencyPredictor(
        coefficients=dict(zip(terms, (found / scale).tolist(), strict=True)),
        known=tuple(sorted({term for row in rows for term in row})),
        spread=tuple(map(tuple, spread.tolist())),
        residual_sd=residual_sd,
        freedom=freedom,
        errors=errors,
        confidence=confidence,
        process_sd=process_deviation(residual_sd) if process_sd is None else process_sd,
        effective=float(np.trace(relative @ inverse @ relative.T)),
    )


def _small_differences(terms: Sequence[str], scale: Matrix) -> Matrix:
    """[differences, terms] for scaled coefficients: ranks, squares, forms against the first one of their class, and a
    student that skips nothing against the original.
    """
    rows = [np.eye(len(terms))[i] for i, term in enumerate(terms) if term.endswith((RANK, SQUARED))]
    if ORIGINAL in terms:
        rows.append(np.eye(len(terms))[terms.index(BASE)] - np.eye(len(terms))[terms.index(ORIGINAL)])
    first: dict[str, int] = {}
    for i, term in enumerate(terms):
        if term.count(",") != 1 or term.endswith((SQUARED, LAST)):
            continue
        j = first.setdefault(term.partition(",")[0], i)
        if j != i:
            row = np.zeros(len(terms))
            row[i], row[j] = 1.0, -scale[i] / scale[j]  # of as many sites
            rows.append(row)
    return np.array(rows).reshape(-1, len(terms))
