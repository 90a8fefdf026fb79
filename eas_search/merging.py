"""Merging: PIAs become part of the FFN's weights, light adapters part of the query, key and value projections.

Exact for any batch, and nothing is rewritten per prompt. With a static router the merged layer is one norm without
affine part and one FFN; the pooled term, where there is one, costs a vector per sample. A routed PIA, or one placed
`residual`, keeps two thin products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eas_search.architectures.norms import Normalise, split_norm
from eas_search.blocks import AdaptedNorm, SkippedBlock, StudentBlock, student_class
from eas_search.exceptions import ConfigError, VerificationError
from eas_search.folding import FoldedFfn, FoldedPia, ThinPath, check_odd_part, constant_gate, fold_pia, linear
from eas_search.pooling import PoolSession
from eas_search.skipping import share_copy

Model = TypeVar("Model", bound=nn.Module)


class MergedBlock(StudentBlock):
    """y = x + thin_stream(u) + FFN(i(u) + thin_ffn(u)) with u = normalise(x); the thin paths exist only where needed.

    Of the identity path i only what no weight could hold is left: g1 ⊙ u + b1 for a routed PIA on the `paper` path.
    """

    normalise: Normalise
    thin_ffn: ThinPath | None
    thin_stream: ThinPath | None
    thin_gain: Tensor | None

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """See the class."""
        u = self.normalise(x)
        y = x if self.thin_stream is None else x + self.thin_stream(u, session, "stream")
        v = u
        if self.thin_ffn is not None:
            v = u if self.thin_gain is None else u * self.thin_gain
            v = v + self.thin_ffn(u, session, "ffn")
        return getattr(self, self.eas_pattern.ffn)(v, session, y)


class MergedResidualBlock(StudentBlock):
    """h = x + thin(u), y = h + FFN(norm2(h)): the second norm sees Δ, so the PIA stays two thin products."""

    normalise: Normalise
    thin_stream: ThinPath

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """See the class."""
        h = x + self.thin_stream(self.normalise(x), session, "stream")
        return h + getattr(self, self.eas_pattern.ffn)(getattr(self, self.eas_pattern.norm2)(h))


def merge(student: Model) -> Model:
    """The student with its adapters folded into plain weights; a new tree, the student is untouched.

    Raises:
        ConfigError: `student` was not made by `apply_skips`, or is merged already.
        UnsupportedModelError: an activation through which a `parallel` PIA cannot pass.
    """
    info = getattr(student, "eas", None)
    if info is None or info.merged:
        state = "already merged" if info is not None else "not a student"
        raise ConfigError(f"the model is {state}; expected the result of `apply_skips`, not yet merged")
    merged = share_copy(student)
    for site in info.sites:
        block = merged.get_submodule(site.block)
        if isinstance(block, SkippedBlock):
            if block.eas_config.pia_dim > 0:
                _merge_skipped(block)
        elif isinstance(adapted := getattr(block, site.pattern.norm1), AdaptedNorm):
            _merge_adapted(block, adapted, site.pattern)
    merged.eas = replace(info, merged=True)
    return merged


def _merge_skipped(block: Any) -> None:
    pattern, config = block.eas_pattern, block.eas_config
    normalise, gain1, shift1 = split_norm(getattr(block, pattern.norm1))
    pooled = block.eas_context.pooling != "none"
    folded: Any = {
        name: None if pia is None else fold_pia(pia, gain1, shift1, pooled)
        for name, pia in (("ffn", block.pia_ffn), ("stream", block.pia_stream))
    }
    original = type(block).__bases__[1]  # see `student_class`
    like = getattr(getattr(block, pattern.ffn), pattern.ffn_out).weight
    block.normalise = normalise
    block.thin_ffn = block.thin_stream = block.thin_gain = None
    if config.placement == "residual":
        block.thin_stream = ThinPath(folded["stream"], like)
        block.__class__ = student_class(MergedResidualBlock, original)
    else:
        identity = (gain1, shift1) if config.identity == "paper" else (torch.ones_like(gain1), None)
        if config.router == "static":
            ffn = _fold_static(block, identity, folded["ffn"], folded["stream"])
        else:
            ffn = _fold_routed(block, identity, folded["ffn"])
            block.thin_ffn = ThinPath(folded["ffn"], like)
            block.thin_stream = None if folded["stream"] is None else ThinPath(folded["stream"], like)
        setattr(block, pattern.ffn, ffn)
        delattr(block, pattern.norm2)
        block.__class__ = student_class(MergedBlock, original)
    delattr(block, pattern.norm1)
    del block.pia_ffn, block.pia_stream


def _double(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if tensor is None else tensor.double()


def _projections(block: Any) -> tuple[list[nn.Linear], nn.Linear, nn.Module]:
    pattern, ffn = block.eas_pattern, getattr(block, block.eas_pattern.ffn)
    first = [getattr(ffn, name) for name in pattern.ffn_in]
    return first, getattr(ffn, pattern.ffn_out), getattr(ffn, pattern.activation)


def _fold_static(
    block: Any, identity: tuple[Tensor, Tensor | None], correction: FoldedPia, stream: FoldedPia | None
) -> FoldedFfn:
    """FFN(g2 ⊙ (i(u) + Δf) + b2), plus Δr as linear neurons, as one FFN that reads u.

    With i(u) = g u + b and Δf = U (R u + r + p) + u0 (design §3), each first projection W, β becomes
        W' = W G2 (diag g + U R),   β' = β + W (G2 (b + U r + u0) + b2),   per sample + W G2 U p.
    Δr = U (R u + r + p) + u0 becomes neurons R u + r + p behind an activation that is linear for them, with down
    columns U: a gate with weight 0 and bias act⁻¹(1), or pairs ± when the FFN is not gated.
    """
    pattern = block.eas_pattern
    first, out, activation = _projections(block)
    _, gain2, shift2 = split_norm(getattr(block, pattern.norm2))
    g2, g = gain2.double().unsqueeze(1), identity[0].double()
    up = correction.ups[0]
    mixed = g2 * (torch.diag(g) + up @ correction.down)
    constant = _double(identity[1], g) + up @ correction.down_bias + correction.up_biases[0]
    constant = g2.squeeze(1) * constant + _double(shift2, g)
    weights = [layer.weight.double() @ mixed for layer in first]
    biases = [layer.weight.double() @ constant + _double(layer.bias, layer.weight[:, 0]) for layer in first]
    injects = [layer.weight.double() @ (g2 * up) for layer in first]
    out_weight, out_bias = out.weight.double(), _double(out.bias, out.weight[:, 0])
    pools = [] if correction.pool is None else [correction.pool]
    if stream is not None:
        columns, blank = stream.ups[0], torch.zeros_like(stream.down)
        rank = columns.shape[1]
        if pattern.gated:
            rows = [(blank, torch.full_like(stream.down_bias, constant_gate(activation)), 0.0)]
            rows.append((stream.down, stream.down_bias, 1.0))
            out_weight = torch.cat([out_weight, columns], dim=1)
        else:
            check_odd_part(activation)
            both = torch.cat([stream.down, -stream.down])
            rows = [(both, torch.cat([stream.down_bias, -stream.down_bias]), 1.0)]
            out_weight = torch.cat([out_weight, columns, -columns], dim=1)
        out_bias = out_bias + stream.up_biases[0]
        if stream.pool is not None:
            pools.append(stream.pool)
        eye = torch.eye(rank, dtype=torch.float64, device=columns.device)
        for i, (weight, bias, through) in enumerate(rows):
            lower = through * (eye if pattern.gated else torch.cat([eye, -eye]))
            injects[i] = torch.block_diag(injects[i], lower)
            weights[i], biases[i] = torch.cat([weights[i], weight]), torch.cat([biases[i], bias])
    ffn = FoldedFfn((*pattern.ffn_in, pattern.ffn_out), activation)
    for name, weight, bias in zip(pattern.ffn_in, weights, biases, strict=True):
        setattr(ffn, name, linear(weight, None if pools else bias, out.weight))
    keep_bias = out.bias is not None or stream is not None
    setattr(ffn, pattern.ffn_out, linear(out_weight, out_bias if keep_bias else None, out.weight))
    if pools:
        ffn.pool = linear(torch.cat(pools), None, out.weight)
        ffn.inject = linear(torch.cat(injects), torch.cat(biases), out.weight)
    return ffn


def _fold_routed(block: Any, identity: tuple[Tensor, Tensor | None], correction: FoldedPia) -> FoldedFfn:
    """FFN(g2 ⊙ v + b2) for v = i(u) + Δ: the norm's affine part folds, the routed Δ stays a thin path in front.

    On the `paper` identity path the constant b1 folds too, while g1 ⊙ u stays a product (`thin_gain`): dividing it
    out of W would need g1 ≠ 0.
    """
    pattern = block.eas_pattern
    first, out, activation = _projections(block)
    _, gain2, shift2 = split_norm(getattr(block, pattern.norm2))
    gain, shift = identity
    if block.eas_config.identity == "paper":
        block.thin_gain = nn.Parameter(gain.detach().clone(), requires_grad=False)
    g2 = gain2.double()
    constant = g2 * _double(shift, g2) + _double(shift2, g2)
    ffn = FoldedFfn((*pattern.ffn_in, pattern.ffn_out), activation)
    for name, layer in zip(pattern.ffn_in, first, strict=True):
        weight = layer.weight.double()
        bias = weight @ constant + _double(layer.bias, layer.weight[:, 0])
        setattr(ffn, name, linear(weight * g2, bias, out.weight))
    setattr(ffn, pattern.ffn_out, out)
    return ffn


def _merge_adapted(block: Any, adapted: AdaptedNorm, pattern: Any) -> None:
    """W (x̂ + U (C x̂ + c) + u0) = W (I + U C) x̂ + W (U c + u0), for each of q, k and v."""
    adapter: Any = adapted.adapter
    weight = getattr(getattr(block, pattern.attention), pattern.qkv[0]).weight
    folded = fold_pia(adapter, torch.ones_like(weight[0]), None, pooled=False)
    if folded.router is not None:
        adapted.adapter = ThinPath(folded, weight)
        return
    attention = getattr(block, pattern.attention)
    constant = folded.ups[0] @ folded.down_bias + folded.up_biases[0]
    for name in pattern.qkv:
        layer = getattr(attention, name)
        w = layer.weight.double()
        bias = _double(layer.bias, layer.weight[:, 0]) + w @ constant
        setattr(attention, name, linear(w + (w @ folded.ups[0]) @ folded.down, bias, layer.weight))
    setattr(block, pattern.norm1, adapted.norm)


@dataclass(frozen=True)
class MergeReport:
    """Largest absolute difference per output, the tolerance it was held against and where it occurred."""

    differences: dict[str, float]
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest difference over all outputs."""
        return max(self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def verify_merge(
    student: nn.Module, merged: nn.Module, inputs: Mapping[str, Tensor], tolerance: float = 1e-4
) -> MergeReport:
    """Compare two models on the same inputs, e.g. a student and its merged form.

    Args:
        student: the reference.
        merged: the model that must agree with it.
        inputs: keyword arguments of `forward`.
        tolerance: largest absolute difference allowed. 1e-4 suits float32: folded weights round once more per layer.

    Raises:
        VerificationError: a difference above the tolerance, or not finite; its `report` holds all of them.
    """
    outputs = []
    for model in (student, merged):
        training = model.training
        try:
            model.eval()
            with torch.no_grad():
                outputs.append(model(**inputs))
        finally:
            model.train(training)
    differences = {
        name: (first - second).abs().max().item()
        for name, first in outputs[0].items()
        if isinstance(first, Tensor) and isinstance(second := outputs[1].get(name), Tensor)
    }
    report = MergeReport(differences, tolerance)
    worst = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e38)
    if not differences[worst] <= tolerance:
        raise VerificationError(
            f"{worst} differs by {differences[worst]:.3g} between the two models; expected at most {tolerance:g}: "
            "do not use the merged model, report the configuration",
            report,
        )
    return report
