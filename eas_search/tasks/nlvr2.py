"""`nlvr2`: is a sentence about two photographs true? (Suhr et al., ACL 2019).

The folder holds the data set's own files (train.json, dev.json, test1.json and the image folders), or the pyarrow files
that ViLT and METER prepare from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.skip_config import Pooling
from eas_search.tasks.arrow import SOURCE as ARROW_SOURCE
from eas_search.tasks.arrow import ArrowImage, arrow_rows
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.layouts import field, find, read_json
from eas_search.tasks.pictures import picture_tensor
from eas_search.tasks.sources import FileTask
from eas_search.tasks.texts import encode_texts

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit

SOURCE = "https://github.com/lil-lab/nlvr (folder nlvr2; the images are sent on request)"
PARTS: dict[Split, str] = {"train": "train", "validation": "dev", "test": "test1"}
LABELS = ("False", "True")


class Nlvr2Options(TaskOptions):
    """Options of `nlvr2`.

    Attributes:
        max_length: tokens after which a sentence is cut off; METER's 50.
    """

    max_length: int = 50


class Nlvr2(FileTask):
    """NLVR2 as classification of a sentence and two pictures."""

    name: ClassVar[str] = "nlvr2"
    head: ClassVar[Head] = "sequence-classification"
    num_images: ClassVar[int] = 2
    metric: ClassVar[str] = "accuracy"
    pooling: ClassVar[Pooling] = "all"
    Options: ClassVar[type[TaskOptions]] = Nlvr2Options
    from_hub: ClassVar[bool] = False
    layout: ClassVar[str] = (
        "a folder with train.json, dev.json, test1.json and the image folders train, dev and test1 "
        f"({SOURCE}), or with ViLT's nlvr2_*.arrow"
    )
    options: Nlvr2Options

    @property
    def labels(self) -> tuple[str, ...]:
        """False and True, as METER counts them."""
        return LABELS

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""
        read = self._arrow if any(self.place.glob("nlvr2_*.arrow")) else self._original
        return {split: list(read(part)) for split, part in PARTS.items()}

    def _original(self, part: str) -> Iterator[Example]:
        names = [f"{folder}{part}.json" for folder in ("", "data/", "nlvr2/data/", "nlvr/nlvr2/data/")]
        file = find(self.place, names, SOURCE)
        images = find(self.place, (part, f"images/{part}"), SOURCE)
        for number, row in enumerate(read_json(file, SOURCE, lines=True)):
            where = f"line {number + 1} of '{file}'"
            name, sentence = field(row, "identifier", str, where), field(row, "sentence", str, where)
            # Training images lie in numbered folders; the last part of a name numbers the sentences about its images.
            folder = images / str(row["directory"]) if "directory" in row else images
            pair = [folder / f"{name.rpartition('-')[0]}-img{i}.png" for i in (0, 1)]
            yield _example(pair, sentence, row.get("label"), where)

    def _arrow(self, part: str) -> Iterator[Example]:
        file = find(self.place, (f"nlvr2_{part}.arrow",), ARROW_SOURCE)
        for number, row in enumerate(arrow_rows(file, ("questions", "answers"))):
            where = f"row {number} of '{file}'"
            pair = [ArrowImage(file, f"image_{i}", number) for i in (0, 1)]
            answers = field(row, "answers", list, where)
            if len(answers) != len(field(row, "questions", list, where)):
                raise TaskDataError(f"{where} has {len(answers)} answers for its sentences; expected one for each.")
            for sentence, answer in zip(row["questions"], answers, strict=True):
                yield _example(pair, sentence, answer, where)

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Sentences as tensors [N, n], `pixel_values` [N, 2, 3, H, W], and 0 or 1 as labels [N]."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scoring import CLASS_MATCH

        require_examples(self.name, examples)
        pictures = [picture for example in examples for picture in (example.image, *example.others)]
        tensors = encode_texts(processor, [(e.prompt, None) for e in examples], self.options.max_length)
        tensors["pixel_values"] = picture_tensor(processor, pictures).unflatten(0, (len(examples), 2))
        tensors["labels"] = torch.tensor([LABELS.index(example.answer) for example in examples])
        return EncodedSplit(tensors, tuple(example.group for example in examples), CLASS_MATCH)


def _example(pair: Sequence[Path | ArrowImage], sentence: str, answer: Any, where: str) -> Example:
    said = str(answer).capitalize()
    if said not in LABELS:
        raise TaskDataError(f"{where} has label {answer!r:.40}; expected True or False.")
    return Example(pair[0], sentence, said, "all", others=(pair[1],))
