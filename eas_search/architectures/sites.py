"""Attention sites: the MHA sublayers of a live model that a declared pattern explains."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from eas_search.architectures.patterns import BlockPattern, FfnForm, Kind
from eas_search.architectures.recompose import Residual
from eas_search.architectures.resolve import PROVIDERS, Resolved, resolve_block
from eas_search.architectures.surroundings import (
    TOKENS,
    is_causal,
    makes_own_cache,
    masked_ahead,
    packs_rows,
    takes_tokens,
    tower_of,
)
from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.skip_config import TOWERS


@dataclass(frozen=True)
class AttentionSite:
    """One MHA sublayer with the norms and the FFN it feeds.

    Attributes:
        index: position in `attention_sites(model)`.
        name: dotted path of the attention module.
        block: dotted path of the block that holds it.
        tower: `text`, `vision`, `audio`, or `fusion` for layers in which two streams look at each other.
        layer: position of the block among its siblings, which is also its slot in the KV cache.
        width: width d of the stream that the attention reads and writes.
        causal: whether the attention only looks back, so that the model decodes with a KV cache.
        pattern: how the block names its parts.
        kind: `self`, or `cross` for attention to another stream.
        residual: whether attention and FFN follow each other or stand side by side.
        ffn: form of the FFN when a PIA can be folded into it, else None.
        qkv: names of the attention's input projections, inside the attention.
        merge_refusal: why nothing can be folded into the FFN of this site; None when it can.
        flat: whether the rows that the attention gets are not the samples (packed images, windows of an image).
    """

    index: int
    name: str
    block: str
    tower: str
    layer: int
    width: int
    causal: bool
    pattern: BlockPattern
    kind: Kind = "self"
    residual: Residual = "sequential"
    ffn: FfnForm | None = None
    qkv: tuple[str, ...] = ()
    merge_refusal: str | None = None
    flat: bool = False

    @property
    def stack(self) -> str:
        """Dotted path of the module that owns the list of blocks ('' for the model itself)."""
        return self.block.rpartition(".")[0].rpartition(".")[0]

    @property
    def whole(self) -> bool:
        """Whether the whole block is understood, so that a PIA can also write into the FFN's input."""
        return self.ffn is not None

    @property
    def host(self) -> str:
        """Dotted path of the module that holds the PIAs once the attention is skipped."""
        return self.block if self.whole else self.name

    @property
    def adaptable(self) -> bool:
        """Whether a kept attention may get a light adapter; a cross-attention only where streams look at each other."""
        return self.kind == "self" or self.tower == "fusion"

    @property
    def placements(self) -> tuple[Literal["ffn", "residual", "parallel"], ...]:
        """Placements of a PIA that this site can have."""
        return ("ffn", "residual", "parallel") if self.whole else ("residual",)


def attention_sites(model: nn.Module, towers: Iterable[str] | None = None) -> list[AttentionSite]:
    """All attention sites of `model`, text tower first, in the order of their layers.

    The text tower comes first so that an index means the same language layer with and without vision sites.

    Args:
        model: any module that holds blocks of a declared pattern.
        towers: `text`, `vision`, `audio`, `fusion`, any of them; None means all.

    Raises:
        UnsupportedModelError: no block of the model fits a pattern.
        ConfigError: an unknown tower.
    """
    wanted = set(TOWERS) if towers is None else set(towers)
    if unknown := wanted - set(TOWERS):
        raise ConfigError(f"tower {sorted(unknown)[0]!r} is unknown; expected one of {', '.join(TOWERS)}")
    found, refused = _scan(model)
    if not found:
        reason = next(iter(refused.values()), "")
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be skipped"
            + (f" ({len(refused)} refused: {reason})" if reason else " in a block of a known pattern")
            + "; expected blocks with softmax attention in a list of layers: declare yours with register_pattern"
        )
    ordered = sorted(found, key=lambda site: TOWERS.index(site.tower))  # stable within a tower
    return [replace(site, index=i) for i, site in enumerate(ordered) if site.tower in wanted]


def refused_sites(model: nn.Module) -> dict[str, str]:
    """Attentions that are no sites although they look like it: dotted path → why."""
    return _scan(model)[1]


def _scan(model: nn.Module) -> tuple[list[AttentionSite], dict[str, str]]:
    found: list[AttentionSite] = []
    refused: dict[str, str] = {}
    known: dict[object, tuple[list[Resolved], dict[str, str]]] = {}
    for path, block in model.named_modules():
        if not path.rpartition(".")[2].isdigit():
            continue
        # Blocks of one stack differ at most in what kinds of parts they have; one of each kind is examined.
        likeness = (path.rpartition(".")[0], *((name, type(part)) for name, part in block.named_modules()))
        likeness += (getattr(block, "layer_type", None), getattr(block, "attention_type", None))
        if (key := likeness) not in known or _is_special(block):
            known[key] = resolve_block(block)
        resolved, reasons = known[key]
        refused.update({f"{path}.{name}": reason for name, reason in reasons.items()})
        tower = tower_of(model, path)
        for site in (_site(model, path, tower, one) for one in resolved):
            if reason := _cannot_go(model, site):
                refused[site.name] = reason
            else:
                found.append(site)
    return _name_fusion(model, found), refused


def _cannot_go(model: nn.Module, site: AttentionSite) -> str:
    """Why the surroundings of an attention do not let it go; '' when they do."""
    stack = model.get_submodule(site.stack)
    name = type(stack).__name__
    if site.causal and not takes_tokens(stack):
        return f"{name} runs causal blocks and does not say which tokens they see (none of {', '.join(TOKENS)})"
    if site.causal and not hasattr(stack, "config"):
        return f"{name} runs causal blocks and has no configuration to make a KV cache from"
    if site.causal and (own := makes_own_cache(stack)):
        return f"{name} decodes with a cache of its own ({own}), in which no slot may be empty"
    return ""


def _name_fusion(model: nn.Module, found: list[AttentionSite]) -> list[AttentionSite]:
    """Sites of two lists of layers that one module runs side by side, each with attention to the other stream."""
    lists: dict[str, set[str]] = {}
    for site in found:
        if site.kind == "cross":
            lists.setdefault(site.stack, set()).add(site.block.rpartition(".")[0])
    fusing = {path for paths in lists.values() if len(paths) > 1 for path in paths}
    named = []
    for site in found:
        if site.block.rpartition(".")[0] in fusing:
            # BridgeTower's copies of BERT's attention are marked as causal although nothing hides what lies ahead.
            causal = site.causal and getattr(model.get_submodule(site.name), "is_decoder", True)
            site = replace(site, tower="fusion", causal=causal)  # noqa: PLW2901
        named.append(site)
    return named


def _is_special(block: nn.Module) -> bool:
    """Whether the block has marks of its own that other blocks of its kind lack."""
    marks = ("has_relative_attention_bias", *PROVIDERS)
    return any(getattr(part, mark, False) for part in block.modules() for mark in marks)


def _site(model: nn.Module, path: str, tower: str, resolved: Resolved) -> AttentionSite:
    pattern, block = resolved.pattern, model.get_submodule(path)
    attention = block.get_submodule(pattern.attention)
    stack = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    causal = pattern.kind == "self" and tower == "text" and (is_causal(attention, stack) or masked_ahead(model, path))
    slot = getattr(attention, "layer_idx", None)
    parameters = inspect.signature(block.forward).parameters
    return AttentionSite(
        index=0,
        name=f"{path}.{pattern.attention}",
        block=path,
        tower=tower,
        layer=slot if isinstance(slot, int) else int(path.rpartition(".")[2]),
        width=resolved.width,
        causal=causal,
        pattern=pattern,
        kind=pattern.kind,
        residual=resolved.residual,
        ffn=resolved.ffn,
        qkv=resolved.qkv,
        merge_refusal=resolved.why_not_whole or None,
        flat="cu_seqlens" in parameters or hasattr(block, "window_size") or packs_rows(model, path),
    )


def resolve_skip(skip: Iterable[int | str], sites: list[AttentionSite]) -> tuple[AttentionSite, ...]:
    """The sites that a skip set names by index or by name, in the order of `sites`.

    Raises:
        ConfigError: an index out of range or an unknown name.
    """
    by_name = {site.name: site for site in sites}
    by_index = {site.index: site for site in sites}
    chosen: set[int] = set()
    for entry in skip:
        site = by_name.get(entry) if isinstance(entry, str) else by_index.get(entry)
        if site is None:
            raise ConfigError(
                f"skip names site {entry!r}; expected an index from {min(by_index)} to {max(by_index)} or a name like "
                f"{sites[0].name!r}: list them with `eas-search sites`"
            )
        chosen.add(site.index)
    return tuple(site for site in sites if site.index in chosen)
