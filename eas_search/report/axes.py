"""What the objectives of a study are on its page: the two axes of the trade-off, and facts about every point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from eas_search.report import labels

# What a cost other than latency is called on the axis; latency has its own, as a speed-up.
SHARES = {"kv_bytes": "KV cache", "parameters": "Parameters", "flops": "FLOPs of a prefill"}
# Costs that the page only shows where they are objectives.
FURTHER = {"parameters": "Parameters", "flops": "FLOPs of a prefill"}


@dataclass(frozen=True)
class Axes:
    """Accuracy upwards, the first cost to the right, cheaper further right.

    Attributes:
        score: what the task calls its accuracy.
        costs: the objectives behind accuracy.
    """

    score: str = "accuracy"
    costs: tuple[str, ...] = ("latency",)

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Axes:
        """Those of a study with this `summary.json`."""
        return cls(labels.score_name(summary), tuple(summary.get("objectives", ("accuracy", "latency"))[1:]))

    @property
    def cost(self) -> str:
        """The cost on the horizontal axis."""
        return self.costs[0]

    @property
    def against(self) -> str:
        """The cost as part of a heading."""
        return "speed" if self.cost == "latency" else SHARES[self.cost]

    @property
    def title(self) -> str:
        """Of the horizontal axis."""
        if self.cost == "latency":
            return "Prefill speed-up over the baseline  (right is faster →)"
        return f"{SHARES[self.cost]}, share of the baseline's  (right is less →)"

    def place(self, value: Any, baseline: Mapping[str, Any]) -> Any:
        """Where a value of the cost, or a series of them, stands: a speed-up, or a share of the baseline's."""
        return 1 / value if self.cost == "latency" else value / baseline[self.cost]

    def label(self, figure: go.Figure) -> None:
        """Write the titles and directions on a figure."""
        if self.cost == "latency":
            figure.update_xaxes(title=self.title, ticksuffix="×")
        else:
            figure.update_xaxes(title=self.title, tickformat=".0%", autorange="reversed")

    def facts(self, row: Mapping[Any, Any]) -> list[tuple[str, str]]:
        """(name, text) of the costs that a point is not described by anyway."""
        return [(FURTHER[cost], labels.quantity(row[cost])) for cost in self.costs if cost in FURTHER]


USUAL = Axes()
