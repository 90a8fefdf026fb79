"""Prompts cut out of labelled sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from eas_search.tasks.scores import IGNORED

KINDS = ("mm_token_type_ids", "token_type_ids")  # what a token stands for: 0 for text, others for an image's
TOKEN_WISE = ("input_ids", "attention_mask", "labels", *KINDS)


def left_prompts(inputs: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    """The tokens before the first label, moved to the right end; whatever else the model gets stays as it is."""
    mask = inputs["attention_mask"].bool()
    first_answer = (inputs["labels"] != IGNORED).long().argmax(dim=1, keepdim=True)
    mask &= torch.arange(mask.shape[1], device=mask.device) < first_answer
    # A stable sort by "is prompt" moves the padding to the left and keeps the order of the prompt.
    order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(dim=1).max()) :]
    kept = mask.gather(1, order)
    ids = inputs["input_ids"].gather(1, order).masked_fill(~kept, padding)
    prompts = {"input_ids": ids, "attention_mask": kept.long()}
    for name in KINDS:
        if name in inputs:
            prompts[name] = inputs[name].gather(1, order).masked_fill(~kept, 0)
    return prompts | {name: value for name, value in inputs.items() if name not in TOKEN_WISE}
