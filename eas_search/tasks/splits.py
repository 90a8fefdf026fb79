"""Splits that a data set lacks: set apart from its training examples, always in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TypeVar

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import SPLITS, Split
from eas_search.tasks.order import digest

T = TypeVar("T")
SHARE = 10  # one in ten of the training examples becomes the split that is missing
NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}


def split_named(text: str) -> Split | None:
    """The split that a file or folder name speaks of: "slake_test.json" → "test"; None if it names none."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    return next((NAMES[word] for word in words if word in NAMES), None)


def complete(
    name: str,
    found: Mapping[Split, Sequence[T]],
    key: Callable[[T], str],
    kind: Callable[[T], str | None] = lambda example: None,
) -> tuple[dict[Split, list[T]], str | None]:
    """All three splits, and a sentence on what was set apart (None: nothing).

    Examples of one key (the same picture, say) stay together, and which key goes where depends on the keys alone; but
    of every class some example stays in training, or nothing could be learnt of it.

    Args:
        name: of the task.
        found: what the data has; everything it does not name a split for belongs under `train`.
        key: what makes two examples belong together.
        kind: class of an example; None where there are no classes.

    Raises:
        TaskDataError: there is no training example, or too few to set some apart.
    """
    splits: dict[Split, list[T]] = {split: list(found.get(split, ())) for split in SPLITS}
    missing = [split for split in SPLITS if not splits[split]]
    if "train" in missing:
        raise TaskDataError(f"task '{name}' found no training examples; expected some; check --data.")
    if not missing:
        return splits, None
    kinds: dict[str, set[str]] = {}
    keyed = [(key(example), example) for example in splits["train"]]
    for own, example in keyed:
        names = kinds.setdefault(own, set())
        if (named := kind(example)) is not None:
            names.add(named)
    keys = sorted(kinds, key=digest)
    if len(keys) < 1 + len(missing):
        raise TaskDataError(
            f"task '{name}' has no {missing[0]} split and only {len(keys)} distinct training example(s) to set some "
            "apart from; expected more; add data."
        )
    free = _dispensable(keys, kinds, max(1, len(keys) // SHARE) * len(missing))
    size = len(free) // len(missing)
    if size == 0:
        raise TaskDataError(
            f"task '{name}' has no {missing[0]} split, and of its training examples only {len(free)} can be set apart "
            "without leaving a class without any; expected more examples of a class; add data."
        )
    for position, split in enumerate(missing):
        chosen = set(free[position * size : (position + 1) * size])
        splits[split] = [example for own, example in keyed if own in chosen]
    gone = set(free[: len(missing) * size])
    splits["train"] = [example for own, example in keyed if own not in gone]
    parts = " and ".join(f"{len(splits[split])} for {split}" for split in missing)
    note = f"the data has no {' and no '.join(missing)} split: set apart from its training examples were {parts}"
    return splits, note


def _dispensable(keys: Sequence[str], kinds: Mapping[str, Set[str]], wanted: int) -> list[str]:
    """The first `wanted` keys, or as many as there are, without which every class still has one that stays."""
    left = Counter(kind for names in kinds.values() for kind in names)
    found: list[str] = []
    for key in keys:
        if len(found) == wanted:
            break
        if all(left[kind] > 1 for kind in kinds[key]):
            left.subtract(kinds[key])
            found.append(key)
    return found


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
