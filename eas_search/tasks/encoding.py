"""Encoded examples: tensors by name, in batches, and without their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eas_search.tasks.prompts import TOKEN_WISE, left_prompts
from eas_search.tasks.scoring import EXACT_MATCH, Scoring


@dataclass(frozen=True)
class EncodedSplit:
    """N encoded samples.

    Attributes:
        tensors: what the model's forward takes, one row per sample. Texts have `input_ids` and `attention_mask` [N, n]
            (choices: [N, C, n]), padded on the right. `labels` are [N, n] where tokens are predicted (-100 except on
            the answer's tokens), else the class [N], or in floating point what every class is worth [N, classes].
            Images have `pixel_values` [N, 3, H, W] and whatever else the processor gives per image with one row.
        groups: the family of each sample.
        scoring: how the model's answers become scores.
        extras: what `scoring` needs beside the tensors, one row per sample; never given to the model.
        with_image: [N] bool, which samples have an image, where only some have; the others' rows are not given to the
            model. None: all or none.
        ragged: what else the forward takes, sample by sample: tensors with any number of rows (an image's patches
            [p, d], its parts [1, images, 3, H, W]), None where there is none. A batch gets them below each other.
    """

    tensors: dict[str, Tensor]
    groups: tuple[str, ...]
    scoring: Scoring = EXACT_MATCH
    extras: dict[str, Tensor] = field(default_factory=dict)
    with_image: Tensor | None = None
    ragged: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def subset(self, n: int) -> EncodedSplit:
        """The first n samples (all, if there are fewer)."""
        return self.part(0, n)

    def part(self, start: int, end: int) -> EncodedSplit:
        """Samples `start` to `end` (exclusive), as far as there are any."""
        return self._rows(torch.arange(start, min(end, len(self))))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """One pass over all samples, shuffled if a generator is given; the last batch may be smaller.

        Padding that all samples of a batch share is cut off.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield self._rows(rows)._inputs()

    def scored_batches(self, batch_size: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """One pass in order: (what the model gets, what its answers are scored with)."""
        for rows in torch.arange(len(self)).split(batch_size):
            part = self._rows(rows)
            yield part._inputs(), part.extras

    def prompts(self, n: int) -> dict[str, Tensor]:
        """At most n samples without answers and labels: input for latency measurements, and for `generate`.

        Where answers are generated the prompts are padded on the *left*, because new tokens must follow the prompt
        directly. Where only some samples have an image, these are taken.
        """
        chosen = torch.arange(len(self)) if self.with_image is None else self.with_image.nonzero().flatten()
        inputs = self._rows(chosen[:n])._inputs()
        if self.scoring.answers_follow:
            return left_prompts(inputs, self._padding)
        return {name: value for name, value in inputs.items() if name != "labels"}

    @property
    def tokens(self) -> int:
        """Length of the longest sample in tokens, over all of its choices; 1 without text."""
        return self.tensors["input_ids"][0].numel() if "input_ids" in self.tensors else 1

    @cached_property
    def _padding(self) -> int:
        """The padding token, read off the tensors; without any padding EOS serves (masked, and no image)."""
        padded = self.tensors["input_ids"][self.tensors["attention_mask"] == 0]
        return int(padded[0]) if len(padded) else int(self.tensors["input_ids"].flatten()[-1])

    def _rows(self, rows: Tensor) -> EncodedSplit:
        return EncodedSplit(
            {name: value[rows] for name, value in self.tensors.items()},
            tuple(self.groups[row] for row in rows.tolist()),
            self.scoring,
            {name: value[rows] for name, value in self.extras.items()},
            None if self.with_image is None else self.with_image[rows],
            {name: tuple(pieces[row] for row in rows.tolist()) for name, pieces in self.ragged.items()},
        )

    def _inputs(self) -> dict[str, Tensor]:
        """The tensors as the model gets them: shared padding cut, no rows for images that are not there."""
        tensors = self.tensors
        if "attention_mask" in tensors:
            longest = int(tensors["attention_mask"].sum(dim=-1).max())
            cut = {
                n for n in TOKEN_WISE if n in tensors and tensors[n].dim() > 1 and not tensors[n].is_floating_point()
            }
            tensors = {name: value[..., :longest] if name in cut else value for name, value in tensors.items()}
        # A batch without any image has no tensor for images at all.
        if self.with_image is not None:
            kept = {name for name in tensors if name in TOKEN_WISE or bool(self.with_image.any())}
            tensors = {n: v if n in TOKEN_WISE else v[self.with_image] for n, v in tensors.items() if n in kept}
        there = {name: [p for p in pieces if p is not None] for name, pieces in self.ragged.items()}
        return {**tensors, **{name: joined(pieces) for name, pieces in there.items() if pieces}}


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors below each other; where their further sizes differ, zeros fill up the smaller ones."""
    sizes = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    whole = pieces[0].new_zeros(sum(map(len, pieces)), *sizes)
    start = 0
    for piece in pieces:
        whole[(slice(start, start + len(piece)), *map(slice, piece.shape[1:]))] = piece
        start += len(piece)
    return whole
