"""Block influence (Men et al., "ShortGPT: Layers in Large Language Models are More Redundant …", arXiv 2403.03853)."""

from __future__ import annotations

from eas_search.redundancy.passes import Passes
from eas_search.redundancy.similarity import cosine, mean_over_tokens


def block_influence_scores(passes: Passes) -> list[float]:
    """Minus the block influence BI = 1 − mean over tokens of cos(x, block(x)), so in [−2, 0].

    It judges the *whole* block, attention and FFN: sites of one block score the same.
    """
    means = mean_over_tokens(passes, lambda seen: cosine(seen.block_in, seen.block_out))
    return [mean - 1.0 for mean in means]
