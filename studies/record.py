"""Shared by the studies: append-only result files with versions, hardware and seed."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_result(study: Path, name: str, content: dict[str, Any], hardware: dict[str, Any]) -> Path:
    """Write `content` to a new file `results/NAME-DATE.json` of a study folder; an existing file is never touched."""
    from eas_search.study.outputs import to_json, versions

    now = datetime.now(UTC)
    folder = study / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{now:%Y%m%d-%H%M%S}.json"
    record = {"date": f"{now:%Y-%m-%d}", "versions": versions(), "hardware": hardware, **content}
    with path.open("x", encoding="utf-8") as file:
        file.write(to_json(record))
    return path


def load_config(study: Path) -> dict[str, Any]:
    """The study's `config.yaml`."""
    import yaml

    return yaml.safe_load((study / "config.yaml").read_text(encoding="utf-8"))


def print_json(content: Any) -> None:
    """For studies whose result is small enough to read."""
    print(json.dumps(content, indent=2))


def record_run(study: Path, run: Path, name: str = "search") -> Path:
    """Keep the outcome of a finished search as a result of a study."""
    from eas_search.study.outputs import read_json

    summary = read_json(run / "summary.json")
    hardware = summary.pop("hardware")
    content = {"seed": summary["seed"], "summary": summary, "finalists": read_json(run / "pareto.json")}
    return write_result(study, name, content, hardware)


if __name__ == "__main__":  # python studies/record.py studies/vqav2_meter runs/vqav2_meter tiny
    print("wrote", record_run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4]).name)
