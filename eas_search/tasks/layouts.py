"""Files of published data sets: where they may lie, and what is said when one is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eas_search.exceptions import TaskDataError


def find(folder: Path, places: Sequence[str], source: str) -> Path:
    """The first of these places below `folder` that exists.

    Raises:
        TaskDataError: in one line: which file or folder is missing, where it was looked for, where it comes from.
    """
    for place in places:
        if (folder / place).exists():
            return folder / place
    name = Path(places[0]).name
    raise TaskDataError(
        f"'{name}' is missing: looked for {', '.join(places)} in '{folder}'; expected it from {source}."
    )


def read_json(file: Path, source: str, lines: bool = False) -> Any:
    """Content of a JSON file, or the list of a file with one JSON value per line. Raises TaskDataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        # Only "\n" ends a line: `splitlines` would also cut at separators that JSON texts may hold, such as U+2028.
        return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise TaskDataError(f"file '{file}' cannot be read as JSON ({reason}); expected it from {source}.") from error


def field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record. Raises TaskDataError if it is missing or of another kind."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TaskDataError(f"{where} has {value!r:.40} for '{name}'; expected a {kinds}.")
    return value
