"""Splits that a data set lacks: set apart from its training examples, always in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import SPLITS, Split

T = TypeVar("T")
SHARE = 10  # one in ten of the training examples becomes the split that is missing
NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_named(text: str) -> Split | None:
    """The split that a file or folder name speaks of: "slake_test.json" → "test"; None if it names none."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    return next((NAMES[word] for word in words if word in NAMES), None)


def complete(
    name: str, found: Mapping[Split, Sequence[T]], key: Callable[[T], str]
) -> tuple[dict[Split, list[T]], str | None]:
    """All three splits, and a sentence on what was set apart (None: nothing).

    Examples of one key (the same picture, say) stay together, and which key goes where depends on the keys alone.

    Args:
        name: of the task.
        found: what the data has; everything it does not name a split for belongs under `train`.
        key: what makes two examples belong together.

    Raises:
        TaskDataError: there is no training example, or too few to set some apart.
    """
    splits: dict[Split, list[T]] = {split: list(found.get(split, ())) for split in SPLITS}
    missing = [split for split in SPLITS if not splits[split]]
    if "train" in missing:
        raise TaskDataError(f"task '{name}' found no training examples; expected some; check --data.")
    if not missing:
        return splits, None
    keys = sorted({key(example) for example in splits["train"]}, key=_digest)
    size = max(1, len(keys) // SHARE)
    if len(keys) < 1 + len(missing):
        raise TaskDataError(
            f"task '{name}' has no {missing[0]} split and only {len(keys)} distinct training example(s) to set some "
            "apart from; expected more; add data."
        )
    for position, split in enumerate(missing):
        chosen = set(keys[position * size : (position + 1) * size])
        splits[split] = [example for example in splits["train"] if key(example) in chosen]
    gone = set(keys[: len(missing) * size])
    splits["train"] = [example for example in splits["train"] if key(example) not in gone]
    parts = " and ".join(f"{len(splits[split])} for {split}" for split in missing)
    note = f"the data has no {' and no '.join(missing)} split: set apart from its training examples were {parts}"
    return splits, note


def divided(examples: Sequence[T], first: int | None, second: int | None) -> tuple[list[T], list[T], str | None]:
    """Two disjoint parts of a validation split, for search and selection, and a sentence if it is too small for both.

    A split that cannot give as many as wanted is divided in the proportion of the wishes; a single example has to serve
    for both.

    Args:
        examples: in the order of the split; the first part comes first.
        first, second: how many are wanted; None: all there are.

    Raises:
        TaskDataError: there is no example.
    """
    count = len(examples)
    if count == 0:
        raise TaskDataError("the validation split is empty; expected at least one example: check --data.")
    wanted = [count if size is None else size for size in (first, second)]
    if sum(wanted) <= count:
        return list(examples[: wanted[0]]), list(examples[wanted[0] : sum(wanted)]), None
    if count == 1:
        return list(examples), list(examples), "the one validation example serves both search and selection"
    cut = min(count - 1, max(1, count * wanted[0] // sum(wanted)))
    note = f"the {count} validation examples are divided: {cut} for the search, {count - cut} for the selection"
    return list(examples[:cut]), list(examples[cut:]), note


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
