"""Which tokens are real and which belong to the prompt, read from the masks that models of `transformers` pass on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

IGNORED_LABEL = -100


def question_mask(labels: Tensor) -> Tensor:
    """1 for every token before the first labelled one (LLaVA-EAS's rule), [B, n] bool."""
    return (labels != IGNORED_LABEL).cumsum(dim=1) == 0


def predicting(labels: Tensor) -> Tensor:
    """Which tokens' logits predict a label, [B, n] bool: a decoder's logits at i are for token i + 1."""
    return F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))


def seen_tokens(mask: Tensor) -> Tensor:
    """[B, m] bool, which tokens of the other stream are real: from its 2-D mask, or from a 4-D one (boolean or
    additive), whose rows, one per query, are all alike.
    """
    row = mask[:, 0, 0] if mask.dim() == 4 else mask
    return row == 0 if row.is_floating_point() and mask.dim() == 4 else row.bool()


def visible_tokens(
    attention_mask: Tensor | dict[str, Tensor] | None, n: int, cache: Cache | None = None
) -> Tensor | None:
    """[B, n] bool, which of the n tokens of this pass are real; None when nothing is masked.

    Understands the 2-D mask of tokenizers and the 4-D masks (boolean or additive) that `generate` makes for static
    caches, in which a real token sees at least itself; its column follows those of the tokens in `cache`.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        return None
    if attention_mask.dim() == 3:  # [B, n, n], 1 for what may be seen
        return attention_mask[:, -n:, -n:].diagonal(dim1=-2, dim2=-1) > 0
    if attention_mask.dim() == 4:
        past = 0 if cache is None else int(cache.get_seq_length())
        past = min(past, attention_mask.shape[-1] - n)  # a sliding window has moved on
        if attention_mask.shape[-2] == 1 < n:  # one row for all queries: an encoder's mask
            itself = attention_mask[:, 0, 0, -n:]
        else:
            itself = attention_mask[:, 0, :, past : past + n].diagonal(dim1=-2, dim2=-1)
        return itself if itself.dtype == torch.bool else itself == 0
    mask = attention_mask[:, -n:]
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all() & (mask == 1).any()):
        # Additive: 0 for real tokens, or more where they are special, and less for all others.
        return mask >= 0
    return mask.bool()
