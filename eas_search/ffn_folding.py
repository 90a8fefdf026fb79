"""Folding PIAs into a block's FFN: the algebra of one skipped block, on dense matrices in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eas_search.architectures.norms import split_norm
from eas_search.architectures.recompose import ffn_of
from eas_search.exceptions import UnsupportedModelError
from eas_search.folding import FoldedFfn, FoldedPia, check_odd_part, constant_gate, linear

AMPLIFIED = 8.0  # times a pooled term may grow on its way through M⁻¹; its rounding errors grow as much


def as_double(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor in float64; zeros like `like` when there is none."""
    return torch.zeros_like(like, dtype=torch.float64) if tensor is None else tensor.double()


@dataclass(frozen=True)
class _Projections:
    """An FFN's matrices in float64, whatever layers hold them: first [(W [f, d], bias [f])], out ([d, f], bias)."""

    names: tuple[str, ...]
    first: list[tuple[Tensor, Tensor]]
    out: tuple[Tensor, Tensor]
    out_biased: bool
    activation: Any
    gated: bool
    like: Tensor


def _projections(block: Any) -> _Projections:
    form = block.eas_site.ffn
    holder = ffn_of(block, block.eas_site.pattern.ffn)
    out = getattr(holder, form.out)
    first = [dense(getattr(holder, name)) for name in form.first]
    names = (*form.first, form.out)
    if form.fused:
        weights, biases = (part.chunk(2) for part in first[0])
        first, names = list(zip(weights, biases, strict=True)), ("gate_proj", "up_proj", form.out)
    activation = getattr(holder, form.activation)
    return _Projections(names, first, dense(out), out.bias is not None, activation, form.gated, out.weight)


def dense(layer: Any) -> tuple[Tensor, Tensor]:
    """(W [out, in], bias [out]) in float64 of a linear layer, also of a Conv1D, which stores its weight transposed.

    Raises:
        UnsupportedModelError: the weight is quantised.
    """
    if not layer.weight.is_floating_point():
        raise UnsupportedModelError(
            f"{type(layer).__name__} holds a quantised weight, so folding into it would not be exact; expected a "
            "floating-point layer: use placement 'residual', or merge onto a base loaded without quantisation"
        )
    weight = layer.weight.double()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    return weight, as_double(layer.bias, weight[:, 0])


def fold_static(
    block: Any, identity: tuple[Tensor, Tensor | None], correction: FoldedPia, stream: FoldedPia | None
) -> FoldedFfn:
    """FFN(g2 ⊙ (i(u) + Δf) + b2), plus Δr as linear neurons, as one FFN that reads u.

    With i(u) = g u + b and Δf = U (R u + r + p) + u0 (design §3), each first projection W, β becomes
        W' = W G2 M with M = diag g + U R,   β' = β + W (G2 (b + U r + u0) + b2).
    The pooled p adds W G2 U p = W' v with v = M⁻¹ U p: a vector as wide as u, not as wide as the FFN.
    Δr = U (R u + r + p) + u0 becomes neurons R u + r behind an activation that is linear for them, with down columns U:
    a gate with weight 0 and bias act⁻¹(1), or pairs ± when the FFN is not gated. They see v, too, so that its pooled
    part is w = U (p - R v), added to the output; the constant u0 is then part of w. Where M⁻¹ is not to be trusted
    (`cancels`) no FFN of this form is exact.
    """
    site, parts = block.eas_site, _projections(block)
    _, gain2, shift2 = split_norm(getattr(block, site.pattern.norm2), site.width)
    g2, g = gain2.double(), identity[0].double()
    up, mixed = correction.ups[0], _mixed(identity, correction)
    constant = as_double(identity[1], g) + up @ correction.down_bias + correction.up_biases[0]
    constant = g2 * constant + as_double(shift2, g)
    weights = [weight @ (g2.unsqueeze(1) * mixed) for weight, _ in parts.first]
    biases = [weight @ constant + bias for weight, bias in parts.first]
    out_weight, out_bias = parts.out
    if stream is not None:
        rows, columns = _linear_neurons(parts, stream)
        weights = [torch.cat([weight, row]) for weight, (row, _) in zip(weights, rows, strict=True)]
        biases = [torch.cat([bias, constants]) for bias, (_, constants) in zip(biases, rows, strict=True)]
        out_weight, out_bias = torch.cat([out_weight, columns], dim=1), out_bias + stream.up_biases[0]
    ffn = FoldedFfn(parts.names, parts.activation)
    pools = [pia.pool for pia in (correction, stream) if pia is not None and pia.pool is not None]
    keep_bias = parts.out_biased or stream is not None
    if pools:
        ffn.pool = linear(torch.cat(pools), None, parts.like)
        spread_bias = None
        if stream is not None:
            keep_bias, spread_bias = False, torch.cat([torch.zeros_like(out_bias), out_bias])
        ffn.spread = linear(_pooled_vectors(mixed, correction, stream), spread_bias, parts.like)
    *first, out = parts.names
    for name, weight, bias in zip(first, weights, biases, strict=True):
        setattr(ffn, name, linear(weight, bias, parts.like))
    setattr(ffn, out, linear(out_weight, out_bias if keep_bias else None, parts.like))
    return ffn


def _linear_neurons(parts: _Projections, stream: FoldedPia) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Rows (weights, constants) that every first projection gets, and columns of the last, for U (R u + r)."""
    down, constants, columns = stream.down, stream.down_bias, stream.ups[0]
    if parts.gated:
        gate = torch.full_like(constants, constant_gate(parts.activation))
        return [(torch.zeros_like(down), gate), (down, constants)], columns
    check_odd_part(parts.activation)
    return [(torch.cat([down, -down]), torch.cat([constants, -constants]))], torch.cat([columns, -columns], dim=1)


def _mixed(identity: tuple[Tensor, Tensor | None], correction: FoldedPia) -> Tensor:
    """M = diag g + U R, what a merged FFN makes of u."""
    return torch.diag(identity[0].double()) + correction.ups[0] @ correction.down


def cancels(identity: tuple[Tensor, Tensor | None], correction: FoldedPia) -> bool:
    """Whether Δf takes so much of u away that a vector in front of M could bring a pooled term back only amplified.

    Tensors without values (device `meta`) are given the benefit of the doubt.
    """
    if correction.pool is None or correction.down.is_meta:
        return False
    up = correction.ups[0]
    solved, info = torch.linalg.solve_ex(_mixed(identity, correction), up)
    return bool(info) or not bool(solved.norm() <= AMPLIFIED * up.norm())


def _pooled_vectors(mixed: Tensor, correction: FoldedPia, stream: FoldedPia | None) -> Tensor:
    """[v; w] as a matrix of the pooled terms of both PIAs, [d or 2 d, q]."""
    up = correction.ups[0]
    if correction.pool is None:
        up = up[:, :0]
    shift = torch.linalg.solve_ex(mixed, up).result
    if stream is None:
        return shift
    own = torch.eye(stream.down.shape[0], dtype=shift.dtype, device=shift.device)
    if stream.pool is None:
        own = own[:, :0]
    seen = torch.cat([shift, shift.new_zeros(len(shift), own.shape[1])], dim=1)
    heard = torch.cat([own.new_zeros(len(own), shift.shape[1]), own], dim=1) - stream.down @ seen
    return torch.cat([seen, stream.ups[0] @ heard])


def fold_routed(block: Any, identity: tuple[Tensor, Tensor | None], correction: FoldedPia) -> FoldedFfn:
    """FFN(g2 ⊙ v + b2) for v = i(u) + Δ: the norm's affine part folds, the routed Δ stays a thin path in front.

    On the `paper` identity path the constant b1 folds too, while g1 ⊙ u stays a product (`thin_gain`): dividing it
    out of W would need g1 ≠ 0.
    """
    site, parts = block.eas_site, _projections(block)
    _, gain2, shift2 = split_norm(getattr(block, site.pattern.norm2), site.width)
    gain, shift = identity
    if block.eas_config.identity == "paper":
        block.thin_gain = nn.Parameter(gain.detach().clone(), requires_grad=False)
    g2 = gain2.double()
    constant = g2 * as_double(shift, g2) + as_double(shift2, g2)
    ffn = FoldedFfn(parts.names, parts.activation)
    for name, (weight, bias) in zip(parts.names[:-1], parts.first, strict=True):
        setattr(ffn, name, linear(weight * g2, weight @ constant + bias, parts.like))
    out_weight, out_bias = parts.out
    setattr(ffn, parts.names[-1], linear(out_weight, out_bias if parts.out_biased else None, parts.like))
    return ffn
