"""From the rows of the study to its result files: one JSON with everything, one CSV to read."""

from __future__ import annotations

import csv
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

STEPS = ("detect", "proof", "delete", "pia", "formula", "invariance", "decode", "generate", "export")
COLUMNS = ("model_type", "family", "class", "status", *STEPS, "sites", "patterns", "kinds", "largest", "reason")


def numbers(value: Any, name: str = "") -> list[float]:
    """All differences measured in single precision inside a row; what is meant to be large is left out."""
    if name in ("effect", "changed", "cache_ratio", "layers", "skipped", "sites", "reached", "refused", "left_out"):
        return []
    if isinstance(value, dict):
        return [number for key, item in value.items() for number in numbers(item, key)]
    return [value] if isinstance(value, float) else []


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    steps = row["steps"]
    found = steps.get("detect", {})
    largest = max((n for step in STEPS for n in numbers(steps.get(step, {}))), default=None)
    return {
        **{name: row.get(name, "") for name in ("model_type", "family", "class", "status", "reason")},
        **{name: steps.get(name, {}).get("status", "") for name in STEPS},
        "sites": found.get("reached", ""),
        "patterns": " ".join(found.get("patterns", ())),
        "kinds": " ".join(found.get("kinds", ())),
        "largest": "" if largest is None else f"{largest:.1e}",
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts: by status, of families, of steps that were passed, and of wrong results."""
    passed = [row for row in rows if row["status"] == "pass"]
    wrong = [r["model_type"] for r in rows if any(step.get("wrong") for step in r["steps"].values())]
    refusals = Counter(row["reason"].partition(":")[0] for row in rows if row["status"] == "refused")
    return {
        "by_status": dict(Counter(row["status"] for row in rows)),
        "families_passed": len({row["family"] for row in passed}),
        "steps_passed": {name: sum(r["steps"].get(name, {}).get("status") == "pass" for r in passed) for name in STEPS},
        "refused_at": dict(refusals),
        "wrong": wrong,
        "largest_of_passed": max(
            (n for row in passed for step in STEPS for n in numbers(row["steps"].get(step, {}))), default=None
        ),
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
    }


def hardware() -> dict[str, Any]:
    """Where the study ran; nothing in it is timed."""
    return {
        "device": "cpu",
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def record(study: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write `results/coverage-DATE.json` and the table of the same name as CSV."""
    from record import write_result

    content = {"config": config, "summary": summary(rows), "rows": rows}
    path = write_result(study, "coverage", content, hardware())
    with path.with_suffix(".csv").open("x", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table_row(row) for row in rows)
    return path
