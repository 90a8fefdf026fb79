"""How long a model takes, always next to its baseline: prefill and decode, as values with their intervals."""

from eas_search.latency.config import LatencyConfig
from eas_search.latency.measure import measure_latency
from eas_search.latency.quiet import QuietLock
from eas_search.latency.values import Latency, LatencyReport, PhaseLatency, Ratio, Timing

__all__ = [
    "Latency",
    "LatencyConfig",
    "LatencyReport",
    "PhaseLatency",
    "QuietLock",
    "Ratio",
    "Timing",
    "measure_latency",
]
