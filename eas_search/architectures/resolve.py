"""From a block to its attention sites: which declared pattern it has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from eas_search.architectures.calls import call_form
from eas_search.architectures.norms import is_norm
from eas_search.architectures.patterns import FFN_FORMS, QKV, BlockPattern, FfnForm, patterns
from eas_search.architectures.recompose import Residual, input_width, recompose
from eas_search.exceptions import UnsupportedModelError

_NOT_SOFTMAX = re.compile(r"Deformable|Lightning|Linear|Mamba|GatedDelta|Fourier|Hyena|Retention|Rwkv|Conv|Pooling")
# Marks of attentions that make something for other blocks, and what.
PROVIDERS = {"store_full_length_kv": "keys and values of later layers", "rel_attn_embed": "position bias"}
_STREAM_NORM = re.compile(r"(pre_|self_attn_)?(LayerNorm|layer_?norm|norm)")
_RECURRENT = re.compile(r"Mamba|Mixer$|SSM|DeltaNet|Recurrent")


@dataclass(frozen=True)
class Resolved:
    """What was found out about one attention of one block.

    Attributes:
        pattern: the declaration; `whole` only when the block really is what it declares.
        residual: whether attention and FFN follow each other or stand side by side.
        ffn: the form of the FFN, when the block is whole.
        qkv: names of the attention's input projections, inside the attention.
        width: width d of the stream that the attention reads.
        why_not_whole: why nothing can be folded into this block's FFN; '' when it can.
    """

    pattern: BlockPattern
    residual: Residual
    ffn: FfnForm | None
    qkv: tuple[str, ...]
    width: int
    why_not_whole: str = ""


def resolve_block(block: nn.Module) -> tuple[list[Resolved], dict[str, str]]:
    """The attention sites of one block, at most one per attention, and why others were refused, by their path."""
    found: dict[str, Resolved] = {}
    refused: dict[str, str] = {}
    reasons: list[str] = []
    for pattern in patterns():
        if any(pattern.attention in (known, known.split(".")[0]) for known in (*found, *refused)):
            continue
        if pattern.whole and not _has_exactly(block, pattern):
            continue
        try:
            attention = block.get_submodule(pattern.attention)
        except AttributeError:
            continue
        if (projections := _softmax_projections(block, pattern, attention)) is None:
            continue
        qkv, width = projections
        if reason := _provides(block, pattern, attention):
            refused[pattern.attention] = reason
        elif not pattern.whole:
            why = reasons[0] if reasons else "only its attention is declared, not its norms and its FFN"
            found[pattern.attention] = Resolved(pattern, "sequential", None, qkv, width, why)
        else:
            try:
                residual, ffn = recompose(block, pattern, width)
            except UnsupportedModelError as error:
                reasons.append(str(error))
                continue
            found[pattern.attention] = Resolved(pattern, residual, ffn, qkv, width)
    return list(found.values()), refused


def _parts(block: nn.Module) -> set[str]:
    passive = nn.Dropout | nn.Identity
    return {
        name
        for name, child in block.named_children()
        if not isinstance(child, passive) and (any(True for _ in child.parameters()) or is_norm(child))
    }


def _has_exactly(block: nn.Module, pattern: BlockPattern) -> bool:
    """Whether the block has these parts and none beside them that computes (a third norm, a second attention)."""
    names = {
        pattern.norm1,
        pattern.attention.split(".")[0],
        pattern.norm2,
        pattern.post_attention,
        pattern.post_ffn,
    } - {""}
    have = _parts(block)
    if pattern.ffn == ".":
        return any(have == names | {*form.first, form.out} for form in FFN_FORMS)
    return have == names | {pattern.ffn}


def _softmax_projections(
    block: nn.Module, pattern: BlockPattern, attention: nn.Module
) -> tuple[tuple[str, ...], int] | None:
    """(names of the input projections, width) when `attention` is softmax attention that can be left out as a whole."""
    if _NOT_SOFTMAX.search(type(attention).__name__) or isinstance(attention, nn.MultiheadAttention):
        return None
    if pattern.adds and pattern.adds not in call_form(type(attention)).parameters:
        return None
    if not pattern.writer and not pattern.adds:
        # A norm of the residual stream inside the attention: it also adds the residual, so it is more than attention.
        if any(_STREAM_NORM.fullmatch(name) for name, _ in attention.named_children()):
            return None
        if hasattr(attention, "output") and hasattr(attention.output, "LayerNorm"):
            return None
    modules = dict(attention.named_modules())
    for names in QKV:
        for path, layer in modules.items():
            prefix, _, last = path.rpartition(".")
            full = tuple(f"{prefix}.{name}" if prefix else name for name in names)
            if last == names[0] and all(name in modules for name in full) and hasattr(layer, "weight"):
                return full, input_width(layer)
    return None


def _provides(block: nn.Module, pattern: BlockPattern, attention: nn.Module) -> str:
    """Why an attention that makes something for others, beside its output, cannot go; '' when it does not."""
    name = f"{type(block).__name__}.{pattern.attention}"
    try:
        form = call_form(type(attention))
    except UnsupportedModelError as error:
        return str(error)
    made = form.provides
    if getattr(attention, "has_relative_attention_bias", False) and "position_bias" in form.parameters:
        made = "position_bias"
    if any(hasattr(part, "set_attention_type") for part in block.modules()):
        return f"{name} is exchanged for another attention at run time: it cannot go"
    made = next((what for mark, what in PROVIDERS.items() if getattr(attention, mark, None)), made)
    if made:
        return f"{name} also makes {made!r}, which other blocks read: skip other sites"
    if any(_RECURRENT.search(type(child).__name__) for child in block.children()):
        return f"{name} shares a cache slot with a recurrent mixer: skip sites of other blocks"
    return ""
