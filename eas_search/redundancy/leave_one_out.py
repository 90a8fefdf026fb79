"""Leave one out: what the loss loses when one attention is deleted and nothing else changes."""

from __future__ import annotations

from eas_search.redundancy.passes import Passes


def leave_one_out_scores(passes: Passes) -> list[float]:
    """Minus the increase of the mean loss (nats per answer token) when each site alone is skipped."""
    return [-increase for increase in passes.left_out.loss]
