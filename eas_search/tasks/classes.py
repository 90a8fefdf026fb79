"""What tasks have in common that choose one of a fixed set of classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.skip_config import Pooling
from eas_search.tasks.base import Example, Split
from eas_search.tasks.order import in_proportion
from eas_search.tasks.sources import FileTask


class ClassTask(FileTask):
    """A task whose answers are names of classes; they become known with the data."""

    metric: ClassVar[str] = "accuracy"
    pooling: ClassVar[Pooling] = "all"

    def __init__(self, data: Any = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(data, options)
        self._labels: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes of the training examples, sorted, unless a model's order was adopted."""
        if self._labels is None:
            names = sorted({example.answer for example in self.examples("train")}, key=_natural)
            if len(names) < 2:
                raise TaskDataError(f"task '{self.name}' found only class {names}; expected two or more; check --data.")
            self._labels = tuple(names)
        return self._labels

    def adopt_labels(self, labels: Sequence[str]) -> None:
        """See `Task.adopt_labels`."""
        if sorted(labels) == sorted(self.labels):
            self._labels = tuple(labels)

    def kind(self, example: Example) -> str:
        """See `FileTask.kind`."""
        return example.answer

    def arranged(self, examples: Sequence[Example]) -> list[Example]:
        """See `FileTask.arranged`. Every limit gives the classes in their proportions, as nearly as it can."""
        return in_proportion(super().arranged(examples), self.kind)

    def class_index(self, example: Example) -> int:
        """Position of the example's class. Raises TaskDataError for one that no training example has."""
        if example.answer not in self.labels:
            raise TaskDataError(
                f"class '{example.answer}' of task '{self.name}' has no training example; expected one of "
                f"{', '.join(self.labels[:8])}; check the splits of --data."
            )
        return self.labels.index(example.answer)

    @abstractmethod
    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers in the order of their values, before names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
