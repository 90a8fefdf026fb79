"""What a task is: labelled examples per split, their encoding for one model's processor, and how answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from eas_search.exceptions import ConfigError, TaskDataError
from eas_search.models.options import Head
from eas_search.skip_config import Pooling, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from eas_search.tasks.arrow import ArrowImage
    from eas_search.tasks.encoding import EncodedSplit

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        image: a picture, or its file (or that file's bytes), opened when it is encoded; None for text alone.
        prompt: what is asked.
        answer: what is right: a text, or the name of a class or choice.
        group: the family that scores are broken down by.
        choices: the answers to choose from, if they are part of the question.
        pair: a second text that belongs to the prompt, if there is one.
        others: further pictures: those to be compared with the first one, or to choose from.
        worth: answers with what each scores, from 0 to 1, where people disagree about the right one.
    """

    image: Image | Path | bytes | ArrowImage | None
    prompt: str
    answer: str
    group: str
    choices: tuple[str, ...] = ()
    pair: str | None = None
    others: tuple[Image | Path | bytes | ArrowImage, ...] = ()
    worth: tuple[tuple[str, float], ...] = ()


class TaskOptions(BaseModel):
    """Options of a task; a subclass declares a field per option. An unknown one is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(ABC):
    """A downstream task. Subclasses set `name` and are registered with `register_task`.

    Attributes:
        name: how the task is called on the command line.
        head: what the model must end in.
        num_images: pictures per example, for models that are built for one number of them.
        metric: name of the score in tables; every sample's score is from 0 to 1, higher is better.
        pooling: over which tokens the PIAs of an encoder pool unless the user says otherwise. Those of a decoder do
            not: training makes up for it, and a mean over the prompt would need every token of it to the end (`asked`).
        Options: model of the task's options.
        data: file, folder or hub id that the user gave; a task that carries its own data refuses one.
        notes: one sentence each on what a reader of the figures must know about the data.
    """

    name: ClassVar[str]
    head: ClassVar[Head] = "generation"
    num_images: ClassVar[int] = 1
    metric: ClassVar[str] = "exact match"
    pooling: ClassVar[Pooling] = "none"
    Options: ClassVar[type[TaskOptions]] = TaskOptions

    def __init__(self, data: Path | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Check where the data is and what the options are; nothing large is read yet.

        Raises:
            ConfigError: an unknown or unusable option.
            TaskDataError: there is no such data.
        """
        self.data = data
        self.options = read_options(self.name, self.Options, options or {})
        self.notes: list[str] = []

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the model's outputs; None where answers are no classes."""
        return None

    def adopt_labels(self, labels: Sequence[str]) -> None:  # noqa: B027  (nothing to do where there are no classes)
        """Take the order of a model that was made for exactly these classes; other labels are ignored."""

    @abstractmethod
    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of a split (None: all), always the same ones in the same order.

        Raises ConfigError for an unknown split or a limit below 1, TaskDataError for missing or malformed
        data.
        """

    @abstractmethod
    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Tensors for the model that `processor` belongs to, and how its answers to them are scored.

        Raises TaskDataError if they do not fit together.
        """


def read_options(name: str, model: type[TaskOptions], given: Mapping[str, Any]) -> Any:
    """The options of task `name`, validated.

    Raises:
        ConfigError: in one line, an option that does not exist or has an unusable value.
    """
    known = list(model.model_fields)
    if unknown := [str(key) for key in given if key not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "leave it out."
        expected = f"expected one of {', '.join(known)}" if known else "this task has none"
        raise ConfigError(f"option '{unknown[0]}' of task '{name}' is unknown; {expected}; {hint}")
    try:
        return model(**given)
    except ValidationError as error:
        raise ConfigError(one_line(error, f"options of task '{name}'")) from error


def limited(sizes: Mapping[Split, int], split: str, limit: int | None) -> int:
    """How many examples to deliver: `limit`, but no more than the split has. Raises ConfigError."""
    if split not in SPLITS:
        raise ConfigError(f"split '{split}' is unknown; expected one of {', '.join(SPLITS)}; choose one of these.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 example; raise it or leave it out for all.")
    size = sizes[split]
    return size if limit is None else min(limit, size)


def require_examples(name: str, examples: Sequence[Example]) -> None:
    """Raises TaskDataError if there are none."""
    if not examples:
        raise TaskDataError(f"task '{name}' got 0 examples to encode; expected at least 1; check the split's data.")
