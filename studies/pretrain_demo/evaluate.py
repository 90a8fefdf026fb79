"""Accuracy per question family, and the result file of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eas_search.tasks.digits_vqa import DigitsVqa, Family, Wording, draw_examples
from eas_search.tasks.encoding import EncodedSplit
from eas_search.tasks.scores import exact_match


def family_split(processor: Any, families: Sequence[Family], wording: Wording, pool: str, count: int) -> EncodedSplit:
    """`count` encoded examples of the families on the scans of `pool`."""
    return DigitsVqa().encode(processor, draw_examples(families, wording, pool, count))


@torch.no_grad()
def accuracy(model: Any, split: EncodedSplit, batch_size: int = 256) -> dict[str, float]:
    """Exact-match accuracy per group and over all samples ("all")."""
    model.eval()
    right = torch.cat(
        [
            exact_match(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
            for batch in split.batches(batch_size)
        ]
    ).double()
    found = {"all": right.mean().item()}
    for group in sorted(set(split.groups)):
        found[group] = right[[g == group for g in split.groups]].mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def write_result(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write `content` with versions, hardware and the date to a new file `<name>-<date>.json` in `folder`."""
    now = datetime.now(UTC)
    versions = {package: version(package) for package in ("torch", "transformers", "numpy", "scikit-learn")}
    record = {
        "date": now.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": hardware(),
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
