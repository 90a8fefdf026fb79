"""`measure_latency`: candidates and baseline timed side by side in one run.

Two timings taken one after the other differ by whatever the machine did in between.  Here every block times
every model once, in an order drawn anew, and only ratios within a block are compared.  Every round moves all
weights in memory: where they lie can shift a model's time for as long as they lie there, and a run that
times one placement a hundred times would know that placement's ratio very well and the model's less.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import ConfigError
from eas_search.latency.config import LatencyConfig
from eas_search.latency.forward import Timer
from eas_search.latency.interleave import run_interleaved
from eas_search.latency.values import Latency, LatencyReport, PhaseLatency, Ratio, Timing

_BASELINE = "baseline"


def measure_latency(
    candidates: nn.Module | Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    baseline: nn.Module,
    config: LatencyConfig | None = None,
    timer: Timer = time.perf_counter,
) -> LatencyReport:
    """Time one candidate or several against the baseline, all interleaved in one run.

    Prefill is one forward of the full prompt batch, with `use_cache=True` for every model that knows it, and with
    `logits_to_keep=1` where all models of the run know it, else with every position's logits from all of them
    (`conditions["logits_to_keep"]` says which; 0 is every position).  What a wrapped model knows (`torch.compile`,
    PEFT) is asked of the model inside.  Decode is seconds per greedy single-token step continuing from the prefill's
    cache, None for models without one.  Everything runs in eval mode and inference mode; the models come back as
    they were.

    Args:
        candidates: a model, named "candidate" in the report, or name → model.
        inputs: keyword arguments of the models: input_ids (B, n), attention_mask (B, n), pixel_values, …
        baseline: the model that every ratio is relative to.
        config: how thoroughly; `LatencyConfig()` for results, `LatencyConfig.fast()` inside a search.
        timer: clock in seconds.

    Returns:
        A mapping name → `Latency`; with one candidate also `report.prefill` and `report.decode`.

    Raises:
        ConfigError: no candidate, a name that is taken, or a model that cannot be copied.
    """
    config = config or LatencyConfig()
    named = dict(candidates) if isinstance(candidates, Mapping) else {"candidate": candidates}
    if not named or _BASELINE in named:
        raise ConfigError(f"candidates are {list(named)}, expected at least one name and none called {_BASELINE!r}")
    with _threads(config.threads):
        samples = run_interleaved({_BASELINE: baseline, **named}, inputs, config, timer)
    latencies = {
        name: Latency(
            _phase(samples.prefill, name, config),
            _phase(samples.decode, name, config) if samples.decode else None,
        )
        for name in named
    }
    return LatencyReport(latencies, samples.conditions)


def _phase(samples: Mapping[str, list[list[float]]], name: str, config: LatencyConfig) -> PhaseLatency:
    timing, reference = (Timing(tuple(tuple(row) for row in samples[key])) for key in (name, _BASELINE))
    ratio = Ratio.of(timing, reference, config.confidence, config.process_sd)
    return PhaseLatency(timing, reference, ratio)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's intra-op threads for the duration of the run."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
