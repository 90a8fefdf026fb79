"""First-order Taylor expansion of the loss (Molchanov et al., arXiv 1611.06440, equation 7): |a · ∂L/∂a|, summed."""

from __future__ import annotations

import torch

from eas_search.models.calling import without_cache
from eas_search.redundancy.passes import Passes
from eas_search.redundancy.watch import watching
from eas_search.training import on_device


def taylor_scores(passes: Passes) -> list[float]:
    """Minus the mean over batch rows of |Σ a · ∂L/∂a|, at most 0, in units of the loss.

    a [B, n, d] is what the attention adds to the stream; the sum runs over tokens and features, so that it is the
    first-order change of the loss when a row loses that attention, and its absolute value is taken per row.
    """
    supernet = passes.supernet
    sums, rows = [0.0] * len(supernet.sites), 0
    with watching(supernet, probing=True) as watchers:
        for batch in passes.batches:
            moved = on_device(batch, supernet.model)
            with torch.enable_grad():
                loss = supernet.model(**moved, **without_cache(supernet.model)).loss
            seen = [watcher.seen for watcher in watchers]
            probes = [one.probe for one in seen]
            gradients = torch.autograd.grad(loss, probes, allow_unused=True)  # type: ignore[arg-type]
            count = len(next(iter(batch.values())))
            rows += count
            for position, (one, gradient) in enumerate(zip(seen, gradients, strict=True)):
                # The loss is a mean over the batch: the share of one row is scaled back to a loss of its own. A site
                # that the loss does not depend on has no gradient.
                if gradient is not None:
                    change = (one.added.float() * gradient.float()).flatten(1).sum(1) * count
                    sums[position] += float(change.abs().sum())
    return [-total / rows for total in sums]
