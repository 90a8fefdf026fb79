"""`digits-vqa`: short questions about scenes of four real handwritten digits.

A scene is a 32×32 RGB image: a 2×2 grid, one UCI scan (8×8, from scikit-learn) per cell, shifted, scaled,
slightly rotated and tinted; the four tints differ. The pretraining families ask in plain words, the
downstream families ask much the same in words that pretraining never uses ("numeral", "upper", "crimson"
…): a small, realistic domain shift. Pretraining, train, validation and test use disjoint scans. Every
example is a function of (pool, index).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from eas_search.exceptions import TaskDataError
from eas_search.tasks.answers import AnswerTask
from eas_search.tasks.base import Example, Split, limited
from eas_search.tasks.digit_scenes import POOL_SIZES, draw_scenes

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow")  # in the order of TINTS

SPLIT_SIZES: dict[Split, int] = {"train": 4096, "validation": 1024, "test": 2048}  # examples
BLOCK = 256  # examples drawn from one random stream; a limit cuts the list and changes no example


@dataclass(frozen=True)
class Wording:
    """The words that fill a template's {row}, {column}, {colour} and {other}."""

    rows: tuple[str, str]
    columns: tuple[str, str]
    colours: tuple[str, str, str, str]


@dataclass(frozen=True)
class Family:
    """One kind of question.

    `answer(digits, colours, a, b)` gets one scene's four digits and colours and two cells: a is the one asked
    about, b another one.
    """

    name: str
    templates: tuple[str, ...]
    answer: Callable[[Sequence[int], Sequence[int], int, int], str]


PLAIN = Wording(("top", "bottom"), ("left", "right"), COLOURS)
SHIFTED = Wording(("upper", "lower"), ("left", "right"), ("crimson", "green", "azure", "yellow"))


def _digit(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return DIGITS[digits[a]]


def _colour(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return COLOURS[colours[a]]


def _row(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return PLAIN.rows[a // 2]


def _column(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return PLAIN.columns[a % 2]


def _even(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return "yes" if digits[a] % 2 == 0 else "no"


def _greater(digits: Sequence[int], colours: Sequence[int], a: int, b: int) -> str:
    return "yes" if digits[a] > digits[b] else "no"


PRETRAINING_FAMILIES = (
    Family(
        "digit-at",
        (
            "what digit is at the {row} {column} ?",
            "what is the {row} {column} digit ?",
            "read the digit at the {row} {column}",
        ),
        _digit,
    ),
    Family(
        "digit-of",
        ("what digit is {colour} ?", "what is the {colour} digit ?", "read the {colour} digit"),
        _digit,
    ),
    Family(
        "colour-at",
        (
            "what color is at the {row} {column} ?",
            "what color is the {row} {column} digit ?",
            "read the color at the {row} {column}",
        ),
        _colour,
    ),
    Family(
        "row-of",
        ("is the {colour} digit at the top or bottom ?", "top or bottom for the {colour} digit ?"),
        _row,
    ),
    Family(
        "column-of",
        ("is the {colour} digit at the left or right ?", "left or right for the {colour} digit ?"),
        _column,
    ),
    Family("even-of", ("is the {colour} digit even ?", "is the digit in {colour} even ?"), _even),
    Family("even-at", ("is the {row} {column} digit even ?", "is the digit at the {row} {column} even ?"), _even),
    Family(
        "greater",
        ("is the {colour} digit greater than the {other} digit ?", "is {colour} greater than {other} ?"),
        _greater,
    ),
)

DOWNSTREAM_FAMILIES = (
    Family("numeral-at", ("which numeral sits {row} {column} ?",), _digit),
    Family("numeral-of", ("which numeral wears {colour} ?",), _digit),
    Family("tint-at", ("which tint has the {row} {column} numeral ?",), _colour),
    Family("even-numeral", ("does the {colour} numeral halve evenly ?",), _even),
)


class DigitsVqa(AnswerTask):
    """The embedded task of the demo: the downstream families, in the shifted wording."""

    name: ClassVar[str] = "digits-vqa"

    def __init__(self, data: Path | None = None, options: Mapping[str, Any] | None = None) -> None:
        if data is not None:
            raise TaskDataError(
                f"task 'digits-vqa' got the data folder '{data}' but carries its own data; leave out --data."
            )
        super().__init__(data, options)

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of the split (all: 4,096 / 1,024 / 2,048)."""
        count = limited(SPLIT_SIZES, split, limit)
        return draw_examples(DOWNSTREAM_FAMILIES, SHIFTED, split, count)


def draw_examples(families: Sequence[Family], wording: Wording, pool: str, count: int) -> list[Example]:
    """The first `count` examples on the scans of `pool`; the families take turns."""
    from PIL import Image

    found: list[Example] = []
    for block in range(-(-count // BLOCK)):
        rng = np.random.default_rng([20240315, list(POOL_SIZES).index(pool), block])
        scenes = draw_scenes(pool, BLOCK, rng)
        for i in range(BLOCK):
            family = families[i % len(families)]
            question, answer = ask(family, wording, scenes.digits[i], scenes.colours[i], rng)
            found.append(Example(Image.fromarray(scenes.pixels[i]), question, answer, family.name))
    return found[:count]


def ask(
    family: Family,
    wording: Wording,
    digits: NDArray[np.int64],
    colours: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[str, str]:
    """One question of the family about one scene (digits and colours: [4]), and its answer."""
    cell, step, choice = rng.integers((4, 3, len(family.templates))).tolist()
    other = (cell + 1 + step) % 4
    question = family.templates[choice].format(
        row=wording.rows[cell // 2],
        column=wording.columns[cell % 2],
        colour=wording.colours[colours[cell]],
        other=wording.colours[colours[other]],
    )
    return question, family.answer(digits.tolist(), colours.tolist(), cell, other)
