"""The order of a split's examples, of which a limit takes the first.

Files are often sorted, by class, by source or by difficulty, and their first rows would be one class. So what is taken
first is decided by a digest of what an example holds: neither the order of the rows, nor a seed, nor the machine
changes it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def digest(text: str) -> str:
    """SHA-256 of a text; what is no valid Unicode counts as well."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def by_digest(examples: Sequence[T], content: Callable[[T], str]) -> list[T]:
    """The examples in an order that is as good as random and that their contents alone decide.

    Equal ones are numbered, so that they do not stand side by side.
    """
    seen: Counter[str] = Counter()
    ranked = []
    for example in examples:
        own = digest(content(example))
        ranked.append((digest(f"{own} {seen[own]}"), example))
        seen[own] += 1
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])]


def in_runs(examples: Sequence[T], content: Callable[[T], str], length: int) -> list[T]:
    """Runs of `length` examples that follow each other, the runs in the order of `by_digest`."""
    runs = [examples[start : start + length] for start in range(0, len(examples), length)]
    ordered = by_digest(runs, lambda run: "\n".join(content(example) for example in run))
    return [example for run in ordered for example in run]


def in_proportion(examples: Sequence[T], kind: Callable[[T], object]) -> list[T]:
    """Every class spread evenly over the whole, so that any first part has the classes in their proportions.

    Where a class begins is decided by a digest of its name, or all classes of one size would come at once. Within a
    class the examples stay in their order.
    """
    sizes, seen = Counter(kind(example) for example in examples), Counter[object]()
    begins = {own: int(digest(str(own))[:12], 16) / 16**12 for own in sizes}
    ranked = []
    for example in examples:
        own = kind(example)
        ranked.append(((seen[own] + begins[own]) / sizes[own], example))
        seen[own] += 1
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])]
