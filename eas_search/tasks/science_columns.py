"""ScienceQA's nine columns: accuracy by subject, context and grade, and on average (Lu et al., NeurIPS 2022)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.choices import option_letter
from eas_search.tasks.science_files import read_problem_ids

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.scoring import Scored

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AVERAGE = "average"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def groups_of(problem: Mapping[str, Any]) -> str:
    """The columns that a problem counts in, separated by spaces.

    A problem with a hint is in TXT, one with a picture in IMG, with both in both, and one with neither in NO.
    """
    context = [name for name, field in (("TXT", "hint"), ("IMG", "image")) if problem.get(field)] or ["NO"]
    subject = _SUBJECTS.get(str(problem.get("subject")))
    number = re.search(r"\d+", str(problem.get("grade", "")))
    grade = None if number is None else ("G1-6" if int(number[0]) <= 6 else "G7-12")
    return " ".join(name for name in (subject, *context, grade) if name)


def columns(groups: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Mean score by column; a column without a problem is left out."""
    named = [set(group.split()) for group in groups]
    found = {}
    for column in COLUMNS:
        values = [score for names, score in zip(named, scores, strict=True) if column in names]
        if values:
            found[column] = sum(values) / len(values)
    found[AVERAGE] = sum(scores) / len(scores)
    return found


def nine_columns(split: Scored, scores: Tensor) -> dict[str, float]:
    """The report of a scored split."""
    return columns(split.groups, scores.double().tolist())


def score_predictions(folder: Path, predictions: Mapping[str, int | str], split: str = "test") -> dict[str, float]:
    """The nine columns of predictions by problem id, as fractions.

    Args:
        folder: with problems.json and pid_splits.json.
        predictions: what was chosen: the option's position (from 0), its letter, its text, or a sentence with "the
            answer is B". What names no option is wrong.
        split: name in pid_splits.json.

    Raises:
        TaskDataError: the split is empty or unknown, or a prediction is missing.
    """
    problems, pids = read_problem_ids(folder, split)
    missing = [pid for pid in pids if pid not in predictions]
    if missing:
        raise TaskDataError(
            f"{len(missing)} of {len(pids)} problems of split '{split}' have no prediction, e.g. {missing[0]}; "
            "expected one for each; complete the file or name the split with --split."
        )
    scores = [float(_chosen(predictions[pid], problems[pid]["choices"]) == problems[pid]["answer"]) for pid in pids]
    return columns([groups_of(problems[pid]) for pid in pids], scores)


def _chosen(prediction: Any, choices: Sequence[str]) -> int | None:
    if isinstance(prediction, int) and not isinstance(prediction, bool):
        return prediction
    text = str(prediction).strip()
    matches = [i for i, choice in enumerate(choices) if choice.strip().lower() == text.lower()]
    if len(matches) == 1:
        return matches[0]
    if text.isdigit():
        return int(text)
    letter = option_letter(text)
    return None if letter is None else ord(letter) - ord("A")


def read_predictions(file: Path) -> dict[str, int | str]:
    """Predictions by problem id from JSON: `{"4": 1, "5": "B"}`. Raises TaskDataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise TaskDataError(
            f"predictions '{file}' cannot be read ({reason}); expected JSON like {{\"4\": 1}}."
        ) from error
    content = content.get("results", content) if isinstance(content, dict) else content
    usable = isinstance(content, dict) and all(isinstance(value, int | str) for value in content.values())
    if not usable:
        raise TaskDataError(f"predictions '{file}' are no choices by problem id; expected JSON like {{\"4\": 1}}.")
    return {str(pid): value for pid, value in content.items()}
