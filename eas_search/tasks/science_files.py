"""ScienceQA's own files: problems, their splits, and what their pictures show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import Split

PROBLEMS, SPLIT_FILE, CAPTIONS = "problems.json", "pid_splits.json", "captions.json"
SOURCE = "ScienceQA's own files, from https://github.com/lupantech/ScienceQA"
SCIENCEQA = f"a folder with {PROBLEMS} and {SPLIT_FILE} ({SOURCE})"
LETTERS = "ABCDEFGH"
PID_SPLITS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def read_problems(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[Split, list[str]]]:
    """All problems by id, and the ids of every split. Raises TaskDataError, in one line."""
    if not folder.is_dir():
        raise TaskDataError(f"'{folder}' is no folder; expected {SCIENCEQA}.")
    problems, named = _read(folder, PROBLEMS), _read(folder, SPLIT_FILE)
    return problems, {split: _checked(folder, problems, named.get(key, [])) for split, key in PID_SPLITS.items()}


def read_problem_ids(folder: Path, split: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All problems by id, and the ids of one split by its name in the data set (test, minitest, …).

    Raises TaskDataError.
    """
    problems, named = _read(folder, PROBLEMS), _read(folder, SPLIT_FILE)
    if not named.get(split):
        raise TaskDataError(f"split '{split}' is not in '{folder / SPLIT_FILE}'; expected one of {', '.join(named)}.")
    return problems, _checked(folder, problems, named[split])


def _checked(folder: Path, problems: dict[str, Any], pids: Sequence[Any]) -> list[str]:
    names = [str(pid) for pid in pids]
    for pid in names:
        problem = problems.get(pid)
        if not isinstance(problem, dict) or not _usable(problem):
            raise TaskDataError(
                f"problem {pid} of '{folder / SPLIT_FILE}' is missing from {PROBLEMS} or has no question, choices and "
                f"answer; expected {SOURCE}."
            )
    return names


def _usable(problem: dict[str, Any]) -> bool:
    choices, answer = problem.get("choices"), problem.get("answer")
    return (
        isinstance(problem.get("question"), str)
        and isinstance(choices, list)
        and 2 <= len(choices) <= len(LETTERS)
        and isinstance(answer, int)
        and 0 <= answer < len(choices)
    )


def read_captions(folder: Path) -> dict[str, str]:
    """What pictures show, by id; empty when the file is not there."""
    return dict(_read(folder, CAPTIONS).get("captions", {})) if (folder / CAPTIONS).is_file() else {}


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise TaskDataError(f"'{name}' cannot be read in '{folder}' ({reason}); expected {SOURCE}.") from error
    if not isinstance(content, dict):
        raise TaskDataError(f"'{folder / name}' holds a {type(content).__name__}; expected {SOURCE}.")
    return content
