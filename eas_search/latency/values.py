"""A measurement is a value: its samples, its unit, and what it is relative to its baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eas_search.exceptions import ConfigError
from eas_search.latency.statistics import log_estimate, paired_log_ratios, repeat_interval, run_error, run_interval


@dataclass(frozen=True)
class Timing:
    """Samples of one duration, (rounds, blocks); each is the mean over the repeats inside the sample."""

    samples: tuple[tuple[float, ...], ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        """Median of all samples, in `unit`."""
        return self._quantile(0.5)

    @property
    def p10(self) -> float:
        """10th percentile of all samples, in `unit`."""
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        """90th percentile of all samples, in `unit`."""
        return self._quantile(0.9)

    def _quantile(self, q: float) -> float:
        return float(np.quantile(np.asarray(self.samples), q))

    def to_dict(self) -> dict[str, Any]:
        """The unit, the percentiles and every sample."""
        return {
            "unit": self.unit,
            "median": self.median,
            "p10": self.p10,
            "p90": self.p90,
            "samples": [list(row) for row in self.samples],
        }


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over the time of its baseline in the same run; below 1 is faster.

    Attributes:
        estimate: trimmed geometric mean over rounds of the median paired ratio, see
            `statistics.log_estimate`.
        low, high: where the estimate of a repeated measurement falls, see `statistics.repeat_interval`.
        within_run: how well this run knows its own ratio, see `statistics.run_interval`; narrower, but no promise of
            what another run will find.
        confidence: of both intervals.
    """

    estimate: float
    low: float
    high: float
    within_run: tuple[float, float]
    confidence: float

    @classmethod
    def of(cls, candidate: Timing, baseline: Timing, confidence: float, process_sd: float | None) -> Ratio:
        """The ratio of two interleaved timings."""
        logs = paired_log_ratios(candidate.samples, baseline.samples)
        low, high = np.exp(repeat_interval(logs, confidence, process_sd))
        inner = np.exp(run_interval(logs, confidence))
        within = (float(inner[0]), float(inner[1]))
        return cls(float(np.exp(log_estimate(logs))), float(low), float(high), within, confidence)

    @property
    def speedup(self) -> float:
        """1 / estimate: how many times faster than the baseline."""
        return 1 / self.estimate

    def contains(self, ratio: float) -> bool:
        """Whether a ratio, such as the estimate of a repeated measurement, lies in [low, high]."""
        return self.low <= ratio <= self.high

    def agrees_with(self, other: Ratio) -> bool:
        """Whether two measurements of the same pair of models differ by no more than both intervals explain.

        Unlike `contains` it is fair to a repetition that was less thorough or on a busier machine: half
        widths h of the log ratios count as |log difference| ≤ sqrt((h1² + h2²) / 2), which is h when they
        are equal.
        """
        halves = [math.log(ratio.high / ratio.low) / 2 for ratio in (self, other)]
        return abs(math.log(self.estimate / other.estimate)) <= math.hypot(*halves) / 2**0.5

    def to_dict(self) -> dict[str, Any]:
        """Every field and the speedup, for JSON."""
        return {
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "within_run": list(self.within_run),
            "confidence": self.confidence,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class PhaseLatency:
    """One phase of one candidate: its own timing, the baseline's from the same run, and their ratio."""

    timing: Timing
    baseline: Timing
    ratio: Ratio

    @property
    def error(self) -> float:
        """Standard error of the log ratio, see `statistics.run_error`."""
        return run_error(paired_log_ratios(self.timing.samples, self.baseline.samples))

    def to_dict(self) -> dict[str, Any]:
        """Both timings and the ratio, for JSON."""
        parts = (("timing", self.timing), ("baseline", self.baseline), ("ratio", self.ratio))
        return {name: part.to_dict() for name, part in parts}


@dataclass(frozen=True)
class Latency:
    """One candidate: seconds per prompt batch, and per token step of the batch (None without decoding)."""

    prefill: PhaseLatency
    decode: PhaseLatency | None = None

    def to_dict(self) -> dict[str, Any]:
        """Both phases, for JSON."""
        return {
            "prefill": self.prefill.to_dict(),
            "decode": None if self.decode is None else self.decode.to_dict(),
        }


@dataclass(frozen=True)
class LatencyReport(Mapping[str, Latency]):
    """Every candidate of one interleaved run, by name, and the conditions (threads, device, shapes, seed,
    seconds).

    With a single candidate `report.prefill` and `report.decode` are that candidate's.
    """

    candidates: dict[str, Latency]
    conditions: dict[str, Any]

    def __getitem__(self, name: str) -> Latency:
        return self.candidates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def prefill(self) -> PhaseLatency:
        """The only candidate's prefill; raises `ConfigError` when there are several."""
        return self._only().prefill

    @property
    def decode(self) -> PhaseLatency | None:
        """The only candidate's decode, None where there is none; raises `ConfigError` when there are
        several.
        """
        return self._only().decode

    def _only(self) -> Latency:
        if len(self.candidates) != 1:
            names = ", ".join(map(repr, self.candidates))
            raise ConfigError(
                f"the report holds {len(self)} candidates, expected one here: choose report[name] of {names}"
            )
        return next(iter(self.candidates.values()))

    def to_dict(self) -> dict[str, Any]:
        """Conditions and candidates with all samples."""
        return {
            "conditions": self.conditions,
            "candidates": {name: latency.to_dict() for name, latency in self.items()},
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON; NaN is refused."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)
