"""Cosine similarity of a sublayer's input and output (He et al., "What Matters in Transformers?", 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.supernet import Supernet
from eas_search.training import mean_loss


def similarity_scores(supernet: Supernet, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Mean over tokens of cos(x, x + attention(norm1(x))), in [−1, 1]; an attention that changes little scores high.

    Padding does not count.
    """
    sums = [0.0] * len(supernet.sites)
    counts = [0] * len(supernet.sites)
    handles = []
    for position, site in enumerate(supernet.sites):
        inputs: list[Tensor] = []

        def start(_: nn.Module, args: tuple[Any, ...], inputs: list[Tensor] = inputs) -> None:
            inputs[:] = [args[0]]

        def second_norm(
            _: nn.Module, args: tuple[Any, ...], inputs: list[Tensor] = inputs, position: int = position
        ) -> None:
            cosine = F.cosine_similarity(inputs[0].float(), args[0].float(), dim=-1)
            real = supernet.block(supernet.sites[position]).eas_context.mask
            cosine = cosine if real is None else cosine[real]
            sums[position] += float(cosine.sum())
            counts[position] += cosine.numel()

        block = supernet.block(site)
        handles.append(block.register_forward_pre_hook(start))
        handles.append(getattr(block, site.pattern.norm2).register_forward_pre_hook(second_norm))
    supernet.set_skips(())
    try:
        with torch.no_grad():
            for batch in batches:
                mean_loss(supernet.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
