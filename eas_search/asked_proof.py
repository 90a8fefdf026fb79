"""The proof of `asked`: where only some tokens are computed at the end of a stack, these come out as they would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eas_search.asked import only_labelled
from eas_search.distillation import judged
from eas_search.exceptions import UnsupportedModelError
from eas_search.models.calling import last_logits, without_cache


@torch.no_grad()
def labels_suffice(student: Any, batch: dict[str, Tensor], tolerance: float) -> bool:
    """Whether a student's loss, and the logits that predict a label, need no token that only other logits need.

    Args:
        student: the more it skips, the more this says.
        batch: with labels, or the answer is no.
        tolerance: of these logits, relative to the largest of them, and of the loss.
    """
    if "labels" not in batch:
        return False
    every = student(**batch, **without_cache(student))
    with only_labelled():
        some = student(**batch, **without_cache(student))
    if some.loss is None or not isinstance(getattr(some, "logits", None), Tensor):
        return False
    rows = judged(student, batch, every.logits)
    wanted, given = every.logits[rows], some.logits[rows]
    within = (wanted - given).abs().max() <= tolerance * wanted.abs().max()
    return bool(within & ((every.loss - some.loss).abs() <= tolerance * every.loss.abs().clamp(min=1.0)))


@torch.no_grad()
def prove_last_logits(student: Any, batch: dict[str, Tensor], tolerance: float) -> None:
    """Check that the last position's logits are the same whether or not others are asked for.

    Args:
        student: the more it skips, the more this says.
        batch: prompts.
        tolerance: relative to the largest of these logits.

    Raises:
        UnsupportedModelError: they are not, so that something in the model mixes tokens behind the last attention.
    """
    alone = last_logits(student)
    if not alone:
        return
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    every = student(**inputs, **without_cache(student)).logits[:, -1:]
    last = student(**inputs, **without_cache(student), **alone).logits
    difference = (every - last).abs().max().item()
    if not difference <= tolerance * every.abs().max().item():
        raise UnsupportedModelError(
            f"{type(student).__name__} mixes tokens where nothing attends: its last logits differ by {difference:.2g} "
            "when they are computed alone; expected blocks that treat every token by itself: choose pooling 'prompt'"
        )
