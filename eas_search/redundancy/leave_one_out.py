"""Leave one out: what the loss loses when one attention is deleted and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eas_search.supernet import Supernet
from eas_search.training import mean_loss


def leave_one_out_scores(supernet: Supernet, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Minus the increase of the mean loss (nats per answer token) when each site alone is skipped."""

    def loss() -> float:
        return sum(mean_loss(supernet.model, batch) for batch in batches) / len(batches)

    supernet.set_skips(())
    intact, scores = loss(), []
    for site in supernet.sites:
        supernet.set_skips((site.index,))
        scores.append(intact - loss())
    supernet.set_skips(())
    return scores
