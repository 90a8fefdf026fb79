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
        W' = W G2 (diag g + U R),   β' = β + W (G2 (b + U r + u0) + b2),   per sample + W G2 U p.
    Δr = U (R u + r + p) + u0 becomes neurons R u + r + p behind an activation that is linear for them, with down
    columns U: a gate with weight 0 and bias act⁻¹(1), or pairs ± when the FFN is not gated.
    """
    site, parts = block.eas_site, _projections(block)
    _, gain2, shift2 = split_norm(getattr(block, site.pattern.norm2), site.width)
    g2, g = gain2.double().unsqueeze(1), identity[0].double()
    up = correction.ups[0]
    mixed = g2 * (torch.diag(g) + up @ correction.down)
    constant = as_double(identity[1], g) + up @ correction.down_bias + correction.up_biases[0]
    constant = g2.squeeze(1) * constant + as_double(shift2, g)
    weights = [weight @ mixed for weight, _ in parts.first]
    biases = [weight @ constant + bias for weight, bias in parts.first]
    injects = [weight @ (g2 * up) for weight, _ in parts.first]
    out_weight, out_bias = parts.out
    pools = [] if correction.pool is None else [correction.pool]
    if stream is not None:
        columns, blank = stream.ups[0], torch.zeros_like(stream.down)
        rank = columns.shape[1]
        if parts.gated:
            rows = [(blank, torch.full_like(stream.down_bias, constant_gate(parts.activation)), 0.0)]
            rows.append((stream.down, stream.down_bias, 1.0))
            out_weight = torch.cat([out_weight, columns], dim=1)
        else:
            check_odd_part(parts.activation)
            both = torch.cat([stream.down, -stream.down])
            rows = [(both, torch.cat([stream.down_bias, -stream.down_bias]), 1.0)]
            out_weight = torch.cat([out_weight, columns, -columns], dim=1)
        out_bias = out_bias + stream.up_biases[0]
        if stream.pool is not None:
            pools.append(stream.pool)
        eye = torch.eye(rank, dtype=torch.float64, device=columns.device)
        for i, (weight, bias, through) in enumerate(rows):
            lower = through * (eye if parts.gated else torch.cat([eye, -eye]))
            injects[i] = torch.block_diag(injects[i], lower)
            weights[i], biases[i] = torch.cat([weights[i], weight]), torch.cat([biases[i], bias])
    *first, out = parts.names
    if pools and parts.gated:
        first = ["gate_up_proj"]
    ffn = FoldedFfn((*first, out), parts.activation, parts.gated)
    if pools:
        setattr(ffn, first[0], linear(torch.cat(weights), None, parts.like))
        ffn.pool = linear(torch.cat(pools), None, parts.like)
        ffn.inject = linear(torch.cat(injects), torch.cat(biases), parts.like)
    else:
        for name, weight, bias in zip(first, weights, biases, strict=True):
            setattr(ffn, name, linear(weight, bias, parts.like))
    keep_bias = parts.out_biased or stream is not None
    setattr(ffn, out, linear(out_weight, out_bias if keep_bias else None, parts.like))
    return ffn


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
    ffn = FoldedFfn(parts.names, parts.activation, parts.gated)
    for name, (weight, bias) in zip(parts.names[:-1], parts.first, strict=True):
        setattr(ffn, name, linear(weight * g2, weight @ constant + bias, parts.like))
    out_weight, out_bias = parts.out
    setattr(ffn, parts.names[-1], linear(out_weight, out_bias if parts.out_biased else None, parts.like))
    return ffn
