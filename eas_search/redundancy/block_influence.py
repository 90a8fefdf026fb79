"""Block influence (Men et al., "ShortGPT: Layers in Large Language Models are More Redundant …", arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eas_search.redundancy.similarity import cosine, mean_over_tokens
from eas_search.supernet import Supernet


def block_influence_scores(supernet: Supernet, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Minus the block influence BI = 1 − mean over tokens of cos(x, block(x)), so in [−2, 0].

    It judges the *whole* block, attention and FFN: sites of one block score the same.
    """
    means = mean_over_tokens(supernet, batches, lambda seen: cosine(seen.block_in, seen.block_out))
    return [mean - 1.0 for mean in means]
