"""`vqav2`: questions about photographs, classified among frequent answers (Goyal et al., CVPR 2017).

The folder holds the data set's own files (questions, annotations and the image folders of MS COCO), or the pyarrow
files that ViLT and METER prepare from them. The target of an answer is its VQA accuracy among the ten annotators. The
answers of the official test are not public, so a test split is set apart from the training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.skip_config import Pooling
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.pictures import picture_tensor
from eas_search.tasks.sources import FileTask
from eas_search.tasks.texts import encode_texts
from eas_search.tasks.vqav2_files import VQAV2, read_arrow, read_original

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit


class VqaV2Options(TaskOptions):
    """Options of `vqav2`.

    Attributes:
        least: how often an answer must be the commonest one to a question of the annotated data to be a class; 9 gives
            METER's 3,129. Arrow files bring their classes along.
        max_length: tokens after which a question is cut off; METER's 50.
    """

    least: int = 9
    max_length: int = 50


class VqaV2(FileTask):
    """VQAv2 as classification with soft targets."""

    name: ClassVar[str] = "vqav2"
    head: ClassVar[Head] = "visual-question-answering"
    metric: ClassVar[str] = "VQA accuracy"
    pooling: ClassVar[Pooling] = "all"
    Options: ClassVar[type[TaskOptions]] = VqaV2Options
    from_hub: ClassVar[bool] = False
    layout: ClassVar[str] = VQAV2
    options: VqaV2Options

    def __init__(self, data: Any = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(data, options)
        self._labels: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers to choose from, in the order of the published classes unless a model's order was adopted."""
        self.examples("train", 1)  # they become known with the data
        return self._labels

    def adopt_labels(self, labels: Sequence[str]) -> None:
        """See `Task.adopt_labels`."""
        if sorted(labels) == sorted(self.labels):
            self._labels = tuple(labels)

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`. Questions without any answer among the classes are kept; nothing scores there."""
        arrow = any(self.place.glob("vqav2_*.arrow"))
        found, labels = read_arrow(self.place) if arrow else read_original(self.place, self.options.least)
        if len(labels) < 2:
            raise TaskDataError(
                f"task '{self.name}' found {len(labels)} answer(s) that occur {self.options.least} times or more in "
                f"'{self.place}'; expected two or more: lower the option 'least'."
            )
        self._labels = labels
        return found

    def key(self, example: Example) -> str:
        """Questions about one picture stay together."""
        return self.picture(example.image)

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Questions as tensors [N, n], `pixel_values` [N, 3, H, W], and as labels what every class scores [N, C]."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scoring import CLASS_WORTH

        require_examples(self.name, examples)
        place = {answer: column for column, answer in enumerate(self.labels)}
        labels = torch.zeros(len(examples), len(place))
        for row, example in enumerate(examples):
            for answer, score in example.worth:
                if answer in place:
                    labels[row, place[answer]] = score
        tensors = encode_texts(processor, [(e.prompt, None) for e in examples], self.options.max_length)
        tensors["pixel_values"] = picture_tensor(processor, [example.image for example in examples])
        tensors["labels"] = labels
        return EncodedSplit(tensors, tuple(example.group for example in examples), CLASS_WORTH)
