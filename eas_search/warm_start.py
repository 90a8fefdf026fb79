"""Closed-form start of PIAs: reduced-rank least squares on calibration activations, no gradient step.

For every site, ridge regression from (x̂, mean x̂) to what is lost with the attention, reduced to rank r in the output
space (Izenman, "Reduced-rank regression for the multivariate linear model", 1975): the leading directions come first,
so a PIA of smaller rank is a slice of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.norms import split_norm
from eas_search.blocks import AdaptedNorm
from eas_search.context import TokenContext
from eas_search.pia import Pia
from eas_search.skip_config import IdentityPath
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
    to the residual stream behind the attention, ‖∂L/∂(x + attention)‖. Most tokens of a deep layer do not matter any
    more; an unweighted fit spends its rank on them (`studies/closed_form` compares the two).

    Args:
        model: a supernet's model that skips nothing, or a student with light adapters at these sites.
        sites: which sites to look at.
        batches: batches as in training; tokens outside the pooled mask do not count. Without labels there is no loss,
            and all tokens count the same.
        identity: the identity path on which the `ffn` target depends.
    """
    recorders = []
    for site in sites:
        block = model.get_submodule(site.block)
        recorders.append(_Recorder(block, site, SiteMoments(), identity))
    handles = [handle for recorder in recorders for handle in recorder.attach()]
    try:
        model.eval()
        for batch in batches:
            moved = on_device(batch, model)
            with torch.set_grad_enabled("labels" in moved):
                output = model(**moved, use_cache=False)
            gradients: Sequence[Tensor | None] = [None] * len(recorders)
            if "labels" in moved:
                streams = [recorder.h for recorder in recorders]
                gradients = torch.autograd.grad(output.loss, streams, allow_unused=True)
            for recorder, gradient in zip(recorders, gradients, strict=True):
                recorder.record(gradient)
    finally:
        for handle in handles:
            handle.remove()
    return {recorder.site.name: recorder.moments for recorder in recorders}


class _Recorder:
    """Hooks of one site: remember x when the block starts and h when its second norm is called."""

    def __init__(self, block: nn.Module, site: AttentionSite, moments: SiteMoments, identity: IdentityPath) -> None:
        norm1 = getattr(block, site.pattern.norm1)
        # Each stack has its own context: that of a vision tower knows no prompt and pools over all its tokens.
        context = (norm1 if isinstance(norm1, AdaptedNorm) else block).eas_context
        self.norm1 = norm1.norm if isinstance(norm1, AdaptedNorm) else norm1
        self.norm2 = getattr(block, site.pattern.norm2)
        self.normalise1, self.normalise2 = split_norm(self.norm1)[0], split_norm(self.norm2)[0]
        self.block, self.site = block, site
        self.context: TokenContext = context  # type: ignore[assignment]
        self.moments, self.identity = moments, identity
        self.x = self.h = torch.empty(0)

    def attach(self) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        """Install the two hooks."""
        return (
            self.block.register_forward_pre_hook(self._start),
            self.norm2.register_forward_pre_hook(self._second_norm),
        )

    def _start(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]
        if torch.is_grad_enabled() and not self.x.requires_grad:
            self.x.requires_grad_()  # nothing before this block is trainable: the graph begins here

    def _second_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.h = args[0]

    @torch.no_grad()
    def record(self, gradient: Tensor | None) -> None:
        """Add the tokens of the last forward pass, weighted by the norm of `gradient` [B, n, d] (None: all alike)."""
        x, h = self.x.detach(), self.h.detach()
        x_hat = self.norm1(x)
        session = self.context.session(self.site.layer)
        features = x_hat
        if session.mode != "none":
            features = torch.cat([x_hat, session.mean("calibrate", x_hat).expand_as(x_hat)], dim=-1)
        weights = torch.ones(x.shape[:2], device=x.device) if gradient is None else gradient.float().norm(dim=-1)
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if session.mask is not None:
            kept = session.mask.bool()
        identity = x_hat if self.identity == "paper" else self.normalise1(x)
        targets = {"stream": (h - x)[kept], "ffn": (self.normalise2(h) - identity)[kept]}
        weights = weights[kept]
        mean = weights.mean()
        # Relative to the batch, so that a batch with a large loss does not outweigh the others; a site on which the
        # loss does not depend at all is fitted as if all tokens mattered.
        self.moments.add(features[kept], targets, weights / mean if mean > 0 else torch.ones_like(weights))


@torch.no_grad()
def write_closed_form(pia: Pia, moments: SiteMoments, target: str, ridge: float = 1e-3) -> float:
    """Give `pia` the reduced-rank least-squares weights for `target`; each output group gets its share of the rank.

    Args:
        pia: both experts get the same up-projection, so the router does not matter at the start.
        moments: of the PIA's site.
        target: `stream` or `ffn`.
        ridge: added to the features' covariance, relative to its mean diagonal.

    Returns:
        R², the share of the target's variance that the full-rank regression on these features explains.
    """
    assert moments.f is not None, "no calibration sample reached this site"
    assert moments.ff is not None
    n, width, groups = moments.count, pia.shape.width, pia.shape.groups
    mean_f, mean_y = moments.f / n, moments.y[target] / n
    cov = moments.ff / n - torch.outer(mean_f, mean_f)
    cross = moments.fy[target] / n - torch.outer(mean_f, mean_y)
    cov = cov + ridge * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    full = torch.linalg.solve(cov, cross)  # [p, d]
    explained = full.T @ cov @ full
    per_group, rows, ups = pia.shape.rank // groups, [], []
    for part in torch.arange(width, device=cov.device).chunk(groups):
        directions = torch.linalg.eigh(explained[part][:, part]).eigenvectors.flip(-1)[:, :per_group]
        rows.append((full[:, part] @ directions).T)  # [r / groups, p]
        ups.append(directions)
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
