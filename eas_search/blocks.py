"""Skipped blocks: pre-norm blocks whose parts are all understood, with a PIA where the configuration puts it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eas_search.architectures.calls import CallForm
from eas_search.architectures.norms import AffineForm, Normalise, affine_form, split_norm
from eas_search.architectures.recompose import ffn_of, run_ffn
from eas_search.architectures.sites import AttentionSite
from eas_search.context import TokenContext
from eas_search.exceptions import UnsupportedModelError
from eas_search.parts import StudentPart, become, delta, pia_for, refuse_decoding
from eas_search.pia import Pia
from eas_search.pooling import PoolSession
from eas_search.skip_config import SkipConfig
from eas_search.stand_ins import stand_in


class StudentBlock(StudentPart):
    """What skipped and merged blocks have in common: a slot in the cache and a shared token context."""

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """The block's function on the residual stream x [B, n, d]."""
        raise AssertionError("a student block is either skipped or merged")

    @property
    def computes_alone(self) -> bool:
        """Whether what it makes of a token depends on that token alone: nothing attends, and nothing is pooled."""
        config: Any = self.eas_config
        return self.eas_site.causal and (self.eas_context.pooling == "none" or config.pia_dim == 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, n, d] → [B, n, d]; masks, positions and the cache of the attention are not needed."""
        form, site, context = self.eas_form, self.eas_site, self.eas_context
        x = form.first(args, kwargs)
        asked = context.now.asked
        if asked is None or site.layer < asked.since:
            y = self.transform(x, context.session(site.layer, x))
        else:
            y = asked.update(x, lambda tokens: self.transform(tokens, PoolSession("none")))
        self.advance(x)
        return form.pack(y, args, kwargs)

    def run_ffn(self, v: Tensor) -> Tensor:
        """The block's own FFN with whatever norm stands behind it."""
        pattern, form = self.eas_site.pattern, self.eas_site.ffn
        assert form is not None
        if pattern.ffn == ".":
            return self.leave(run_ffn(self, form, v))
        return self.leave(CallForm.unpack(getattr(self, pattern.ffn)(v)))

    def leave(self, value: Tensor) -> Tensor:
        """The FFN's output on its way to the residual stream."""
        post = self.eas_site.pattern.post_ffn
        return getattr(self, post)(value) if post else value


class SkippedBlock(StudentBlock):
    """A block whose attention is not computed, with a PIA in the place that the configuration names.

    Placements (x̂ = norm1(x), u = x without scale, g2 and b2 the affine part of norm2):
        `ffn`: y = x + FFN(g2 ⊙ (i + Δf) + b2), i = x̂ (`paper`) or u (`noop`)
        `residual`: h = x + Δr, y = h + FFN(norm2(h)); norm2(x) where attention and FFN stand side by side
        `parallel`: y = x + Δr + FFN(g2 ⊙ (i + Δf) + b2)
    A PIA of rank 0 leaves plain deletion: y = x + FFN(norm2(x)).
    """

    eas_config: SkipConfig
    eas_affine: AffineForm
    normalise: Normalise
    pia_ffn: Pia | None
    pia_stream: Pia | None

    def transform(self, x: Tensor, session: PoolSession) -> Tensor:
        """See the class."""
        pattern, config = self.eas_site.pattern, self.eas_config
        norm2 = getattr(self, pattern.norm2)
        if config.pia_dim == 0:
            return x + self.run_ffn(norm2(x))
        x_hat = getattr(self, pattern.norm1)(x)
        # A supernet's block has the PIAs of all placements; the configuration says which of them count.
        stream = x
        if config.placement != "ffn":
            assert self.pia_stream is not None
            stream = x + delta(self.pia_stream, x_hat, session, "stream")
        if config.placement == "residual":
            return stream + self.run_ffn(norm2(stream if self.eas_site.residual == "sequential" else x))
        assert self.pia_ffn is not None
        identity = x_hat if config.identity == "paper" else self.normalise(x)
        return stream + self.run_ffn(
            self.eas_affine.apply(norm2, identity + delta(self.pia_ffn, x_hat, session, "ffn"))
        )


class SupernetBlock(SkippedBlock):
    """A block that is both: skipped while `skipping` is set, else the original with its attention."""

    skipping: bool = False

    @property
    def computes_alone(self) -> bool:
        """See `StudentBlock.computes_alone`."""
        return self.skipping and super().computes_alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `StudentBlock.forward` and the original class."""
        if self.skipping:
            refuse_decoding(self.eas_context)
            return super().forward(*args, **kwargs)
        return super(StudentPart, self).forward(*args, **kwargs)


def skip_site(
    model: nn.Module, site: AttentionSite, config: SkipConfig, context: TokenContext, supernet: bool = False
) -> None:
    """Skip one attention in place: PIAs are added where needed and the attention is deleted.

    With `supernet` the attention stays and can be switched, see `SupernetBlock` and `SupernetStandIn`.

    Raises:
        UnsupportedModelError: the site cannot have this placement.
    """
    if config.pia_dim > 0 and config.placement == "ffn" and not site.whole and not supernet:
        raise UnsupportedModelError(
            f"placement 'ffn' at {site.name}: {site.merge_refusal}; expected placement 'residual', or 'parallel', "
            "which is its residual half there: choose one of them or leave the site in"
        )
    if site.whole:
        _skip_block(model.get_submodule(site.block), site, config, context, supernet)
    else:
        stand_in(model, site, config, context, supernet)


def _skip_block(
    block: nn.Module, site: AttentionSite, config: SkipConfig, context: TokenContext, supernet: bool
) -> None:
    pattern = site.pattern
    device = next(ffn_of(block, pattern.ffn).parameters()).device
    if config.pia_dim > 0:
        for name, wanted in (("pia_ffn", {"ffn", "parallel"}), ("pia_stream", {"residual", "parallel"})):
            pia = pia_for(config, site.width, context.pooling) if config.placement in wanted else None
            setattr(block, name, None if pia is None else pia.to(device))
        if config.placement != "residual":
            block.normalise = split_norm(getattr(block, pattern.norm1), site.width)[0]
            block.eas_affine = affine_form(getattr(block, pattern.norm2), site.width)  # type: ignore[assignment]
    if not supernet:
        delattr(block, pattern.attention.split(".")[0])
    become(block, SupernetBlock if supernet else SkippedBlock, site, context).eas_config = config
