"""A few questions of our own in ScienceQA's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUBJECTS = ("natural science", "social science", "language science")


def problem(i: int) -> dict[str, Any]:
    """The i-th problem: every third subject, grades 1 to 12, a hint for even ones, a picture for every fourth."""
    choices = ["cat", "dog", "bird", "tree", "house"][: 2 + i % 4]
    return {
        "question": f"question {i} ?",
        "choices": choices,
        "answer": i % len(choices),
        "hint": "the old house" if i % 2 == 0 else "",
        "image": "image.png" if i % 4 == 0 else None,
        "grade": f"grade{1 + i % 12}",
        "subject": SUBJECTS[i % 3],
        "lecture": "the cat sat on the mat",
        "solution": "the dog ran",
    }


def write_scienceqa(folder: Path, count: int = 36) -> Path:
    """problems.json, pid_splits.json and captions.json; pictures are not there."""
    pids = [str(i + 1) for i in range(count)]
    splits = {"train": pids[: count // 2], "val": pids[count // 2 : -count // 4], "test": pids[-count // 4 :]}
    files = {
        "problems.json": {pid: problem(int(pid)) for pid in pids},
        "pid_splits.json": {**splits, "minitest": splits["test"][:3]},
        "captions.json": {"captions": {"4": "a red tree"}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
