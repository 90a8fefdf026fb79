"""Leave one out, judged by the predictions: how far they move from the intact model's when one attention is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.distillation import judged
from eas_search.models.calling import without_cache
from eas_search.supernet import Supernet
from eas_search.training import on_device


@torch.no_grad()
def kl_scores(supernet: Supernet, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Minus KL(intact ‖ without the site), in nats per prediction; at most 0 but for rounding.

    Only predictions that the task judges count: those of answer tokens, or of a row's class. Unlike the loss it does
    not ask whether the intact model is right.
    """
    sums, count = [0.0] * len(supernet.sites), 0
    training = supernet.model.training
    supernet.model.eval()
    for batch in batches:
        supernet.set_skips(())
        intact = _predictions(supernet, batch)
        count += len(intact)
        for position, site in enumerate(supernet.sites):
            supernet.set_skips((site.index,))
            without = _predictions(supernet, batch)
            sums[position] += float((intact.exp() * (intact - without)).nan_to_num(0.0).sum())
    supernet.set_skips(())
    supernet.model.train(training)
    return [-total / max(1, count) for total in sums]


def _predictions(supernet: Supernet, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the judged predictions, [predictions, classes], float32."""
    model: Any = supernet.model
    moved = on_device(batch, model)
    logits: Tensor = model(**moved, **without_cache(model)).logits
    return F.log_softmax(logits[judged(model, moved, logits)].float(), dim=-1)
