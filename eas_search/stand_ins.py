"""Stand-ins: what takes an attention's place where nothing else of its block is understood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from eas_search.architectures.calls import CallForm
from eas_search.architectures.sites import AttentionSite
from eas_search.context import TokenContext
from eas_search.exceptions import UnsupportedModelError
from eas_search.parts import AdaptedAttention, StudentPart, become, delta, light_adapter_for, pia_for, refuse_decoding
from eas_search.skip_config import SkipConfig


class StandIn(StudentPart):
    """In the place of an attention: Δ(x̂) for its input x̂, and the rest of the block stays as it is.

    This is placement `residual` for blocks of whatever form; a PIA of rank 0, whose Δ is zero, is plain deletion. A
    cross-attention's PIA pools over the *other* stream.
    """

    eas_config: SkipConfig
    pia_stream: nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention is called with → what it returns."""
        form, site = self.eas_form, self.eas_site
        if site.kind == "cross":
            refuse_shared_cache(form.argument("past_key_values", args, kwargs), site.name)
        x = stand_in_input(form, site, args, kwargs)
        if self.pia_stream is None or self.eas_config.pia_dim == 0:
            added = torch.zeros_like(x)
        else:
            tokens = x if x.dim() == 3 else x.reshape(-1 if x.dim() > 3 else 1, *_plane(x), x.shape[-1])
            session, other = self.pooled(tokens, args, kwargs)
            added = delta(self.pia_stream, tokens, session, "stream", other).reshape(x.shape)
        self.advance(x)
        if site.pattern.adds:
            added = added + form.argument(site.pattern.adds, args, kwargs)
        return form.pack(added, args, kwargs)


def refuse_shared_cache(cache: object, name: str) -> None:
    """A cross-attention may only be skipped where its keys and values are kept apart from the decoder's own.

    Else (Mllama) they say whether its block runs at all while decoding, and a skipped one has none.

    Raises:
        UnsupportedModelError: `cache` is that of the decoder.
    """
    if isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache):
        raise UnsupportedModelError(
            f"the cross-attention {name!r} shares the decoder's KV cache, which decides whether its block runs at all; "
            "expected a cache of its own: leave this site in, or decode with use_cache=False"
        )


def stand_in_input(form: CallForm, site: AttentionSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """x̂ of a stand-in: what the attention reads, or what its pattern says instead."""
    x = form.argument(site.pattern.reads, args, kwargs) if site.pattern.reads else None
    return form.first(args, kwargs) if x is None else x


def _plane(x: Tensor) -> tuple[int, ...]:
    """Tokens of a map [B, H, W, d] as one row of H·W; packed tokens [n, d] as one row of n."""
    return (x.shape[1] * x.shape[2],) if x.dim() == 4 else (x.shape[0],)


class LeftOut(StudentPart):
    """A projection behind a stand-in, which already gives what goes to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x

    def extra_repr(self) -> str:
        """Nothing: what the original would show is gone."""
        return ""


class SupernetStandIn(StandIn, AdaptedAttention):
    """An attention that is both: a stand-in while `skipping` is set, else itself, with a light adapter or none."""

    skipping: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `StandIn.forward` and the original class."""
        if self.skipping:
            refuse_decoding(self.eas_context)
            return StandIn.forward(self, *args, **kwargs)
        if getattr(self, "eas_adapter", None) is not None:
            args, kwargs = self.adapted(args, kwargs)
        return super(StudentPart, self).forward(*args, **kwargs)


class SupernetLeftOut(LeftOut):
    """A projection that is left out while the attention in front of it is skipped."""

    eas_attention: tuple[SupernetStandIn]

    def forward(self, x: Tensor) -> Tensor:
        """See the original class."""
        return x if self.eas_attention[0].skipping else super(StudentPart, self).forward(x)


def stand_in(model: nn.Module, site: AttentionSite, config: SkipConfig, context: TokenContext, supernet: bool) -> None:
    """Put a stand-in in the place of one attention; with `supernet` the attention stays and can be switched."""
    attention: Any = model.get_submodule(site.name)
    device = next(attention.parameters()).device
    writer: Any = model.get_submodule(f"{site.block}.{site.pattern.writer}") if site.pattern.writer else None
    if supernet:
        become(attention, SupernetStandIn, site, context)
        if writer is not None:
            # In a tuple, so that the writer does not own the attention a second time.
            become(writer, SupernetLeftOut, site, context).eas_attention = (attention,)
    else:
        become(_emptied(attention), StandIn, site, context)
        if writer is not None:
            become(_emptied(writer), LeftOut, site, context)
    if supernet and config.adapter_dim > 0 and config.adapter == "light" and site.adaptable:
        attention.eas_adapter = light_adapter_for(config, site.width).to(device)
    attention.pia_stream = None
    if config.pia_dim > 0:
        attention.pia_stream = pia_for(config, site.width, context.pooling).to(device)
    attention.eas_config = config


def _emptied(module: nn.Module) -> nn.Module:
    """The module without its parameters, buffers and submodules."""
    for tensors in (module._parameters, module._buffers, module._modules):
        tensors.clear()
    return module
