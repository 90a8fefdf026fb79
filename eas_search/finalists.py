"""The finalists: trials of the front, re-trained equally, scored on held-out samples and timed side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eas_search.latency import Latency, measure_latency
from eas_search.measures import accuracy_interval, kv_bytes_per_token, parameter_count, prefill_flops
from eas_search.merging import merge
from eas_search.objective import kept_student, make_student
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters
from eas_search.stage_folder import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import sample_scores
from eas_search.workbench import Workbench

SCORES = "held-out scores"  # among a finalist's kept tensors; no adapter has a blank in its name


@dataclass
class Finalist:
    """One re-trained configuration with its held-out accuracy; `student` is unmerged, `merged` what is timed.

    "Accuracy" is the mean score by the task's metric, `scores` are those of the held-out samples, [N], and `breakdown`
    holds further held-out figures by name. `selection_accuracy` is what may decide between finalists. `accuracy_seeds`
    are the held-out accuracies of all its trainings, its own first.
    """

    number: int
    config: SkipConfig
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    selection_accuracy: float
    scores: Tensor
    student: nn.Module
    merged: nn.Module
    breakdown: dict[str, float] = field(default_factory=dict)
    accuracy_seeds: list[float] = field(default_factory=list)


def finalist_name(config: SkipConfig) -> str:
    """Of the stage that keeps a finalist."""
    return f"finalist-{config.digest}"


def prepare_finalist(
    bench: Workbench, supernet: Supernet, folder: StageFolder, number: int, config: SkipConfig
) -> Finalist:
    """Re-train a configuration with the finalists' settings, or take what an earlier run kept."""
    name = finalist_name(config)
    kept = folder.read(name)
    if kept is None:
        student = make_student(bench, supernet, config, bench.settings.final)
        held_out = bench.splits["test"]
        scores = sample_scores(student, held_out)
        selection = sample_scores(student, bench.splits["selection"])
        accuracy, low, high = accuracy_interval(scores)
        content = {
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "selection_accuracy": selection.double().mean().item(),
            "breakdown": held_out.scoring.report(held_out, scores),
            "accuracy_seeds": [accuracy, *_trained_again(bench, supernet, config)],
        }
        folder.write(name, content, {**adapter_parameters(student), SCORES: scores})
    else:
        content, adapters = kept
        scores = adapters.pop(SCORES)
        student = kept_student(bench, config, adapters)
    merged = merge(student).eval()
    return Finalist(number=number, config=config, scores=scores, student=student, merged=merged, **content)


def _trained_again(bench: Workbench, supernet: Supernet, config: SkipConfig) -> list[float]:
    """Held-out accuracies of further trainings of a configuration."""
    found = []
    for repeat in range(1, bench.settings.final_seeds):
        student = make_student(bench, supernet, config, bench.settings.final, repeat)
        found.append(sample_scores(student, bench.splits["test"]).double().mean().item())
    return found


def measure_finalists(
    bench: Workbench, finalists: Sequence[Finalist], folder: StageFolder
) -> dict[int, dict[str, Any]]:
    """Latency, KV bytes, parameters and FLOPs of every finalist by trial number, all timed in one interleaved run.

    An earlier measurement of exactly these finalists is taken as it is: a resumed study at its budget adds nothing.
    """
    names = {str(finalist.number): finalist.config.digest for finalist in finalists}
    name = "latency-" + hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:12]
    content = folder.once(name, lambda: _measured(bench, finalists))
    return {int(number): figures for number, figures in content.items()}


def _measured(bench: Workbench, finalists: Sequence[Finalist]) -> dict[str, Any]:
    """The figures of `measure_finalists` by trial number as text."""
    inputs = bench.latency_inputs()
    report = measure_latency(
        {str(f.number): f.merged for f in finalists},
        inputs,
        baseline=bench.model,
        config=bench.settings.final_latency,
    )
    return {
        str(f.number): {
            **_flat(report[str(f.number)]),
            "kv_bytes": kv_bytes_per_token(f.merged, inputs),
            "parameters": parameter_count(f.merged),
            "flops": prefill_flops(f.merged, inputs),
        }
        for f in finalists
    }


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
