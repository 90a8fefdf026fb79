"""Learning from the intact model: which of its predictions count, and how far a student's are from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.masks import IGNORED_LABEL, predicting


def judged(model: Any, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Which of the logits' rows predict a label, bool of the logits' shape without the last dimension.

    They are those of answer tokens, or of a row's class; without labels all real tokens.

    Args:
        model: a student.
        batch: what it was given.
        logits: [B, classes] or [B, n, vocabulary].
    """
    labels = batch.get("labels")
    if logits.dim() == 2 or labels is None or labels.shape != logits.shape[:2]:
        mask = batch.get("attention_mask")
        whole = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return mask.bool() if mask is not None and mask.shape == whole.shape else whole
    behind_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if any(site.causal for site in model.eas.sites) and not behind_encoder:
        return predicting(labels)
    return labels != IGNORED_LABEL


def distilled_loss(
    student: Any, batch: dict[str, Tensor], logits: Tensor, intact: Tensor, temperature: float = 1.0
) -> Tensor:
    """T² · KL(softmax(intact / T) ‖ softmax(logits / T)), the mean over the judged predictions, in nats.

    T² keeps the gradient's size (Hinton et al., "Distilling the knowledge in a neural network", 2015).

    Args:
        student: whose logits they are.
        batch: what both models were given.
        logits: the student's.
        intact: the teacher's, of the same shape.
        temperature: T.
    """
    rows = judged(student, batch, logits)
    own, target = (F.log_softmax(values[rows].float() / temperature, dim=-1) for values in (logits, intact))
    return temperature**2 * F.kl_div(own, target, reduction="batchmean", log_target=True)
