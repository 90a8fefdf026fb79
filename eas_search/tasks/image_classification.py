"""`image-classification`: a folder per class, if wanted below train, validation and test; or a hub data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.classes import ClassTask
from eas_search.tasks.pictures import picture_tensor
from eas_search.tasks.sources import column, read_rows
from eas_search.tasks.splits import NAMES

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


class ImageClassificationOptions(TaskOptions):
    """Options of `image-classification`.

    Attributes:
        image, label: columns of a hub data set or parquet file; folders need neither.
    """

    image: str = "image"
    label: str = "label"


class ImageClassification(ClassTask):
    """Classification of pictures."""

    name: ClassVar[str] = "image-classification"
    head: ClassVar[Head] = "image-classification"
    Options: ClassVar[type[TaskOptions]] = ImageClassificationOptions
    layout: ClassVar[str] = (
        "a folder with a subfolder of pictures per class, if wanted below train, validation and test, or a hub id"
    )
    options: ImageClassificationOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`. Files that are no pictures are not looked at."""
        if not self.place.exists() or self.place.is_file():
            return self._table()
        parts = {path: NAMES[path.name.lower()] for path in _folders(self.place) if path.name.lower() in NAMES}
        if not parts:
            return {"train": self._folder(self.place)}
        found: dict[Split, list[Example]] = {}
        for path, split in parts.items():
            found.setdefault(split, []).extend(self._folder(path))
        return found

    def key(self, example: Example) -> str:
        """Pictures are told apart by their files, or by their bytes."""
        return self.picture(example.image)

    def _folder(self, folder: Path) -> list[Example]:
        found = [
            Example(path, "", kind.name, kind.name)
            for kind in _folders(folder)
            for path in sorted(kind.rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise TaskDataError(f"folder '{folder}' has no pictures in subfolders; expected {self.layout}.")
        return found

    def _table(self) -> Mapping[Split, Sequence[Example]]:
        found: dict[Split, list[Example]] = {}
        for split, rows in read_rows(self.place, self.name, self.layout).items():
            for i, row in enumerate(rows):
                where = f"row {i} of '{self.place}' ({split})"
                label = str(column(row, [self.options.label], where))
                image = column(row, [self.options.image], where)
                picture = image.get("bytes") or Path(image["path"]) if isinstance(image, dict) else image
                found.setdefault(split, []).append(Example(picture, "", label, label))
        return found

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """`pixel_values` [N, 3, H, W] as the model's image processor makes them, the classes as labels [N]."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scoring import CLASS_MATCH

        require_examples(self.name, examples)
        tensors = {
            "pixel_values": picture_tensor(processor, [example.image for example in examples]),
            "labels": torch.tensor([self.class_index(example) for example in examples]),
        }
        return EncodedSplit(tensors, tuple(example.group for example in examples), CLASS_MATCH)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
