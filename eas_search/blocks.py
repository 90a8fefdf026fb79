"""The blocks of a student: skipped ones, and the norm with a light adapter of kept ones.

A skipped block is the original block object with its attention removed, a PIA added and `forward` replaced. It stays an
instance of the original class, which `transformers` looks for when it records hidden states or checkpoints gradients.
"""

from __future__ import annotations

from functools import cache as memoise
from typing import Any

from torch import Tensor, nn

from eas_search.architectures.norms import Normalise, split_norm
from eas_search.architectures.patterns import BlockPattern
from eas_search.architectures.sites import AttentionSite
from eas_search.context import TokenContext
from eas_search.exceptions import ConfigError
from eas_search.pia import Pia, PiaShape
from eas_search.pooling import PoolSession
from eas_search.skip_config import SkipConfig


class StudentBlock(nn.Module):
    """What skipped and merged blocks have in common: a slot in the cache and a shared token context."""

    eas_context: TokenContext
    eas_layer: int
    eas_causal: bool
    eas_pattern: BlockPattern

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """The block's function on the residual stream x [B, n, d]."""
        raise AssertionError("a student block is either skipped or merged")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, n, d] → [B, n, d]; masks, positions and the cache of the attention are not needed."""
        context, layer = self.eas_context, self.eas_layer
        y = self.transform(hidden_states, context.session(layer))
        if self.eas_causal:
            context.advance(layer, hidden_states.shape[1])
        return y


class SkippedBlock(StudentBlock):
    """A block whose attention is not computed, with a PIA in the place that the configuration names.

    Placements (x̂ = norm1(x), u = x without scale, g2 and b2 the affine part of norm2):
        `ffn`: y = x + FFN(g2 ⊙ (i + Δf) + b2), i = x̂ (`paper`) or u (`noop`)
        `residual`: h = x + Δr, y = h + FFN(norm2(h))
        `parallel`: y = x + Δr + FFN(g2 ⊙ (i + Δf) + b2)
    A PIA of rank 0 leaves plain deletion: y = x + FFN(norm2(x)).
    """

    eas_config: SkipConfig
    normalise: Normalise
    pia_ffn: Pia | None
    pia_stream: Pia | None

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """See the class."""
        pattern, config = self.eas_pattern, self.eas_config
        norm2, ffn = getattr(self, pattern.norm2), getattr(self, pattern.ffn)
        if config.pia_dim == 0:
            return x + ffn(norm2(x))
        norm1 = getattr(self, pattern.norm1)
        # In a supernet the block also has a light adapter, which belongs to its attention; a PIA reads the bare norm.
        x_hat = norm1.norm(x) if isinstance(norm1, AdaptedNorm) else norm1(x)
        # A supernet's block has the PIAs of all placements; the configuration says which of them count.
        stream = x
        if config.placement != "ffn":
            assert self.pia_stream is not None
            stream = x + _delta(self.pia_stream, x_hat, session, "stream")
        if config.placement == "residual":
            return stream + ffn(norm2(stream))
        assert self.pia_ffn is not None
        identity = x_hat if config.identity == "paper" else self.normalise(x)
        v = (identity + _delta(self.pia_ffn, x_hat, session, "ffn")) * norm2.weight
        shift = getattr(norm2, "bias", None)
        return stream + ffn(v if shift is None else v + shift)


def _delta(pia: nn.Module, x_hat: Tensor, session: PoolSession, key: str) -> Tensor:
    """Δ, computed in the adapter's own precision (float32 over a half-precision base)."""
    dtype = next(pia.parameters()).dtype
    return pia(x_hat.to(dtype), session, key).to(x_hat.dtype)


class AdaptedNorm(nn.Module):
    """norm1 followed by a light adapter: x̂ + Δ(x̂), which the kept attention reads."""

    def __init__(self, norm: nn.Module, adapter: nn.Module, context: TokenContext, layer: int) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter
        self.eas_context, self.eas_layer = context, layer

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, d] → [B, n, d]."""
        x_hat = self.norm(x)
        return x_hat + _delta(self.adapter, x_hat, self.eas_context.session(self.eas_layer), "adapter")


@memoise
def student_class(role: type[StudentBlock], block: type[nn.Module]) -> type[nn.Module]:
    """The class of a student block: `role`'s forward on what is still an instance of `block`."""
    return type(f"{role.__name__}{block.__name__}", (role, block), {"__module__": role.__module__})


def pia_for(config: SkipConfig, width: int, pooling: str) -> Pia:
    """A fresh PIA as `config` describes it; its up-projections are zero, so it adds nothing yet."""
    return Pia(
        PiaShape(
            width=width,
            rank=config.pia_dim,
            groups=config.groups,
            scale=config.scale,
            temperature=config.temperature,
            router=config.router,
            pooled=pooling != "none",
        )
    )


def light_adapter_for(config: SkipConfig, width: int) -> Pia:
    """A fresh light adapter: no pooled term, bottleneck z = C x̂ + c."""
    return Pia(
        PiaShape(
            width=width,
            rank=config.adapter_dim,
            groups=config.groups,
            scale=config.scale,
            temperature=config.temperature,
            router=config.router,
            pooled=False,
            mix=1.0,
        )
    )


class SupernetBlock(SkippedBlock):
    """A block that is both: skipped while `skipping` is set, else the original with its attention."""

    skipping: bool = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `StudentBlock.forward` and the original class."""
        if self.skipping:
            if self.eas_context.cache is not None:
                raise ConfigError("a supernet does not decode; expected use_cache=False: make a student with `inherit`")
            return super().forward(hidden_states, *args, **kwargs)
        return super(StudentBlock, self).forward(hidden_states, *args, **kwargs)


def skip_block(
    block: nn.Module, site: AttentionSite, config: SkipConfig, context: TokenContext, supernet: bool = False
) -> None:
    """Turn `block` into a skipped block in place: PIAs are added where needed, its attention is deleted.

    With `supernet` the attention stays and the block can be switched, see `SupernetBlock`.
    """
    pattern = site.pattern
    if config.pia_dim > 0:
        weight = getattr(block, pattern.norm2).weight
        for name, wanted in (("pia_ffn", {"ffn", "parallel"}), ("pia_stream", {"residual", "parallel"})):
            pia = pia_for(config, weight.shape[0], context.pooling) if config.placement in wanted else None
            setattr(block, name, None if pia is None else pia.to(weight.device))
        if config.placement != "residual":
            norm1 = getattr(block, pattern.norm1)
            normalise, _, _ = split_norm(norm1.norm if isinstance(norm1, AdaptedNorm) else norm1)
            split_norm(getattr(block, pattern.norm2))  # refuses norms whose affine part cannot be used alone
            block.normalise = normalise
    if not supernet:
        delattr(block, pattern.attention)
    block.eas_context, block.eas_layer = context, site.layer  # type: ignore[assignment]
    block.eas_causal, block.eas_pattern = site.causal, pattern  # type: ignore[assignment]
    block.eas_config = config  # type: ignore[assignment]
    original: Any = type(block)
    block.__class__ = student_class(SupernetBlock if supernet else SkippedBlock, original)
