"""What every replaced module of a student has in common, and kept attentions with a light adapter.

All parts of a student are the original modules with `forward` replaced and what is no longer needed removed. They stay
instances of the original class, which `transformers` looks for when it records hidden states or checkpoints gradients.
"""

from __future__ import annotations

from functools import cache as memoise
from typing import Any

from torch import Tensor, nn

from eas_search.architectures.calls import CallForm, call_form
from eas_search.architectures.sites import AttentionSite
from eas_search.context import TokenContext
from eas_search.dispatch import change_class
from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.pia import Pia, PiaShape
from eas_search.pooling import PoolSession
from eas_search.skip_config import SkipConfig


class StudentPart(nn.Module):
    """What all of them have in common: a site, its token context, and the class that they were."""

    eas_context: TokenContext
    eas_site: AttentionSite

    @property
    def original(self) -> Any:
        """The class that this module was before."""
        return next(kind for kind in type(self).__mro__ if not issubclass(kind, StudentPart))

    @property
    def eas_form(self) -> CallForm:
        """How the original is called."""
        return call_form(self.original)

    def pooled(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PoolSession, Tensor | None]:
        """The means of a call of the attention on x [B, n, d], and the other stream if they are taken over that."""
        form, site = self.eas_form, self.eas_site
        other = other_stream(form, args, kwargs) if site.kind == "cross" else None
        if other is not None and len(other) != len(x):
            raise UnsupportedModelError(
                f"the other stream of {site.name!r} has {len(other)} rows for {len(x)} samples; expected one each, to "
                "pool over: choose pooling 'none', or leave this site in"
            )
        mask = form.argument("attention_mask", args, kwargs)
        return self.eas_context.session(site.layer, x if other is None else other, mask), other

    def advance(self, x: Tensor) -> None:
        """Count the tokens that pass a site which stores no keys."""
        if self.eas_site.causal:
            self.eas_context.advance(self.eas_site.layer, x.shape[1])


def delta(pia: nn.Module, x_hat: Tensor, session: PoolSession, key: str, other: Tensor | None = None) -> Tensor:
    """Δ, computed in the adapter's own precision (float32 over a half-precision base)."""
    dtype = next(pia.parameters()).dtype
    pooled = None if other is None else other.to(dtype)
    return pia(x_hat.to(dtype), session, key, pooled).to(x_hat.dtype)


def other_stream(form: CallForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a cross-attention looks at, [B, m, d'].

    Raises:
        UnsupportedModelError: the call has none under a known name.
    """
    names = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "context", "memory")
    found = next((value for name in names if (value := form.argument(name, args, kwargs)) is not None), None)
    if found is None:
        raise UnsupportedModelError(
            f"a cross-attention was called without any of {', '.join(names)}; expected the other stream: leave it in"
        )
    return found


@memoise
def student_class(role: type[StudentPart], original: type[nn.Module]) -> type[nn.Module]:
    """The class of a student's part: `role`'s forward on what is still an instance of `original`."""
    return type(f"{role.__name__}{original.__name__}", (role, original), {"__module__": role.__module__})


def original_class(module: nn.Module) -> Any:
    """The class that says how a module is called, whatever part of a student it may have become."""
    return module.original if isinstance(module, StudentPart) else type(module)


def become(module: nn.Module, role: type[StudentPart], site: AttentionSite, context: TokenContext) -> Any:
    """Give `module` the role in place; returns it."""
    change_class(module, student_class(role, original_class(module)))  # type: ignore[arg-type]
    module.eas_site, module.eas_context = site, context  # type: ignore[assignment]
    return module


def pia_for(config: SkipConfig, width: int, pooling: str) -> Pia:
    """A fresh PIA as `config` describes it; its up-projections are zero, so it adds nothing yet."""
    return _adapter(config, width=width, rank=config.pia_dim, pooled=pooling != "none")


def light_adapter_for(config: SkipConfig, width: int) -> Pia:
    """A fresh light adapter: no pooled term, bottleneck z = C x̂ + c."""
    return _adapter(config, width=width, rank=config.adapter_dim, pooled=False, mix=1.0)


def _adapter(config: SkipConfig, **own: Any) -> Pia:
    """What all adapters of a student have in common, and what is this one's own."""
    common = {name: getattr(config, name) for name in ("groups", "scale", "temperature", "router")}
    return Pia(PiaShape(**common, **own))


class AdaptedAttention(StudentPart):
    """A kept attention that reads x̂ + Δ(x̂), with a light adapter Δ."""

    eas_adapter: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the original class."""
        args, kwargs = self.adapted(args, kwargs)
        return super(StudentPart, self).forward(*args, **kwargs)

    def adapted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with the light adapter's Δ added to the hidden states."""
        form = self.eas_form
        x = form.first(args, kwargs)
        session, other = self.pooled(x, args, kwargs)
        x = x + delta(self.eas_adapter, x, session, "adapter", other)
        name = form.parameters[0]
        return (args, {**kwargs, name: x}) if name in kwargs else ((x, *args[1:]), kwargs)


class SparingFfn(StudentPart):
    """An FFN that takes its tokens one by one: behind the last attention, only those that are asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the original class; what it gives for tokens that reach nothing is 0."""
        forward, now = super(StudentPart, self).forward, self.eas_context.now
        asked = now.asked
        here = asked is not None and self.eas_site.layer == asked.since - 1
        if asked is None or not here or len(args) + len(kwargs) != 1:  # who gives it more may mean single tokens
            return forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if x.shape[:-1] != now.shape:
            return forward(*args, **kwargs)
        return asked.alone(x, lambda tokens: forward(tokens) if args else forward(**dict.fromkeys(kwargs, tokens)))


def adapt_attention(model: nn.Module, site: AttentionSite, config: SkipConfig, context: TokenContext) -> None:
    """Put a fresh light adapter in front of a kept attention, in place."""
    attention = become(model.get_submodule(site.name), AdaptedAttention, site, context)
    attention.eas_adapter = light_adapter_for(config, site.width).to(next(attention.parameters()).device)


def refuse_decoding(context: TokenContext) -> None:
    """A supernet has no cache slots for sites that are skipped now and kept a moment later."""
    if context.cache is not None:
        raise ConfigError("a supernet does not decode; expected use_cache=False: make a student with `inherit`")
