"""Cosine similarity of a sublayer's input and output (He et al., "What Matters in Transformers?", arXiv 2406.15786)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.redundancy.passes import Passes
from eas_search.redundancy.watch import Seen, watching
from eas_search.training import mean_loss


def similarity_scores(passes: Passes) -> list[float]:
    """Mean over tokens of cos(x, x + attention(norm1(x))), in [−1, 1]; an attention that changes little scores high.

    Padding does not count.
    """
    return mean_over_tokens(passes, lambda seen: cosine(seen.x, seen.x + seen.added))


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Of each token's vectors: [B, n, d] twice → [B, n]."""
    return F.cosine_similarity(before.float(), after.float(), dim=-1)


def mean_over_tokens(passes: Passes, value: Callable[[Seen], Tensor]) -> list[float]:
    """Mean of a per-token value [B, n] of every site over all real tokens of the batches."""
    supernet = passes.supernet
    sums, counts = [0.0] * len(supernet.sites), [0] * len(supernet.sites)
    with watching(supernet) as watchers, torch.no_grad():
        for batch in passes.batches:
            mean_loss(supernet.model, batch)
            for position, watcher in enumerate(watchers):
                total, count = watcher.seen.mean(value(watcher.seen))
                sums[position] += total
                counts[position] += count
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
