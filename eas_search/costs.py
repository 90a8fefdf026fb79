"""What attentions and blocks cost by formula: FLOPs, weights and KV cache, read from shapes (also on the meta device).

Counted are products with matrices, at two operations per multiplication and addition, and attention's two products
q·kᵀ and p·v over the keys that a query may see. Norms, activations and softmax are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.patterns import QKV
from eas_search.architectures.recompose import output_width
from eas_search.architectures.surroundings import is_causal
from eas_search.exceptions import UnsupportedModelError

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
HEAD_WIDTHS = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
ACTIVE_EXPERTS = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k"),
    *("num_selected_experts", "top_k_experts", "top_k"),
)


@dataclass(frozen=True)
class HeadShape:
    """Heads of one attention.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        key_width, value_width: of one head.
        cached: numbers that the KV cache keeps per token.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    cached: int

    def score_flops(self, pairs: int) -> int:
        """q·kᵀ and p·v for this many pairs of a query and a key that it sees."""
        return 2 * self.heads * (self.key_width + self.value_width) * pairs


def head_shape(attention: nn.Module, config: Any) -> HeadShape:
    """The heads of an attention, from its projections' widths and what it or its configuration calls them.

    Raises:
        UnsupportedModelError: neither says how many heads there are.
    """
    modules: dict[str, Any] = dict(attention.named_modules())
    found = next(
        ([modules[path[: len(path) - len(names[0])] + name] for name in names], names)
        for names in QKV
        for path in modules
        if path.rpartition(".")[2] == names[0]
        and all(path[: len(path) - len(names[0])] + name in modules for name in names)
    )
    (first, *others), names = found
    config = getattr(attention, "config", config)
    heads = _first(attention, HEADS) or _first(config, HEADS)
    width = _first(attention, HEAD_WIDTHS) or (output_width(first) // heads if heads and others else None)
    if width is None and heads:  # one projection for all: its heads are those of the configuration
        width = _first(config, ("head_dim",)) or (_first(config, ("hidden_size", "d_model")) or 0) // heads
    if not heads or not width:
        raise UnsupportedModelError(
            f"{type(attention).__name__} does not say how many heads it has (none of {', '.join(HEADS)}): its scores "
            "cannot be counted"
        )
    if names[0] == "q_a_proj":  # latent attention: the cache keeps the latent and one rotated key for all heads
        latent = sum(_first(attention, (name,)) or 0 for name in ("kv_lora_rank", "qk_rope_head_dim"))
        return HeadShape(heads, heads, width, _first(attention, ("v_head_dim",)) or width, latent)
    if others:
        kv_heads = output_width(others[0]) // width
        cached = output_width(others[0]) + output_width(others[1])
        return HeadShape(heads, kv_heads, width, output_width(others[1]) // kv_heads, cached)
    kv_heads = (output_width(first) // width - heads) // 2
    return HeadShape(heads, kv_heads, width, width, 2 * kv_heads * width)


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((v for name in names if type(v := getattr(owner, name, None)) is int and v > 0), None)


def matrices(module: nn.Module, config: Any) -> Iterator[tuple[int, float]]:
    """(entries, share of them that one token uses) of every matrix by which `module` multiplies its tokens.

    Raises:
        UnsupportedModelError: it has experts and nothing says how many of them a token uses.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for parameter in part.parameters(recurse=False):
            if parameter.dim() == 2 and not isinstance(part, nn.MultiheadAttention):
                yield parameter.numel(), 1.0
            elif parameter.dim() == 3 and parameter.shape[0] > 1:
                active = _first(part, ACTIVE_EXPERTS) or _first(config, ACTIVE_EXPERTS)
                if active is None:
                    raise UnsupportedModelError(
                        f"{type(part).__name__} has {parameter.shape[0]} experts and nothing says how "
                        "many a token uses: its FLOPs cannot be counted"
                    )
                yield parameter.numel(), min(1.0, active / parameter.shape[0])


def matrix_flops(module: nn.Module, config: Any) -> int:
    """Operations per token of the products with the module's matrices."""
    return round(sum(2 * entries * share for entries, share in matrices(module, config)))


def matrix_entries(module: nn.Module, config: Any, tokens: int) -> int:
    """Numbers that must be read from memory for `tokens` tokens at once, each with experts of its own."""
    return round(sum(entries * min(1.0, share * tokens) for entries, share in matrices(module, config)))


def visible_pairs(tokens: int, causal: bool, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a sequence of `tokens`."""
    if not causal:
        return tokens * tokens
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


@dataclass(frozen=True)
class SiteCost:
    """One attention site by formula.

    Attributes:
        heads: its heads.
        parameters: of the attention, with the projection that writes its output.
        flops_per_token: of its projections.
        entries: numbers in its matrices.
        window: tokens that a query sees at most; None when nothing limits it.
        causal: whether a query sees only earlier tokens and itself.
        cached: whether it keeps keys and values in the cache.
    """

    heads: HeadShape
    parameters: int
    flops_per_token: int
    entries: int
    window: int | None
    causal: bool
    cached: bool

    def flops(self, tokens: int) -> int:
        """Operations for one sample of `tokens` tokens (in both streams of a cross-attention)."""
        return self.flops_per_token * tokens + self.heads.score_flops(self.pairs(tokens))

    def pairs(self, tokens: int) -> int:
        """Pairs of a query and a key that it sees."""
        return visible_pairs(tokens, self.causal, self.window)

    def kv_numbers(self, tokens: int) -> int:
        """Numbers in the KV cache of one sample after `tokens` tokens.

        A sliding cache keeps one token less than its window, as `transformers` does: the next token is the missing one.
        """
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return kept * self.heads.cached if self.cached else 0


def site_cost(model: nn.Module, site: AttentionSite) -> SiteCost:
    """The cost of one site of `model`.

    Raises:
        UnsupportedModelError: its heads cannot be read.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    attention = model.get_submodule(site.name)
    parts = [attention]
    if site.pattern.writer:
        parts.append(model.get_submodule(f"{site.block}.{site.pattern.writer}"))
    slots = cache_windows(text)
    slot = site.layer if site.causal else None
    return SiteCost(
        heads=head_shape(attention, text if site.tower == "text" else config),
        parameters=sum(parameter.numel() for part in parts for parameter in part.parameters()),
        flops_per_token=sum(matrix_flops(part, text) for part in parts),
        entries=sum(matrix_entries(part, text, 1) for part in parts),
        window=slots.get(slot) if slot is not None else None,
        causal=site.causal,
        cached=slot is not None and (slot in slots or not slots),
    )


def cache_windows(config: Any) -> dict[int, int | None]:
    """Window by slot of the KV cache, as `transformers` itself lays it out; empty when it grows as it is used."""
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    return {slot: getattr(layer, "sliding_window", None) for slot, layer in enumerate(layers)}


def block_flops(model: nn.Module, block: str, tokens: int) -> int:
    """Operations of one block for one sample of `tokens` tokens, without the scores of its attentions.

    Raises:
        UnsupportedModelError: something in it cannot be counted.
    """
    config: Any = model.config
    return matrix_flops(model.get_submodule(block), config.get_text_config(decoder=True)) * tokens


def refused_scores(model: nn.Module, name: str, tokens: int) -> int:
    """Operations of the scores of an attention that is no site, with `tokens` tokens."""
    attention = model.get_submodule(name)
    causal = is_causal(attention) and not re.search(r"cross|enc", name.rpartition(".")[2], re.IGNORECASE)
    return head_shape(attention, model.config).score_flops(visible_pairs(tokens, causal, None))
