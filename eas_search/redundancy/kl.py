"""Leave one out, judged by the predictions: how far they move from the intact model's when one attention is deleted."""

from __future__ import annotations

from eas_search.redundancy.passes import Passes


def kl_scores(passes: Passes) -> list[float]:
    """Minus KL(intact ‖ without the site), in nats per prediction; at most 0 but for rounding.

    Only predictions that the task judges count: those of answer tokens, or of a row's class. Unlike the loss it does
    not ask whether the intact model is right.
    """
    return [-divergence for divergence in passes.left_out.kl]
