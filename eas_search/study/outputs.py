"""The files of a finished search: tables, the page, the chosen configuration and the exported model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

import eas_search
from eas_search.exceptions import StorageError
from eas_search.export import ExportJob, export_student, get_format, usage
from eas_search.finalists import Finalist
from eas_search.report.front import REFERENCE, hypervolume, hypervolume_interval
from eas_search.settings import PROTOCOL
from eas_search.stages import Baseline
from eas_search.study.card import model_card
from eas_search.workbench import Workbench

CLAIMED = (
    "accuracy",
    "breakdown",
    "latency",
    "decode_latency",
    "kv_bytes",
    "parameters",
    "prefill_s",
    "decode_s",
)
PACKAGES = ("torch", "transformers", "optuna", "numpy", "pandas", "plotly", "joblib", "safetensors")
INTERVAL_NOTES = (
    "Score: mean over held-out samples that no trial saw; Wilson's 95 % interval of a proportion where answers "
    "are right or wrong, else Student's of a mean.",
    "Latency: every finalist and the original model timed in one interleaved run in random order; the 95 % interval "
    "says where the ratio of a repeated measurement in another process falls.",
    "Trials show their validation score after a short fine-tune and a predicted or quickly measured latency; finalists "
    "were re-trained equally and measured again.",
)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written ({error.strerror}); free space or choose --output"
        ) from error


def to_json(content: Any) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if hasattr(value, "item"):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(content), indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Inverse of `to_json`.

    Raises:
        StorageError: missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(path)!r} cannot be read; expected the output of a search: run it first") from error


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that figures depend on."""
    found = {"eas_search": eas_search.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def write_trials(frame: pd.DataFrame, path: Path) -> None:
    """`trials.csv`: lists as space-separated text, configurations as JSON."""
    table = frame.copy()
    for column in ("skip", "skip_names"):
        table[column] = [" ".join(map(str, value)) for value in frame[column]]
    table["config"] = [json.dumps(value) for value in frame["config"]]
    write_text(path, table.to_csv(index=False))


def page_baseline(baseline: Baseline) -> dict[str, Any]:
    """The baseline as the page wants it (milliseconds)."""
    return {
        "zero_shot_accuracy": baseline.zero_shot_accuracy,
        "zero_shot_breakdown": baseline.zero_shot_breakdown,
        "breakdown": baseline.breakdown,
        "accuracy": baseline.accuracy,
        "accuracy_low": baseline.accuracy_low,
        "accuracy_high": baseline.accuracy_high,
        "prefill_ms": 1000 * baseline.prefill_s,
        "decode_ms": None if baseline.decode_s is None else 1000 * baseline.decode_s,
        "kv_bytes": baseline.kv_bytes,
        "parameters": baseline.parameters,
        "flops": baseline.flops,
        "latency": 1.0,
    }


def site_rows(bench: Workbench, redundancy: Sequence[float]) -> list[dict[str, Any]]:
    """The searchable sites with their redundancy."""
    return [
        {"index": site.index, "name": site.name, "tower": site.tower, "redundancy": score}
        for site, score in zip(bench.sites, redundancy, strict=True)
    ]


def front_hypervolume(front: pd.DataFrame, finalists: Sequence[Finalist]) -> dict[str, Any]:
    """Area dominated by the front, relative to accuracy 0 and the original model's latency (1.0), and its interval.

    It is that of accuracy and latency, also where a search has further objectives, so that searches can be compared.
    """
    scores = {finalist.number: finalist.scores.double().numpy() for finalist in finalists}
    latency = front["latency"].to_numpy()
    low, high = hypervolume_interval([scores[number] for number in front["number"]], latency)
    area = float(hypervolume(front["accuracy"].to_numpy(), latency, REFERENCE))
    return {"hypervolume": area, "hypervolume_low": low, "hypervolume_high": high}


def objectives_hypervolume(front: pd.DataFrame, objectives: Sequence[str], baseline: Baseline) -> dict[str, float]:
    """Volume that the front dominates in a study's own objectives, costs as shares of the original model's.

    Empty for accuracy and latency, whose area is `front_hypervolume`.
    """
    if tuple(objectives) == ("accuracy", "latency"):
        return {}
    costs = np.column_stack([front[name] / getattr(baseline, name) for name in objectives[1:]])
    return {"objectives_hypervolume": hypervolume(front["accuracy"].to_numpy(), costs)}


def conditions(bench: Workbench) -> dict[str, str]:
    """The circumstances that a reader of the figures must know."""
    settings, student = bench.settings, bench.space.student
    tokens = bench.latency_inputs().get("input_ids")
    shape = "" if tokens is None else f" of {tokens.shape[-1]} tokens"
    return {
        "score": bench.splits["test"].scoring.metric,
        "trials' latency": settings.latency,
        "latency": f"prefill of {settings.latency_batch} prompts{shape}, {settings.dtype}, merged model",
        "training and trials": "matrix products in bfloat16" if bench.conditions.bf16 else settings.dtype,
        "training samples": str(len(bench.splits["train"])),
        "validation samples": str(len(bench.splits["validation"])),
        "selection samples": str(len(bench.splits["selection"])),
        "held-out samples": str(len(bench.splits["test"])),
        "trial fine-tune": f"{settings.trial.steps} steps of {settings.trial.batch_size}",
        "finalist fine-tune": f"{settings.final.steps} steps of {settings.final.batch_size}",
        "sampler": settings.sampler,
        "student": f"{student.router} router, pooling {student.pooling}, light adapters of rank {student.adapter_dim}",
        **({"data": "; ".join(bench.task.notes)} if bench.task.notes else {}),
    }


def possible_format(student: nn.Module) -> tuple[str, str | None]:
    """The first format in which a student can be handed over, and why it is not `eas`, if it is another one.

    A class that comes with a checkpoint, or quantised weights, cannot be rebuilt from JSON: there adapters are left.
    """
    verdict = get_format("eas").plan(student)
    return ("adapter", verdict.reason) if verdict.kind == "impossible" else ("eas", None)


def write_export(
    bench: Workbench, finalist: Finalist, row: Mapping[str, Any], baseline: Baseline, folder: Path, kind: str = "eas"
) -> None:
    """Write a finalist in an export format with card, recorded answers and manifest, then reload and verify it.

    Raises:
        VerificationError: the reloaded export does not answer like the trained student.
    """
    claims = {key: row[key] for key in row if key.startswith(CLAIMED)}
    facts = {
        "base_model": bench.settings.model,
        "quantization": bench.settings.quantization,
        "head": bench.task.head,
        "labels": None if bench.task.labels is None else list(bench.task.labels),
        "task": bench.settings.task,
        "task_options": json.loads(to_json(bench.settings.task_options)),
        "metric": bench.splits["test"].scoring.metric,
        "trial": int(row["number"]),
        "claims": json.loads(to_json(claims)),
        "baseline": json.loads(to_json(vars(baseline))),
        "latency_batch": bench.settings.latency_batch,
        "held_out_limit": bench.settings.samples.test,
        "protocol": PROTOCOL,
        "conditions": conditions(bench),
        "hardware": bench.hardware,
        "versions": versions(),
        "seed": bench.settings.seed,
    }
    student: Any = finalist.student
    chosen, prompts = get_format(kind), bench.splits["validation"].prompts(4)
    skipped = [site.name for site in student.eas.skipped]
    card = model_card(facts, skipped, len(bench.sites), finalist.config, chosen, usage(chosen, student, prompts))
    export_student(ExportJob(student, prompts, bench.processor, card, facts, bench.model), folder, kind)
