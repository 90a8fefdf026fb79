"""What the formats of other libraries share: the student as ordinary weights, or the reason why it is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.norms import affine_form, split_norm
from eas_search.architectures.recompose import ffn_of
from eas_search.exceptions import UnsupportedModelError
from eas_search.folding import FoldedFfn, ThinPath
from eas_search.merging import folded_name, merge
from eas_search.pia import Pia
from eas_search.skipping import share_copy


class Misfit(Exception):
    """Why a student cannot be written in a format; becomes its verdict."""


def sizes_only(student: Any) -> tuple[Any, Any]:
    """(student, merged) on the meta device, where planning costs neither memory nor time.

    Raises:
        Misfit: the student cannot be merged.
    """
    empty = share_copy(student).to("meta")
    try:
        return empty, merge(empty)
    except UnsupportedModelError as error:
        raise Misfit(str(error)) from error


def check_plain(merged: Any) -> None:
    """Whether a merged student consists of ordinary layers only.

    Raises:
        Misfit: a thin path or a pooled term is left.
    """
    config = merged.eas.config
    for name, module in merged.named_modules():
        if isinstance(module, FoldedFfn) and module.pool is not None:
            raise Misfit(f"pooling {config.pooling!r} adds a vector per sample to an FFN's input; 'none' would fit")
        if not isinstance(module, ThinPath | Pia):
            continue
        if config.router == "routed":
            raise Misfit("router 'routed' mixes its experts per sample; 'static' would fit")
        if config.placement == "residual":
            raise Misfit("placement 'residual' stays two thin products; 'ffn' or 'parallel' would fit")
        raise Misfit(f"{name} stays two thin products: this block cannot take it into its weights")


def without_attention(merged: Any, site: AttentionSite) -> list[str]:
    """Prefixes of the parameters that only a skipped attention has."""
    return [f"{site.name}.", *([f"{site.block}.{site.pattern.writer}."] if site.pattern.writer else [])]


def folded_ffn(merged: Any, site: AttentionSite) -> FoldedFfn | None:
    """The merged FFN of a skipped block, which reads the bare normalised tokens; None where nothing was folded."""
    ffn = getattr(merged.get_submodule(site.block), folded_name(site.pattern.ffn), None) if site.whole else None
    return ffn if isinstance(ffn, FoldedFfn) else None


def hidden_width(merged: Any, site: AttentionSite) -> int:
    """Width d_ff of a site's FFN."""
    ffn: Any = folded_ffn(merged, site)
    if ffn is None:
        assert site.ffn is not None
        ffn = ffn_of(merged.get_submodule(site.block), site.pattern.ffn)
        out = getattr(ffn, site.ffn.out)
    else:
        out = getattr(ffn, ffn.names[-1])
    return int(out.in_features if isinstance(out, nn.Linear) else out.weight.shape[0])


def padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with zeros behind it along `dim`."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def open_norm(student: Any, site: AttentionSite) -> dict[str, Tensor]:
    """norm2 of a skipped block without its affine part, gain 1 and shift 0, as the merged FFN wants it.

    Raises:
        Misfit: the norms differ in more than that.
    """
    pattern = site.pattern
    block = student.get_submodule(site.block)
    norm1, norm2 = getattr(block, pattern.norm1), getattr(block, pattern.norm2)
    one, two = split_norm(norm1, site.width)[0], split_norm(norm2, site.width)[0]
    if (one.eps, one.centred) != (two.eps, two.centred):
        raise Misfit(f"the norms of {site.block} differ in their epsilon, and the merged FFN was folded for the first")
    offset = affine_form(norm2, site.width).offset
    values = {"weight": 1.0 - offset, "bias": 0.0}
    return {
        f"{site.block}.{pattern.norm2}.{name}": torch.full_like(parameter.data, values[name])
        for name, parameter in norm2.named_parameters()
    }
