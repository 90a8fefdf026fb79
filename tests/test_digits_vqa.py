"""The task's answers, splits and registry, against computations that share no code with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eas_search import tasks
from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.tasks import Example, Task
from eas_search.tasks.digit_scenes import TINTS, draw_scenes, scan_pool
from eas_search.tasks.digits_vqa import (
    DOWNSTREAM_FAMILIES,
    PLAIN,
    PRETRAINING_FAMILIES,
    SHIFTED,
    Family,
    Wording,
    ask,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TINT_WORDS = {
    "red": 0,
    "crimson": 0,
    "green": 1,
    "emerald": 1,
    "blue": 2,
    "azure": 2,
    "yellow": 3,
    "golden": 3,
}
ROWS = {"top": 0, "upper": 0, "bottom": 1, "lower": 1}
COLUMNS = {"left": 0, "right": 1}


def answer_from_text(question: str, grid: dict[tuple[int, int], tuple[int, int]]) -> str:
    """Reads the question as a person would; grid[row, column] = (digit, tint)."""
    words = re.findall(r"[a-z]+", question)
    places = {tint: place for place, (_, tint) in grid.items()}
    asked = [places[TINT_WORDS[word]] for word in words if word in TINT_WORDS]
    rows, columns = [ROWS[w] for w in words if w in ROWS], [COLUMNS[w] for w in words if w in COLUMNS]
    if len(asked) == 2:
        return "yes" if grid[asked[0]][0] > grid[asked[1]][0] else "no"
    if len(rows) == 2:
        return ["top", "bottom"][asked[0][0]]
    if len(columns) == 2:
        return ["left", "right"][asked[0][1]]
    digit, tint = grid[asked[0] if asked else (rows[0], columns[0])]
    if {"even", "evenly"} & set(words):
        return "no" if digit in (1, 3, 5, 7, 9) else "yes"
    return ["red", "green", "blue", "yellow"][tint] if {"color", "tint"} & set(words) else NUMBERS[digit]


@pytest.mark.parametrize(
    ("families", "wording"),
    [(PRETRAINING_FAMILIES, PLAIN), (DOWNSTREAM_FAMILIES, SHIFTED)],
    ids=["pretraining", "downstream"],
)
def test_answers_agree_with_an_independent_reader(families: tuple[Family, ...], wording: Wording) -> None:
    rng = np.random.default_rng(3)
    scenes = draw_scenes("train", 200, rng)
    for digits, colours in zip(scenes.digits, scenes.colours, strict=True):
        grid = {(cell // 2, cell % 2): (int(digits[cell]), int(colours[cell])) for cell in range(4)}
        for family in families:
            question, answer = ask(family, wording, digits, colours, rng)
            assert answer == answer_from_text(question, grid), question


def test_images_show_what_the_answers_say() -> None:
    """Tints are read off the pixels; digits by the nearest of 1,024 rendered cells from other scans."""
    known = draw_scenes("pretraining", 256, np.random.default_rng(0))
    cells = known.pixels.reshape(256, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1024, 256, 3).max(axis=2)
    cells = cells / np.linalg.norm(cells, axis=1, keepdims=True)
    right: dict[str, list[bool]] = {"tint-at": [], "numeral-at": []}
    for example in tasks.get_task("digits-vqa").examples("test", 400):
        if example.group not in right:
            continue
        assert example.image is not None
        row = 16 if "lower" in example.prompt else 0
        column = 16 if "right" in example.prompt else 0
        cell = np.asarray(example.image, dtype=float)[row : row + 16, column : column + 16].reshape(256, 3)
        if example.group == "tint-at":
            direction = TINTS / np.linalg.norm(TINTS, axis=1, keepdims=True)
            found = ["red", "green", "blue", "yellow"][int((direction @ cell.sum(axis=0)).argmax())]
        else:
            found = NUMBERS[int(known.digits.reshape(-1)[(cells @ cell.max(axis=1)).argmax()])]
        right[example.group].append(found == example.answer)
    assert np.mean(right["tint-at"]) == 1.0
    assert np.mean(right["numeral-at"]) > 0.8


def test_pools_of_scans_are_disjoint_and_complete() -> None:
    pools = {name: set(scan_pool(name).tolist()) for name in ("pretraining", "train", "validation", "test")}
    assert {name: len(pool) for name, pool in pools.items()} == {
        "pretraining": 900,
        "train": 450,
        "validation": 150,
        "test": 297,
    }
    assert set.union(*pools.values()) == set(range(1797))  # the sizes sum to 1,797, so no scan is in two pools
    for name, pool in pools.items():
        assert set(draw_scenes(name, 64, np.random.default_rng(1)).scans.reshape(-1).tolist()) <= pool


def _content(examples: list[Example]) -> list[tuple[bytes, str, str, str]]:
    return [(e.image.tobytes() if e.image else b"", e.prompt, e.answer, e.group) for e in examples]


def test_examples_are_deterministic_and_limits_are_prefixes() -> None:
    task = tasks.get_task("digits-vqa")
    many = _content(task.examples("validation", 300))
    assert many == _content(task.examples("validation", 300))
    assert many[:7] == _content(task.examples("validation", 7))
    assert len(set(many)) == 300
    assert len(task.examples("validation")) == 1024
    assert not set(many) & set(_content(task.examples("train", 300)))


def test_the_shift_is_in_the_words() -> None:
    def words(families: tuple[Family, ...], wording: Wording) -> set[str]:
        slots = {*wording.rows, *wording.columns, *wording.colours}
        return slots | {w for f in families for text in f.templates for w in text.split() if "{" not in w}

    new = words(DOWNSTREAM_FAMILIES, SHIFTED) - words(PRETRAINING_FAMILIES, PLAIN)
    assert {"numeral", "upper", "lower", "crimson", "azure", "which", "tint"} <= new
    assert all(len(e.prompt.split()) <= 12 for e in tasks.get_task("digits-vqa").examples("train", 64))


def test_unknown_task_names_value_choice_and_next_step() -> None:
    with pytest.raises(
        ConfigError, match=r"'digit-vqa' is unknown; expected one of .*digits-vqa.*did you mean"
    ) as caught:
        tasks.get_task("digit-vqa")
    assert "\n" not in str(caught.value)


def test_bad_split_limit_and_data_are_refused() -> None:
    task = tasks.get_task("digits-vqa")
    with pytest.raises(ConfigError, match="limit is 0"):
        task.examples("train", 0)
    with pytest.raises(ConfigError, match="split 'dev' is unknown"):
        task.examples("dev")  # type: ignore[arg-type]
    with pytest.raises(TaskDataError, match="leave out --data"):
        tasks.get_task("digits-vqa", Path("somewhere"))


def test_register_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_registered", {})
    built_in = type(tasks.get_task("digits-vqa"))
    mine = type("Mine", (built_in,), {"name": "mine"})
    assert tasks.register_task(mine) is mine
    assert isinstance(tasks.get_task("mine"), mine)
    assert {"digits-vqa", "mine", "vqa"} <= set(tasks.task_names())
    with pytest.raises(ConfigError, match="'mine' is taken"):
        tasks.register_task(type("Other", (built_in,), {"name": "mine"}))
    with pytest.raises(ConfigError, match="'digits-vqa' is taken"):
        tasks.register_task(built_in)
    with pytest.raises(ConfigError, match="set the class attribute 'name'"):
        tasks.register_task(type("Nameless", (Task,), {}))


def test_importing_the_registry_loads_no_heavy_library() -> None:
    heavy = "('torch', 'sklearn', 'transformers')"
    code = f"import sys, eas_search.tasks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
