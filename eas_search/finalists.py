"""The finalists: trials of the front, re-trained equally, scored on held-out samples and timed side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from eas_search.latency import Latency, measure_latency
from eas_search.measures import accuracy_interval, kv_bytes_per_token, parameter_count
from eas_search.merging import merge
from eas_search.objective import make_student
from eas_search.report.front import non_dominated
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, load_adapters
from eas_search.stages import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import sample_scores
from eas_search.workbench import Workbench


@dataclass
class Finalist:
    """One re-trained configuration with its held-out accuracy; `student` is unmerged, `merged` what is timed.

    "Accuracy" is the mean score by the task's metric, `breakdown` holds further held-out figures by name.
    """

    number: int
    config: SkipConfig
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    validation_accuracy: float
    student: nn.Module
    merged: nn.Module
    breakdown: dict[str, float] = field(default_factory=dict)


def select_finalists(accuracy: Sequence[float], latency: Sequence[float], count: int) -> list[int]:
    """Positions of at most `count` points: the front first, then the front of what is left, and so on.

    A front that is too long is thinned evenly along its latency, both ends kept.
    """
    acc, lat = np.asarray(accuracy, dtype=float), np.asarray(latency, dtype=float)
    left = np.arange(len(acc))
    chosen: list[int] = []
    while len(chosen) < count and len(left):
        layer = left[non_dominated(acc[left], lat[left])]
        if not len(layer):
            break
        room = count - len(chosen)
        if len(layer) > room:
            ordered = layer[np.argsort(lat[layer], kind="stable")]
            chosen += ordered[np.unique(np.linspace(0, len(ordered) - 1, room).round().astype(int))].tolist()
            break
        chosen += layer.tolist()
        left = np.setdiff1d(left, layer)
    return sorted(chosen)


def digest(config: SkipConfig) -> str:
    """A short name for a configuration, usable in file names."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]


def prepare_finalist(
    bench: Workbench, supernet: Supernet, folder: StageFolder, number: int, config: SkipConfig
) -> Finalist:
    """Re-train a configuration with the finalists' settings, or take what an earlier run kept."""
    name = f"finalist-{digest(config)}"
    kept = folder.read(name)
    if kept is None:
        student = make_student(bench, supernet, config, bench.settings.final)
        held_out = bench.splits["test"]
        scores = sample_scores(student, held_out)
        accuracy, low, high = accuracy_interval(scores)
        content = {
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "validation_accuracy": sample_scores(student, bench.splits["validation"]).double().mean().item(),
            "breakdown": held_out.scoring.report(held_out, scores),
        }
        folder.write(name, content, dict(adapter_parameters(student)))
    else:
        content = kept[0]
        student = apply_skips(bench.model, config)
        load_adapters(student, kept[1])
        student.eval()
    return Finalist(number=number, config=config, student=student, merged=merge(student).eval(), **content)


def measure_finalists(
    bench: Workbench, finalists: Sequence[Finalist], folder: StageFolder
) -> dict[int, dict[str, Any]]:
    """Latency, KV bytes and parameters of every finalist by trial number, all timed in one interleaved run.

    An earlier measurement of exactly these finalists is taken as it is: a resumed study at its budget adds nothing.
    """
    names = {str(finalist.number): digest(finalist.config) for finalist in finalists}
    name = "latency-" + hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:12]
    kept = folder.read(name)
    if kept is None:
        inputs = bench.latency_inputs()
        report = measure_latency(
            {str(f.number): f.merged for f in finalists},
            inputs,
            baseline=bench.model,
            config=bench.settings.final_latency,
        )
        content = {
            str(f.number): {
                **_flat(report[str(f.number)]),
                "kv_bytes": kv_bytes_per_token(f.merged, inputs),
                "parameters": parameter_count(f.merged),
            }
            for f in finalists
        }
        folder.write(name, content, {})
    else:
        content = kept[0]
    return {int(number): figures for number, figures in content.items()}


def _flat(latency: Latency) -> dict[str, float | None]:
    prefill = latency.prefill.ratio
    flat: dict[str, float | None] = {
        "latency": prefill.estimate,
        "latency_low": prefill.low,
        "latency_high": prefill.high,
        "prefill_s": latency.prefill.timing.median,
    }
    decode = None if latency.decode is None else latency.decode.ratio
    for key, end in (("", "estimate"), ("_low", "low"), ("_high", "high")):
        flat[f"decode_latency{key}"] = None if decode is None else getattr(decode, end)
    flat["decode_s"] = None if latency.decode is None else latency.decode.timing.median
    return flat
