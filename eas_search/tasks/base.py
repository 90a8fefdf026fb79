"""What a task is: labelled examples per split, and their encoding for one model's processor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from eas_search.exceptions import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from eas_search.tasks.encoding import EncodedSplit

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """One labelled example. `group` names the family that scores are broken down by."""

    image: Image | None
    prompt: str
    answer: str
    group: str


class Task(ABC):
    """A downstream task. Subclasses set `name` and are registered with `register_task`.

    `data` is the folder that the user gave; a task that carries its own data refuses one.
    """

    name: ClassVar[str]

    def __init__(self, data: Path | None = None) -> None:
        self.data = data

    @abstractmethod
    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of a split (None: all), always the same ones in the same order.

        Raises ConfigError for an unknown split or a limit below 1, TaskDataError for missing or malformed
        data.
        """

    @abstractmethod
    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Tensors for the model that `processor` belongs to. Raises TaskDataError if they do not fit
        together.
        """


def limited(sizes: Mapping[Split, int], split: str, limit: int | None) -> int:
    """How many examples to deliver: `limit`, but no more than the split has. Raises ConfigError."""
    known = get_args(Split)
    if split not in known:
        raise ConfigError(f"split '{split}' is unknown; expected one of {', '.join(known)}; choose one of these.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 example; raise it or leave it out for all.")
    size = sizes[split]  # type: ignore[index]  # checked against the literal above
    return size if limit is None else min(limit, size)
