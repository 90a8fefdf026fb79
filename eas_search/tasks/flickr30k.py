"""`flickr30k`: which of several captions fits a photograph, and which photograph a caption (Karpathy's split).

The folder holds Karpathy's dataset_flickr30k.json and the images, or the pyarrow files that ViLT and METER prepare.

A search needs a score per sample, and all pairs of a test set are too many to score in every trial. So the examples of
a split stand in a fixed order, first captions of all images before second ones, and are cut into pools of `pool` in a
row, whose images all differ; a sample scores by whether its own caption and its own image are the ones that fit best
among those of its pool. `retrieval.recalls` gives recall at 1, 5 and 10 over all pairs, as it is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.skip_config import Pooling
from eas_search.tasks.arrow import SOURCE as ARROW_SOURCE
from eas_search.tasks.arrow import ArrowImage, arrow_rows
from eas_search.tasks.base import SPLITS, Example, Split, TaskOptions, require_examples
from eas_search.tasks.layouts import field, find, read_json
from eas_search.tasks.pictures import picture_tensor
from eas_search.tasks.sources import FileTask
from eas_search.tasks.splits import NAMES
from eas_search.tasks.texts import encode_texts

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit

SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent (captions and split)"
IMAGES = "https://shannon.cs.illinois.edu/DenotationGraph (the images of Flickr30k, on request)"
Captioned = tuple[Path | ArrowImage, tuple[str, ...]]


class Flickr30kOptions(TaskOptions):
    """Options of `flickr30k`.

    Attributes:
        pool: candidates to choose from, which are also those of a training step; METER trains with 16.
        direction: what a sample scores by: finding its caption (`text`), its image (`image`), or the mean of both.
        max_length: tokens after which a caption is cut off; METER's 50.
    """

    pool: int = Field(default=8, ge=2)
    direction: Literal["both", "text", "image"] = "both"
    max_length: int = 50


class Flickr30k(FileTask):
    """Retrieval within pools of captions and images."""

    name: ClassVar[str] = "flickr30k"
    head: ClassVar[Head] = "image-text-retrieval"
    metric: ClassVar[str] = "pool R@1"
    pooling: ClassVar[Pooling] = "all"
    Options: ClassVar[type[TaskOptions]] = Flickr30kOptions
    from_hub: ClassVar[bool] = False
    layout: ClassVar[str] = (
        f"a folder with dataset_flickr30k.json ({SOURCE}) and flickr30k-images, or with ViLT's "
        "f30k_caption_karpathy_*.arrow"
    )
    options: Flickr30kOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""
        return {split: list(pooled(images, self.options.pool)) for split, images in self.captioned().items()}

    def arranged(self, examples: Sequence[Example]) -> list[Example]:
        """See `FileTask.arranged`. The order of the data set makes the pools, and is no order by content."""
        return list(examples)

    def captioned(self) -> dict[Split, list[Captioned]]:
        """Every image with its captions, by split. Raises TaskDataError."""
        found = self._arrow() if any(self.place.glob("f30k_*.arrow")) else self._original()
        for split in SPLITS:
            if (count := len(found.get(split, ()))) < self.options.pool:
                raise TaskDataError(
                    f"split {split} in '{self.place}' has {count} images; expected at least as many as stand in a "
                    f"pool, {self.options.pool}: lower the option 'pool' or complete the data."
                )
        return found

    def _original(self) -> dict[Split, list[Captioned]]:
        name = "dataset_flickr30k.json"
        file = find(self.place, (name, f"karpathy/{name}"), SOURCE)
        folder = find(self.place, ("flickr30k-images", "flickr30k_images", "images"), IMAGES)
        found: dict[Split, list[Captioned]] = {}
        for number, row in enumerate(field(read_json(file, SOURCE), "images", list, f"'{file}'")):
            where = f"image {number} of '{file}'"
            said = field(row, "sentences", list, where)
            captions = tuple(field(sentence, "raw", str, where) for sentence in said)
            split = NAMES.get(field(row, "split", str, where))
            if split is None or not captions:
                raise TaskDataError(f"{where} has no caption or split {row['split']!r}; expected train, val or test.")
            found.setdefault(split, []).append((folder / field(row, "filename", str, where), captions))
        return found

    def _arrow(self) -> dict[Split, list[Captioned]]:
        found: dict[Split, list[Captioned]] = {}
        for part in ("train", "val", "test"):
            file = find(self.place, (f"f30k_caption_karpathy_{part}.arrow",), ARROW_SOURCE)
            for number, row in enumerate(arrow_rows(file, ("caption",))):
                captions = tuple(field(row, "caption", list, f"row {number} of '{file}'"))
                found.setdefault(NAMES[part], []).append((ArrowImage(file, "image", number), captions))
        return found

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """The pool's captions [N, C, n], `pixel_values` [N, 3, H, W] of the own image, its caption's place [N]."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.retrieval import pool_ranking

        require_examples(self.name, examples)
        captions = [(caption, None) for example in examples for caption in example.choices]
        flat = encode_texts(processor, captions, self.options.max_length)
        tensors = {name: value.unflatten(0, (len(examples), -1)) for name, value in flat.items()}
        places: dict[Any, int] = {}
        for example in examples:
            for picture in (example.image, *example.others):
                places.setdefault(picture, len(places))
        pictures = picture_tensor(processor, list(places))
        tensors["pixel_values"] = pictures[[places[example.image] for example in examples]]
        tensors["labels"] = torch.tensor([example.choices.index(example.answer) for example in examples])
        table = torch.tensor([[places[picture] for picture in example.others] for example in examples])
        groups = tuple(example.group for example in examples)
        scoring = pool_ranking(self.metric, pictures, self.options.direction)
        return EncodedSplit(tensors, groups, scoring, {"pictures": table})


def pooled(images: Sequence[Captioned], size: int) -> Iterator[Example]:
    """Examples with their pools: `choices` are its captions, `others` its images; the own ones stand at one place.

    All first captions come before all second ones; the last pool of such a round is filled up from its beginning. In a
    round, a caption that an earlier image has word for word is left out, and so is a round shorter than a pool.
    """
    for turn in range(max(len(captions) for _, captions in images)):
        first: dict[str, Path | ArrowImage] = {}
        for image, captions in images:
            if len(captions) > turn:
                first.setdefault(captions[turn], image)
        fitting = list(first.items())
        for start in range(0, len(fitting), size) if len(fitting) >= size else ():
            pool = [fitting[(start + i) % len(fitting)] for i in range(size)]
            choices, others = tuple(caption for caption, _ in pool), tuple(picture for _, picture in pool)
            for caption, image in pool[: len(fitting) - start]:
                yield Example(image, "", caption, "all", choices, others=others)
