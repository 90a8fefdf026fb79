"""Encoded examples, and the score that all answer-producing tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
TOKEN_WISE = ("input_ids", "attention_mask", "labels", "token_type_ids")


@dataclass(frozen=True)
class EncodedSplit:
    """N encoded samples.

    `tensors`: `input_ids`, `attention_mask` and `labels` [N, n], padded on the right (labels are -100 except
    on the answer's tokens and the final EOS), and, for images, `pixel_values` [N, 3, H, W] and whatever else the
    processor gives per sample. `groups`: the question family of each sample.
    """

    tensors: dict[str, Tensor]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def subset(self, n: int) -> EncodedSplit:
        """The first n samples (all, if there are fewer)."""
        return EncodedSplit({name: value[:n] for name, value in self.tensors.items()}, self.groups[:n])

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """One pass over all samples, shuffled if a generator is given; the last batch may be smaller.

        Padding that all samples of a batch share is cut off.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield _trimmed({name: value[rows] for name, value in self.tensors.items()})

    def prompts(self, n: int) -> dict[str, Tensor]:
        """The first n samples without answer and labels, padded on the *left*: input for `generate`, where
        new tokens must follow the prompt directly, and for latency measurements.
        """
        part = self.subset(n).tensors
        mask = part["attention_mask"].bool()
        first_answer = (part["labels"] != IGNORED).long().argmax(dim=1, keepdim=True)
        mask &= torch.arange(mask.shape[1]) < first_answer
        # A stable sort by "is prompt" moves the padding to the left and keeps the order of the prompt.
        order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(dim=1).max()) :]
        kept = mask.gather(1, order)
        padding = _padding_id(self.tensors)
        prompts = {name: value for name, value in part.items() if name not in TOKEN_WISE}
        prompts["input_ids"] = part["input_ids"].gather(1, order).masked_fill(~kept, padding)
        prompts["attention_mask"] = kept.long()
        if "token_type_ids" in part:
            prompts["token_type_ids"] = part["token_type_ids"].gather(1, order)
        return prompts


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are answered exactly: logits [B, n, V], labels [B, n] → bool [B].

    True where the argmax is right at every labelled position (logits at i predict token i + 1). This is
    teacher forcing, yet it equals the exact match of greedy decoding including EOS: as long as all tokens
    so far are right, the decoder sees the very prefix that teacher forcing shows; the first wrong token
    makes both comparisons fail. NaN logits count as wrong; a sample without labels is never a match.
    """
    wanted = labels[:, 1:]
    labelled = wanted != IGNORED
    shifted = logits[:, :-1]
    right = (shifted.argmax(dim=-1) == wanted) & ~shifted.isnan().any(dim=-1)
    return (right | ~labelled).all(dim=1) & labelled.any(dim=1)


def _trimmed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the columns that are padding in every row; the padding is on the right."""
    longest = int(tensors["attention_mask"].sum(dim=1).max())
    return {name: value[:, :longest] if name in TOKEN_WISE else value for name, value in tensors.items()}


def _padding_id(tensors: dict[str, Tensor]) -> int:
    """The padding token, read off the tensors; without any padding EOS serves (masked, and no image)."""
    padded = tensors["input_ids"][tensors["attention_mask"] == 0]
    return int(padded[0]) if len(padded) else int(tensors["input_ids"][0, -1])
