"""How well each redundancy metric foretold the trials: Kendall's τ against accuracy after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from scipy.stats import kendalltau

DEFINITION = (
    "Kendall's tau-b between the mean redundancy of the skipped sites and a trial's validation accuracy after its "
    "fine-tune, among trials that skip equally many sites; averaged over these groups with their numbers of pairs as "
    "weights. 1: the metric orders all of them rightly, 0: no better than chance, null: nothing to compare."
)


def metric_quality(
    trials: pd.DataFrame, indexes: Sequence[int], metrics: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """`kendall_tau` and the number of `pairs` behind it by metric, as `DEFINITION` says.

    Equal numbers of skipped sites are compared, because otherwise every metric would look good: accuracy falls with
    the number, and whatever ranks well is skipped first. A configuration counts once. A group in which all accuracies
    or all scores are equal says nothing and is left out.

    Args:
        trials: from `trials_frame`.
        indexes: of the searchable sites.
        metrics: scores of these sites, in this order, by metric.
    """
    done = trials[trials["state"] != "FAIL"].drop_duplicates(subset=["skip", "pia_dim", "placement"])
    groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for skip, accuracy in zip(done["skip"], done["accuracy"], strict=True):
        if skip:
            groups.setdefault(len(skip), []).append((skip, float(accuracy)))
    return {name: _quality(list(groups.values()), dict(zip(indexes, scores, strict=True)))
            for name, scores in metrics.items()}  # fmt: skip


def _quality(groups: Sequence[Sequence[tuple[tuple[int, ...], float]]], score: Mapping[int, float]) -> dict[str, Any]:
    total, pairs = 0.0, 0
    for group in groups:
        means = [sum(score[index] for index in skip) / len(skip) for skip, _ in group]
        accuracies = [accuracy for _, accuracy in group]
        if len(set(means)) > 1 and len(set(accuracies)) > 1:
            weight = len(group) * (len(group) - 1) // 2
            total += weight * float(kendalltau(means, accuracies).statistic)
            pairs += weight
    return {"kendall_tau": total / pairs if pairs else None, "pairs": pairs}
