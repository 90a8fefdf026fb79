"""Shared by the studies: append-only result files with versions, hardware and seed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_result(study: Path, name: str, content: dict[str, Any], hardware: dict[str, Any]) -> Path:
    """Write `content` to a new file `results/NAME-DATE.json` of a study folder; an existing file is never touched."""
    from eas_search.study.outputs import to_json, versions

    now = datetime.now(UTC)
    folder = study / "results"
    folder.mkdir(exist_ok=True)
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
