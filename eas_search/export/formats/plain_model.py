"""The student as a model of a plain class: wider FFNs, more biases, attentions of zeros."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from eas_search.architectures import AttentionSite
from eas_search.architectures.recompose import ffn_of
from eas_search.conditions import device_of
from eas_search.export.files import constructor_options
from eas_search.export.formats.plain import (
    Misfit,
    check_plain,
    folded_ffn,
    hidden_width,
    open_norm,
    padded,
    without_attention,
)

WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size")  # what configurations call d_ff
FFN_BIASES, QKV_BIASES = ("mlp_bias",), ("attention_bias", "qkv_bias")  # switches for biases, where there are any


def build(student: Any, merged: Any) -> Any:
    """The plain model.

    Args:
        student: unmerged, for the norms that merging took away.
        merged: the same, merged; both may be on the meta device.

    Raises:
        Misfit: the class has no place for something.
    """
    cls = type(student)
    if getattr(transformers, cls.__name__, None) is not cls:
        raise Misfit(f"{cls.__name__} is not a class of transformers")
    check_plain(merged)
    with torch.device("meta"):
        target = cls._from_config(
            _config(merged), dtype=next(merged.parameters()).dtype, **constructor_options(student)
        )
    filled = _tensors(target, student, merged)
    target.load_state_dict(filled, strict=True, assign=True)
    target.tie_weights()
    target.generation_config = getattr(student, "generation_config", None)
    return target


def _config(merged: Any) -> Any:
    """The base configuration with wider FFNs and more biases where the merged weights need them."""
    config = copy.deepcopy(merged.config)
    names = set(merged.state_dict())
    for tower in {site.tower for site in merged.eas.sites}:
        sites = [site for site in merged.eas.sites if site.tower == tower]
        part = getattr(config, f"{tower}_config", config) if tower != "text" else config.get_text_config()
        whole = [site for site in sites if site.whole]
        widths = {hidden_width(merged, site) for site in whole}
        if len(widths) > 1:
            key = next((key for key in WIDTHS if hasattr(part, key)), None)
            if key is None:
                raise Misfit(f"{type(part).__name__} does not name the width of its FFNs, of which some grew")
            setattr(part, key, max(widths))
        elif widths and any(hasattr(part, key) for key in WIDTHS):
            setattr(part, next(key for key in WIDTHS if hasattr(part, key)), widths.pop())
        first = {f"{_holder(site)}{name}.bias" for site in whole for name in (folded_names(merged, site))}
        qkv = {f"{site.name}.{name}.bias" for site in sites for name in site.qkv}
        for needed, switches in ((first, FFN_BIASES), (qkv, QKV_BIASES)):
            for switch in switches:
                if needed & names and hasattr(part, switch):
                    setattr(part, switch, True)
    return config


def folded_names(merged: Any, site: AttentionSite) -> tuple[str, ...]:
    """Names of the projections of a site's FFN, as they are now."""
    ffn = folded_ffn(merged, site)
    assert site.ffn is not None
    return ffn.names if ffn is not None else (*site.ffn.first, site.ffn.out)


def _holder(site: AttentionSite) -> str:
    return f"{site.block}." if site.pattern.ffn == "." else f"{site.block}.{site.pattern.ffn}."


def _tensors(target: Any, student: Any, merged: Any) -> dict[str, Tensor]:
    """A value for every parameter of the plain model."""
    have, wanted, before = merged.state_dict(), target.state_dict(), student.state_dict()
    for site in merged.eas.sites:
        if site.whole:
            have |= _ffn(target, merged, site, have)
    for site in merged.eas.skipped:
        if folded_ffn(merged, site) is not None:
            have |= open_norm(student, site)
    gone = tuple(prefix for site in merged.eas.skipped for prefix in without_attention(merged, site))
    filled = {}
    for name, place in wanted.items():
        value = have.pop(name, None)
        if value is None and name.startswith(gone):
            value = _zeros(place, merged)
        if value is None and name in before:
            value = before[name]  # a norm in front of an attention that is gone
        if value is None and name.endswith(".bias"):
            value = _zeros(place, merged)
        if value is None or value.shape != place.shape:
            raise Misfit(f"{name} of {type(target).__name__} has no value, or one of another size")
        filled[name] = value
    if have:
        name = sorted(have)[0]
        what = "biases there, which the merged adapters need" if name.endswith(".bias") else f"place for {name}"
        raise Misfit(f"{type(target).__name__} has no {what}" + (f" ({name})" if name.endswith(".bias") else ""))
    return filled


def _zeros(place: Tensor, merged: Any) -> Tensor:
    return torch.zeros(place.shape, dtype=place.dtype, device=device_of(merged))


def _ffn(target: Any, merged: Any, site: AttentionSite, have: dict[str, Tensor]) -> dict[str, Tensor]:
    """The FFN of a block in the plain model's layers: wide enough, gate and up in one where they are, transposed where
    it stores them so. What it replaces is taken out of `have`.
    """
    form, holder = site.ffn, _holder(site)
    assert form is not None
    folded = folded_ffn(merged, site)
    layers = folded if folded is not None else ffn_of(merged.get_submodule(site.block), site.pattern.ffn)
    source = holder if folded is None or site.pattern.ffn != "." else f"{site.block}.merged_ffn."
    places = ffn_of(target.get_submodule(site.block), site.pattern.ffn)
    width = hidden_width(target, site)
    names = folded_names(merged, site)
    moved: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for name in names:
        layer: Any = getattr(layers, name)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        bias = layer.bias
        for kind in ("weight", "bias"):
            have.pop(f"{source}{name}.{kind}", None)
        if name == form.out:
            moved[name] = [(padded(weight, 1, width), bias)]
            continue
        parts = weight.chunk(2) if form.fused and folded is None else (weight,)
        biases = (None,) * len(parts) if bias is None else bias.chunk(len(parts))
        pairs = zip(parts, biases, strict=True)
        wide = [(padded(w, 0, width), None if b is None else padded(b, 0, width)) for w, b in pairs]
        moved.setdefault(form.first[0] if form.fused else name, []).extend(wide)
    found = {}
    for name, pieces in moved.items():
        weight = torch.cat([piece[0] for piece in pieces])
        found[f"{holder}{name}.weight"] = weight.T.contiguous() if isinstance(getattr(places, name), Conv1D) else weight
        biased = [piece[1] for piece in pieces if piece[1] is not None]
        if biased:
            found[f"{holder}{name}.bias"] = torch.cat(biased)
    return found
