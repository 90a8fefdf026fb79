"""What a timing is worth: ratios to the baseline and their intervals.  Pure functions of arrays.

Samples have the shape (rounds, blocks), in seconds.  A *block* times every model once, in random order, so
the ratio of two samples of one block is free of whatever drifts more slowly than a block.  A *round* is a
group of blocks with the weights in one place in memory.  What comes from that place, or from a neighbour on
the machine who stays for a while, is shared by the blocks of a round and differs between rounds, hence two
levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
QUIET_PROCESS_SD, ROUNDS_TO_PROCESS = 0.006, 0.3


def paired_log_ratios(candidate: ArrayLike, baseline: ArrayLike) -> FloatArray:
    """log(candidate / baseline) per block.  Shapes (rounds, blocks) in and out.

    Raises:
        ValueError: the shapes differ, are not two-dimensional, or a sample is not a positive finite number.
    """
    pair = [np.asarray(samples, dtype=np.float64) for samples in (candidate, baseline)]
    if pair[0].shape != pair[1].shape or pair[0].ndim != 2:
        raise ValueError(f"samples of shape {pair[0].shape} and {pair[1].shape}, expected (rounds, blocks) twice")
    if not all(np.isfinite(samples).all() and (samples > 0).all() for samples in pair):
        raise ValueError("samples must be positive finite seconds")
    return np.log(pair[0]) - np.log(pair[1])


def log_estimate(log_ratios: FloatArray) -> FloatArray:
    """The quarter-trimmed mean over rounds of each round's median.  Shape (…, rounds, blocks) to (…).

    The median forgives a disturbed block, the trimming a disturbed round.  On recorded timings it halved the
    spread that estimates have with the plain mean over rounds, and raised the interval's coverage from .90
    to .96.
    """
    centres = np.sort(np.median(log_ratios, axis=-1), axis=-1)
    rounds = centres.shape[-1]
    cut = _trimmed(rounds)
    return np.asarray(centres[..., cut : rounds - cut].mean(axis=-1))


def _trimmed(rounds: int) -> int:
    """Rounds left out at either end: a quarter; none below five, where too few would remain for an interval."""
    return rounds // 4 if rounds >= 5 else 0


def process_deviation(round_sd: float) -> float:
    """Standard deviation of the log ratio between one occasion and the next, judged from the rounds of one run.

    Rounds that differ betray a machine with changing neighbours, on which other occasions will differ, too. Both
    constants are those with which `studies/bench_latency_aa` found the promised coverage, on two busy occasions and a
    quiet one.
    """
    return float(np.hypot(QUIET_PROCESS_SD, ROUNDS_TO_PROCESS * round_sd))


def repeat_interval(log_ratios: FloatArray, confidence: float, process_sd: float | None = None) -> tuple[float, float]:
    """Interval of log ratios for the *estimate of a repeated measurement*, in another process.

    Of R rounds h are left after trimming, and s_w is the standard deviation of the winsorised round medians
    (those trimmed are set to the nearest that is left).  This estimate and the repeated one both have the
    variance s² = s_w² (R - 1) / (h (h - 1)) from rounds and blocks, and process_sd² from what is the
    same throughout a run, such as the process and how busy the machine is:

        half width = sqrt( t² · 2 s²  +  z² · 2 process_sd² )

    with t and z the quantiles of Student's distribution (h - 1 degrees of freedom) and the normal one.  The
    repeated measurement is taken to be of the same size; one that is smaller scatters more than the interval
    allows for, and so does one on a busier machine: `process_sd` has to make up for it.

    An interval for the ratio of this very run (`run_interval`) is narrower, and what is measured again falls outside it
    far more often than 1 time in 20: `studies/bench_latency_aa` counts both.

    Sources: Yuen, The two-sample trimmed t for unequal population variances, Biometrika 61, 1974 (variance);
    Hahn and Meeker, Statistical Intervals, 1991, chapter 4 (interval of a future mean).

    Args:
        log_ratios: shape (rounds, blocks), at least two rounds.
        confidence: in (0, 1).
        process_sd: standard deviation of the log ratio between runs that the rounds within one do not show; None:
            `process_deviation` of the round medians' standard deviation.

    Raises:
        ValueError: fewer than two rounds.
    """
    centre, error, left = _yuen(log_ratios)
    round_sd = float(np.median(log_ratios, axis=1).std(ddof=1))
    between = process_deviation(round_sd) if process_sd is None else process_sd
    tail = (1 + confidence) / 2
    sampling = float(stats.t.ppf(tail, left - 1)) * error * 2**0.5
    process = float(stats.norm.ppf(tail)) * between * 2**0.5
    half = float(np.hypot(sampling, process))
    return centre - half, centre + half


def run_interval(log_ratios: FloatArray, confidence: float) -> tuple[float, float]:
    """Interval of the log ratio as far as *this run* can tell: `log_estimate` ± t · s, see `repeat_interval`.

    Two equal models timed against each other have 1.00 in it as often as it promises; another process, in which both
    differ from here, it knows nothing of. Redrawing rounds (bootstrap) gives too narrow an interval for so few.

    Args:
        log_ratios: shape (rounds, blocks), at least two rounds.
        confidence: in (0, 1).

    Raises:
        ValueError: fewer than two rounds.
    """
    centre, error, left = _yuen(log_ratios)
    half = float(stats.t.ppf((1 + confidence) / 2, left - 1)) * error
    return centre - half, centre + half


def run_error(log_ratios: FloatArray) -> float:
    """Standard error of the log ratio as far as this run can tell: the s of `run_interval`."""
    return _yuen(log_ratios)[1]


def _yuen(log_ratios: FloatArray) -> tuple[float, float, int]:
    """`log_estimate`, its standard error s, and how many rounds are left after trimming."""
    rounds = log_ratios.shape[0]
    if rounds < 2:
        raise ValueError(f"{rounds} round, expected at least 2")
    cut = _trimmed(rounds)
    centres = np.sort(np.median(log_ratios, axis=1))
    left = rounds - 2 * cut
    winsorised = np.clip(centres, centres[cut], centres[rounds - cut - 1])
    variance = float(winsorised.var(ddof=1)) * (rounds - 1) / (left * (left - 1))
    return float(log_estimate(log_ratios)), variance**0.5, left
