"""Closed-form start of PIAs: reduced-rank least squares on calibration activations, no gradient step.

For every site, ridge regression from (x̂, mean x̂) to what is lost with the attention, reduced to rank r in the output
space (Izenman, "Reduced-rank regression for the multivariate linear model", 1975): the leading directions come first,
so a PIA of smaller rank is a slice of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.calls import CallForm, call_form
from eas_search.architectures.norms import split_norm
from eas_search.context import TokenContext
from eas_search.exceptions import ConfigError
from eas_search.models.calling import without_cache
from eas_search.parts import original_class, other_stream
from eas_search.pia import Pia
from eas_search.pooling import PoolSession
from eas_search.reuse import reusing
from eas_search.skip_config import IdentityPath
from eas_search.stand_ins import stand_in_input
from eas_search.training import on_device


@dataclass
class SiteMoments:
    """First and second moments of a site's features f = (x̂, mean x̂) and targets y, float64.

    Targets: `stream` is the attention's output; `ffn` is normalise2(x + attention) − i(x), what the FFN's input lacks.
    """

    count: float = 0.0
    f: Tensor | None = None
    ff: Tensor | None = None
    y: dict[str, Tensor] = field(default_factory=dict)
    fy: dict[str, Tensor] = field(default_factory=dict)
    yy: dict[str, float] = field(default_factory=dict)

    def add(self, features: Tensor, targets: dict[str, Tensor], weights: Tensor | None = None) -> None:
        """Add samples: features [N, p], targets [N, d] each, weights [N] ≥ 0 (None: all 1)."""
        features = features.double()
        weights = torch.ones_like(features[:, :1]) if weights is None else weights.double().unsqueeze(1)
        weighted = features * weights
        self.count += float(weights.sum())
        self.f = weighted.sum(0) if self.f is None else self.f + weighted.sum(0)
        self.ff = weighted.T @ features if self.ff is None else self.ff + weighted.T @ features
        for name, values in targets.items():
            target = values.double()
            self.y[name] = self.y.get(name, 0.0) + (target * weights).sum(0)
            self.fy[name] = self.fy.get(name, 0.0) + weighted.T @ target
            self.yy[name] = self.yy.get(name, 0.0) + float((target.pow(2) * weights).sum())


def calibrate(
    model: nn.Module,
    sites: Iterable[AttentionSite],
    batches: Iterable[dict[str, Tensor]],
    identity: IdentityPath = "noop",
) -> dict[str, SiteMoments]:
    """Moments of every site of `model` over calibration batches, by site name.

    A token counts as much as the task's loss depends on it: its weight is the norm of the loss's gradient with respect
    to what the attention adds, ‖∂L/∂ attention‖. Most tokens of a deep layer do not matter any
    more; an unweighted fit spends its rank on them (`studies/closed_form` compares the two).

    Args:
        model: a supernet's model that skips nothing, or a student with light adapters at these sites.
        sites: which sites to look at.
        batches: batches as in training; tokens outside the pooled mask do not count. Without labels there is no loss,
            and all tokens count the same.
        identity: the identity path on which the `ffn` target depends.
    """
    recorders = [_Recorder(model, site, SiteMoments(), identity) for site in sites]
    handles = [handle for recorder in recorders for handle in recorder.attach()]
    try:
        model.eval()
        for batch in batches:
            moved = on_device(batch, model)
            with torch.set_grad_enabled("labels" in moved), reusing(model):
                output = model(**moved, **without_cache(model))
            gradients: Sequence[Tensor | None] = [None] * len(recorders)
            if "labels" in moved:
                streams = [recorder.a for recorder in recorders]
                gradients = torch.autograd.grad(output.loss, streams, allow_unused=True)
            for recorder, gradient in zip(recorders, gradients, strict=True):
                recorder.record(gradient)
    finally:
        for handle in handles:
            handle.remove()
    return {recorder.site.name: recorder.moments for recorder in recorders}


class _Recorder:
    """Hooks of one site: remember x, what the attention read (x̂) and what it gave (a)."""

    def __init__(self, model: nn.Module, site: AttentionSite, moments: SiteMoments, identity: IdentityPath) -> None:
        self.block, self.attention = model.get_submodule(site.block), model.get_submodule(site.name)
        host: Any = model.get_submodule(site.host)
        self.context: TokenContext = host.eas_context
        self.writer = model.get_submodule(f"{site.block}.{site.pattern.writer}") if site.pattern.writer else None
        self.site, self.moments, self.identity = site, moments, identity
        self.normalise1 = self.normalise2 = None
        if site.whole:
            norms = (getattr(self.block, name) for name in (site.pattern.norm1, site.pattern.norm2))
            self.normalise1, self.normalise2 = (split_norm(norm, site.width)[0] for norm in norms)
        self.x = self.x_hat = self.a = torch.empty(0)
        self.other: Tensor | None = None
        self.added: Tensor | None = None
        self.mask: Tensor | None = None

    def attach(self) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        """Install the hooks."""
        return (
            self.block.register_forward_pre_hook(self._start, with_kwargs=True),
            self.attention.register_forward_pre_hook(self._attend, with_kwargs=True),
            (self.writer or self.attention).register_forward_hook(self._written),
        )

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = call_form(original_class(module)).first(args, kwargs)

    def _attend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        form = call_form(original_class(module))
        self.x_hat = stand_in_input(form, self.site, args, kwargs)
        self.other = other_stream(form, args, kwargs) if self.site.kind == "cross" else None
        if self.context.streams:
            seen = self.x_hat if self.other is None else self.other
            mask = form.argument("attention_mask", args, kwargs)
            self.mask = self.context.session(self.site.layer, seen, mask).mask
        self.added = form.argument(self.site.pattern.adds, args, kwargs) if self.site.pattern.adds else None

    def _written(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.a = CallForm.unpack(output)
        if torch.is_grad_enabled() and not self.a.requires_grad:
            self.a.requires_grad_()  # nothing before this block is trainable: the graph begins here

    @torch.no_grad()
    def record(self, gradient: Tensor | None) -> None:
        """Add the tokens of the last forward pass, weighted by the norm of `gradient` [B, n, d] (None: all alike)."""
        context, cross = self.context, self.site.kind == "cross"
        # Means as a pass without a cache has them; the pass itself is over.
        mask = self.mask if context.streams else context.mask
        session = PoolSession(context.pooling, mask)
        x_hat, a = self.x_hat.detach(), self.a.detach()
        if self.added is not None:
            a = a - self.added
        mean = None
        if session.mode != "none":
            seen = x_hat if self.other is None else self.other.detach()
            mean = session.mean("calibrate", seen).expand(*x_hat.shape[:-1], -1)
        kept = torch.ones(x_hat.shape[:-1], dtype=torch.bool, device=x_hat.device)
        if mask is not None and not cross:
            kept = mask.bool().view(kept.shape)
        weights = torch.ones(int(kept.sum()), device=x_hat.device)
        if gradient is not None:
            norms = gradient.float().norm(dim=-1)[kept]
            # Relative to the batch, so that a batch with a large loss does not outweigh the others; a site on which
            # the loss does not depend at all is fitted as if all tokens mattered.
            weights = norms / norms.mean() if norms.mean() > 0 else weights
        features = x_hat if mean is None else torch.cat([x_hat, mean], dim=-1)
        targets = {name: value[kept] for name, value in self._targets(x_hat, a).items()}
        self.moments.add(features[kept], targets, weights)

    def _targets(self, x_hat: Tensor, a: Tensor) -> dict[str, Tensor]:
        """What is lost with the attention, at each place where a PIA can write."""
        if self.normalise1 is None or self.normalise2 is None:
            return {"stream": a}
        x = self.x.detach()
        if self.site.pattern.post_attention:
            a = getattr(self.block, self.site.pattern.post_attention)(a)
        identity = x_hat if self.identity == "paper" else self.normalise1(x)
        h = x + a if self.site.residual == "sequential" else x
        return {"stream": a, "ffn": self.normalise2(h) - identity}


ROUNDING = 1e-12  # of a variance that is none, as a share of the mean square


@torch.no_grad()
def write_closed_form(pia: Pia, moments: SiteMoments, target: str, ridge: float = 1e-2) -> float:
    """Give `pia` the reduced-rank least-squares weights for `target`; each output group gets its share of the rank.

    Args:
        pia: both experts get the same up-projection, so the router does not matter at the start.
        moments: of the PIA's site.
        target: `stream` or `ffn`.
        ridge: added to the features' covariance, relative to its mean diagonal. There are far fewer samples of a mean
            than of a token; without enough of it the pooled weights fit their noise and grow.

    Where all calibration tokens that count are alike, as with a single sample, there is nothing to regress on: the PIA
    then writes the mean of the target.

    Returns:
        R², the share of the target's variance that the full-rank regression on these features explains.

    Raises:
        ConfigError: the moments are not finite, or too large to calculate with: the model's training has diverged.
    """
    assert moments.f is not None, "no calibration sample reached this site"
    assert moments.ff is not None
    n, width, groups = moments.count, pia.shape.width, pia.shape.groups
    mean_f, mean_y = moments.f / n, moments.y[target] / n
    cov = moments.ff / n - torch.outer(mean_f, mean_f)
    cross = moments.fy[target] / n - torch.outer(mean_f, mean_y)
    varied = bool(cov.diagonal().mean() > ROUNDING * (moments.ff / n).diagonal().mean())
    cov = cov + ridge * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    per_group, rows, ups = pia.shape.rank // groups, [], []
    try:
        full = torch.linalg.solve(cov, cross) if varied else torch.zeros_like(cross)  # [p, d]
        explained = full.T @ cov @ full
        if not explained.isfinite().all():
            raise torch.linalg.LinAlgError("not finite")
        for part in torch.arange(width, device=cov.device).chunk(groups):
            directions = torch.linalg.eigh(explained[part][:, part]).eigenvectors.flip(-1)[:, :per_group]
            rows.append((full[:, part] @ directions).T)  # [r / groups, p]
            ups.append(directions)
    except torch.linalg.LinAlgError as error:
        raise ConfigError(
            "closed-form start: activations of the calibration samples have a squared norm of "
            f"{moments.yy[target] / n:.2g}; expected those of a working model: lower baseline.learning_rate, with "
            "which its adapters are trained, and choose another --output"
        ) from error
    bottleneck, up = torch.cat(rows) / pia.shape.mix, torch.cat(ups) / pia.shape.scale
    pia.down.weight.copy_(bottleneck[:, :width])
    # The bottleneck is centred, so that a unit that a slice leaves out takes no part of the mean with it.
    pia.down.bias.copy_(-bottleneck @ mean_f)
    if pia.pool is not None and bottleneck.shape[1] > width:
        pia.pool.weight.copy_(bottleneck[:, width:])
        pia.pool.bias.zero_()
    for expert in pia.experts():
        expert.weight.copy_(up)
        expert.bias.copy_(mean_y / pia.shape.scale)
    variance = moments.yy[target] / n - float(mean_y.pow(2).sum())
    return float(explained.diagonal().sum()) / variance if variance > 0 else 0.0
