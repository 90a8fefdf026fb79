"""The result of a study in one sentence of plain language, and the point that the sentence is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from eas_search.report import labels
from eas_search.report.front import knee_point


def chosen_point(front: pd.DataFrame) -> dict[Any, Any] | None:
    """The finalist marked `chosen`, else the knee of the front; None when there are no finalists."""
    if front.empty:
        return None
    marked = front[front["chosen"].astype(bool)]
    row = marked.iloc[0] if len(marked) else front.iloc[knee_point(front["accuracy"], front["latency"])]
    return dict(row)


def headline(front: pd.DataFrame, baseline: Mapping[str, Any], site_count: int, summary: Mapping[str, Any]) -> str:
    """What skipping attentions costs and gains at the chosen point.

    A speed-up is claimed only where the whole interval of the chosen point's latency lies below 1; otherwise
    the sentence says that none was found, or that it is other points of the front that have one.

    Whether a loss of accuracy is significant is decided by the paired interval (`accuracy_change_low` and `…_high`),
    if the front has it.

    Args:
        front: the finalists, columns as in `PageData.front`; may be empty.
        baseline: `accuracy`, a fraction, on the data that the finalists were scored on.
        site_count: number of attention sites of the model.
        summary: `metric`; `completed` and `budget`, in trials, are used only when there are no finalists.
    """
    point = chosen_point(front)
    if point is None:
        done, budget = summary["completed"], summary["budget"]
        return f"No finalist was measured yet: {done} of {budget} trials are done."
    score = labels.score_name(summary)
    skipped = f"{len(point['skip'])} of" if len(point["skip"]) else "none of the"
    cost = f"Skipping {skipped} {site_count} attentions {_cost(point, baseline['accuracy'], score)}"
    if point["latency_high"] < 1:
        return f"{cost} and makes prefill {labels.speedup(point['latency'])} faster."
    faster = front[front["on_front"].astype(bool) & (front["latency_high"] < 1)]
    if faster.empty:
        return f"No significant speed-up was found. {cost}."
    best = labels.speedup(faster["latency"].min())
    return f"{cost}, without a significant speed-up; other points of the front reach {best}."


def loss_verdict(point: Mapping[Any, Any]) -> str | None:
    """How a point compares with the baseline by the paired interval: significant loss, no significant loss, or gain.

    None where the point has no such interval.
    """
    low, high = point.get("accuracy_change_low"), point.get("accuracy_change_high")
    if low is None or high is None or not (labels.known(low) and labels.known(high)):
        return None
    return "significant loss" if high < 0 else "significant gain" if low > 0 else "no significant loss"


def _cost(point: Mapping[Any, Any], before: float, score: str) -> str:
    """Predicate of the sentence.  Shares are rounded down: 99.96 % must not read as all of it."""
    after, verdict = point["accuracy"], loss_verdict(point)
    if after >= before:
        return f"costs no {score} ({labels.percent(after)} against {labels.percent(before)})"
    share = math.floor(1000 * after / before + 1e-9) / 1000
    kept = f"keeps {labels.percent(share).replace('.0', '')} of the baseline's {score}"
    return kept if verdict is None else f"{kept} ({'a ' if verdict == 'significant loss' else ''}{verdict})"
