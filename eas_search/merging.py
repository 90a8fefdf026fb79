"""Merging: PIAs become part of the FFN's weights, light adapters part of the query, key and value projections.

Exact for any batch, and nothing is rewritten per prompt. With a static router the merged layer is one norm without
affine part and one FFN; the pooled term, where there is one, costs a vector or two per sample. A routed PIA, one placed
`residual`, and one that undoes what it stands beside keep two thin products.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eas_search.architectures import AttentionSite
from eas_search.architectures.norms import Normalise, split_norm
from eas_search.architectures.recompose import ffn_of
from eas_search.blocks import SkippedBlock, StudentBlock
from eas_search.dispatch import change_class
from eas_search.exceptions import ConfigError, VerificationError
from eas_search.ffn_folding import cancels, dense, fold_routed, fold_static
from eas_search.folding import ThinPath, carries_linear, fold_pia, linear
from eas_search.head import settle_head
from eas_search.lora import merge_lora
from eas_search.parts import AdaptedAttention, become
from eas_search.pia import Pia
from eas_search.pooling import PoolSession
from eas_search.skipping import share_copy
from eas_search.stand_ins import StandIn

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
        # With nothing beside the FFN, that takes the factor and multiplies only once, where it adds its pooled term.
        alone = self.thin_ffn is None and self.thin_stream is None
        scale = self.normalise.scale(x) if alone else None
        u = x if scale is not None else self.normalise(x)
        y = x if self.thin_stream is None else x + self.thin_stream(u, session, "stream")
        v = u
        if self.thin_ffn is not None:
            v = u if self.thin_gain is None else u * self.thin_gain
            v = v + self.thin_ffn(u, session, "ffn")
        pattern = self.eas_site.pattern
        ffn = getattr(self, folded_name(pattern.ffn))
        if pattern.post_ffn:  # a norm between the FFN and the residual stream
            return y + self.leave(ffn(v, session, None, scale))
        return ffn(v, session, y, scale)


class MergedResidualBlock(StudentBlock):
    """h = x + thin(u), y = h + FFN(norm2(h)): the second norm sees Δ, so the PIA stays two thin products."""

    normalise: Normalise
    thin_stream: ThinPath

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """See the class."""
        h = x + self.thin_stream(self.normalise(x), session, "stream")
        norm2 = getattr(self, self.eas_site.pattern.norm2)
        return h + self.run_ffn(norm2(h if self.eas_site.residual == "sequential" else x))


def folded_name(ffn: str) -> str:
    """Under which name a block keeps its merged FFN."""
    return "merged_ffn" if ffn == "." else ffn


def merge(student: Model, thin: Collection[str] | None = None) -> Model:
    """The student with its adapters folded into plain weights; a new tree, the student is untouched.

    Args:
        student: made by `apply_skips`.
        thin: names of the sites whose PIA is to stay two thin products although its form could fold; None: those that
            would not be exact. What was decided is kept in `.eas.thin`: a model that gets its weights later must be
            given the same form.

    Raises:
        ConfigError: `student` was not made by `apply_skips`, or is merged already.
        UnsupportedModelError: the FFN that a PIA would fold into is quantised.
    """
    info = getattr(student, "eas", None)
    if info is None or info.merged:
        state = "already merged" if info is not None else "not a student"
        raise ConfigError(f"the model is {state}; expected the result of `apply_skips`, not yet merged")
    merged, kept = share_copy(student), list[str]()
    for site in info.sites:
        host = merged.get_submodule(site.host)
        if isinstance(host, SkippedBlock):
            if host.eas_config.pia_dim > 0 and _merge_skipped(host, None if thin is None else site.name in thin):
                kept.append(site.name)
        elif isinstance(host, StandIn):
            if host.eas_config.pia_dim > 0:
                _merge_stand_in(host, _precision(merged, site))
        elif isinstance(attention := merged.get_submodule(site.name), AdaptedAttention):
            _merge_adapted(attention, _precision(merged, site))
    merge_lora(merged)
    settle_head(merged, _precision(merged, info.sites[0]))  # behind the text tower, where there is one
    merged.eas = replace(info, merged=True, thin=tuple(kept))
    return merged


def _precision(merged: nn.Module, site: AttentionSite) -> torch.dtype:
    """The dtype of the weights around a site; other parts of the model may have been loaded in another one.

    Adapters, which are float32 over any base, do not count, and neither does what is packed into eight bits or fewer.
    """
    for tree in (merged.get_submodule(site.block), merged):
        adapters = {id(own) for part in tree.modules() if isinstance(part, Pia) for own in part.parameters()}
        for weight in tree.parameters():
            if weight.is_floating_point() and weight.itemsize > 1 and id(weight) not in adapters:
                return weight.dtype
    raise AssertionError("a model without weights has no sites")


def stream_folds(block: Any) -> bool:
    """Whether Δr can be linear neurons of the block's FFN; otherwise it stays two thin products.

    They must be linear behind its activation, and nothing may stand between the FFN and the residual stream.
    """
    site = block.eas_site
    activation = getattr(ffn_of(block, site.pattern.ffn), site.ffn.activation)
    return not site.pattern.post_ffn and carries_linear(activation, site.ffn.gated)


def _merge_stand_in(attention: Any, dtype: torch.dtype) -> None:
    """The PIA reads x̂ as the block makes it, so nothing but its own two products is left to fold."""
    pia = attention.pia_stream
    ones = torch.ones_like(pia.down.weight[0])
    pooled = attention.eas_context.pooling != "none"
    attention.pia_stream = ThinPath(fold_pia(pia, ones, None, pooled), pia.down.weight.to(dtype))


def _merge_skipped(block: Any, thin: bool | None) -> bool:
    """Merge a skipped block; True when a static PIA stays two thin products, as `thin` wants it or exactness."""
    site, config = block.eas_site, block.eas_config
    pattern, context = site.pattern, block.eas_context
    normalise, gain1, shift1 = split_norm(getattr(block, pattern.norm1), site.width)
    pooled = context.pooling != "none"
    folded: Any = {
        name: None if pia is None else fold_pia(pia, gain1, shift1, pooled)
        for name, pia in (("ffn", block.pia_ffn), ("stream", block.pia_stream))
    }
    like = getattr(ffn_of(block, pattern.ffn), site.ffn.out).weight
    block.normalise = normalise
    block.thin_ffn = block.thin_stream = block.thin_gain = None
    kept = False
    if config.placement == "residual":
        block.thin_stream = ThinPath(folded["stream"], like)
        if pattern.norm1 != pattern.norm2:
            delattr(block, pattern.norm1)
        become(block, MergedResidualBlock, site, context)
    else:
        identity = (gain1, shift1) if config.identity == "paper" else (torch.ones_like(gain1), None)
        correction, stream = folded["ffn"], folded["stream"]
        static = config.router == "static"
        kept = static and (cancels(identity, correction) if thin is None else thin)
        thin_stream = stream is not None and (kept or not static or not stream_folds(block))
        if static and not kept:
            ffn = fold_static(block, identity, correction, None if thin_stream else stream)
        else:
            ffn = fold_routed(block, identity, correction)
            block.thin_ffn = ThinPath(correction, like)
        block.thin_stream = ThinPath(stream, like) if thin_stream else None
        if pattern.ffn == ".":
            for name in (*site.ffn.first, site.ffn.out):
                delattr(block, name)
        setattr(block, folded_name(pattern.ffn), ffn)
        for name in {pattern.norm1, pattern.norm2}:
            delattr(block, name)
        become(block, MergedBlock, site, context)
    del block.pia_ffn, block.pia_stream
    return kept


def _merge_adapted(attention: Any, dtype: torch.dtype) -> None:
    """W (x̂ + U (C x̂ + c) + u0) = W (I + U C) x̂ + W (U c + u0), for each of q, k and v.

    An adapter stays where something else reads the attention's input too, or where the weights are quantised.
    """
    site, adapter = attention.eas_site, attention.eas_adapter
    layers = [attention.get_submodule(name) for name in site.qkv]
    folded = fold_pia(adapter, torch.ones_like(adapter.down.weight[0]), None, pooled=False)
    if folded.router is not None or not _reads_alone(attention, layers):
        attention.eas_adapter = ThinPath(folded, adapter.down.weight.to(dtype))
        return
    constant = folded.ups[0] @ folded.down_bias + folded.up_biases[0]
    for name, layer in zip(site.qkv, layers, strict=True):
        weight, bias = dense(layer)
        merged = linear(weight + (weight @ folded.ups[0]) @ folded.down, bias + weight @ constant, layer.weight)
        attention.set_submodule(name, merged)
    del attention.eas_adapter
    change_class(attention, attention.original)


def _reads_alone(attention: Any, layers: list[nn.Module]) -> bool:
    """Whether query, key and value read the hidden states, and no other matrix of the attention does."""
    if {"to_tensor", "key", "keys", "value", "encoder_hidden_states"} & set(attention.eas_form.parameters):
        return False  # keys and values may come from elsewhere
    linears = [part for part in attention.modules() if isinstance(part, nn.Linear | Conv1D)]
    inside = [part for part in linears if not any(part is one for one in attention.eas_adapter.modules())]
    others = len(inside) - len(layers)
    return all(isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_floating_point() for layer in layers) and (
        others <= (0 if attention.eas_site.pattern.writer else 1)
    )


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


def default_tolerance(reference: Tensor, other: Tensor) -> float:
    """Largest difference that is rounding: 1e-4 in float32, where folded weights round once more per layer.

    In half precision the merged model also computes in it what adapters computed in float32: 16 roundings of the
    largest value, which is 0.125 of it in bfloat16 and 0.016 in float16.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (reference, other))
    if eps <= torch.finfo(torch.float32).eps:
        return 1e-4
    return 16 * eps * max(1.0, reference.abs().max().item())


def verify_merge(
    student: nn.Module, merged: nn.Module, inputs: Mapping[str, Tensor], tolerance: float | None = None
) -> MergeReport:
    """Compare two models on the same inputs, e.g. a student and its merged form.

    Args:
        student: the reference.
        merged: the model that must agree with it.
        inputs: keyword arguments of `forward`.
        tolerance: largest absolute difference allowed; None for that of `default_tolerance`.

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
    if tolerance is None:
        tolerance = max(default_tolerance(outputs[0][name], outputs[1][name]) for name in differences)
    report = MergeReport(differences, tolerance)
    worst = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e38)
    if not differences[worst] <= tolerance:
        raise VerificationError(
            f"{worst} differs by {differences[worst]:.3g} between the two models; expected at most {tolerance:g}: "
            "do not use the merged model, report the configuration",
            report,
        )
    return report
