"""The trade-off from nearby: the part of the plot in which a choice is made, for pages on which the rest crowds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eas_search.report.axes import Axes
from eas_search.report.figures import measured

NEAR = 0.9  # of the baseline's score: who would give up more is served by the whole plot
MARGIN = 0.06  # of the range, on either side


def close_up(
    trials: pd.DataFrame, front: pd.DataFrame, baseline: Mapping[str, Any], axes: Axes
) -> dict[str, list[float]] | None:
    """Ranges of the axes, {"x": [left, right], "y": [low, high]}, that show what keeps most of the baseline's score.

    Args:
        trials, front, baseline: see `PageData`.
        axes: of the trade-off.

    Returns:
        None where that is all there is, or where it is not a single finalist.
    """
    floor, cost = NEAR * baseline["accuracy"], axes.cost
    tables = [measured(trials), front]
    near = [table if table.empty else table[table["accuracy"] >= floor] for table in tables]
    if near[1].empty or sum(map(len, near)) == sum(map(len, tables)):
        return None
    drawn = {"": [*near, pd.DataFrame([baseline])], "_low": [near[1]], "_high": [near[1]]}  # trials have no bars
    xs, ys = (
        [float(value) for end, some in drawn.items() for table in some for value in table.get(f"{name}{end}", ())]
        for name in (cost, "accuracy")
    )
    left, right = _with_margin(axes.place(np.array(xs), baseline))
    return {"x": [left, right] if cost == "latency" else [right, left], "y": list(_with_margin(np.array(ys)))}


def _with_margin(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    margin = MARGIN * float(np.ptp(known)) or MARGIN
    return float(known.min()) - margin, float(known.max()) + margin
