"""Plots of one study, from plain DataFrames; every function is pure and returns a new plotly figure.

The columns are those of `PageData`.  Text that came from outside (names of sites, origins) is escaped,
because plotly reads a small subset of HTML in its labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eas_search.report import labels
from eas_search.report.axes import USUAL, Axes
from eas_search.report.front import hypervolume, non_dominated
from eas_search.report.theme import LIGHT, Theme, colour_bar, fade, layout

Sites = Sequence[Mapping[str, Any]]


def trade_off(
    trials: pd.DataFrame,
    front: pd.DataFrame,
    baseline: Mapping[str, Any],
    sites: Sites,
    theme: Theme = LIGHT,
    axes: Axes = USUAL,
) -> go.Figure:
    """Score against the first cost: trials, finalists with their intervals, the baseline, the choice.

    Trials show their score on validation data; finalists and the baseline show it on held-out data.  The number of the
    trial is the `customdata` of every point; the trace with `meta` "selected" is a ring that a page may move.
    """
    figure, score = go.Figure(layout=layout(theme, height=570)), axes.score
    accuracy, low, high = (baseline[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    if labels.known(low) and labels.known(high):
        figure.add_hrect(y0=low, y1=high, fillcolor=theme.muted, opacity=0.08, line_width=0, layer="below")
    line = {"color": theme.muted, "width": 1.2, "dash": "dash"}
    figure.add_hline(y=accuracy, line=line, layer="below")
    figure.add_vline(x=1.0, line=line, layer="below")
    done = measured(trials)
    if not done.empty:
        figure.add_trace(_trial_points(done, baseline, sites, theme, axes))
    if not front.empty:
        # With a third objective the front has points that are compromises only there.
        seen = front["on_front"].astype(bool) & non_dominated(front["accuracy"], front[axes.cost])
        steps = front[seen].sort_values(axes.cost, ascending=False)
        figure.add_scatter(
            x=axes.place(steps[axes.cost], baseline),
            y=steps["accuracy"],
            mode="lines",
            name="Best compromises",
            line={"shape": "vh", "color": theme.accent, "width": 2},
            hoverinfo="skip",
        )
        chosen = front["chosen"].astype(bool)
        figure.add_trace(_finalists(front[~chosen], baseline, sites, theme, axes, chosen=False))
        figure.add_trace(_finalists(front[chosen], baseline, sites, theme, axes, chosen=True))
    figure.add_scatter(
        x=[1.0],
        y=[accuracy],
        mode="markers",
        name="Baseline",
        hoverinfo="text",
        hovertext=f"<b>Baseline</b>: nothing skipped<br>{escape(score)} {labels.percent(accuracy)} "
        f"({labels.percent_interval(low, high)})",
        marker={"symbol": "diamond", "size": 11, "color": theme.text},
    )
    figure.add_scatter(
        x=[],
        y=[],
        mode="markers",
        meta="selected",
        showlegend=False,
        hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 27, "color": theme.text, "line": {"width": 2}},
    )
    axes.label(figure)
    figure.update_yaxes(title=f"{escape(labels.upper_first(score))}  (up is better →)", tickformat=".0%")
    return figure


def progress(trials: pd.DataFrame, theme: Theme = LIGHT) -> go.Figure:
    """Hypervolume of all trials so far, in the order they were run (see `front.hypervolume`)."""
    ordered = trials.sort_values("number")
    whole = ordered["accuracy"].where(ordered["state"] != "STOPPED")  # an estimate adds nothing
    accuracy, latency = whole.to_numpy(float), ordered["latency"].to_numpy(float)
    values = [hypervolume(accuracy[: n + 1], latency[: n + 1]) for n in range(len(ordered))]
    figure = go.Figure(layout=layout(theme, height=320))
    figure.add_scatter(
        x=list(range(1, len(ordered) + 1)),
        y=values,
        mode="lines",
        hoverinfo="text",
        showlegend=False,
        line={"shape": "hv", "color": theme.accent, "width": 2},
        fill="tozeroy",
        fillcolor=fade(theme.accent),
        hovertext=[f"after {n} trials: {value:.4f}" for n, value in enumerate(values, start=1)],
    )
    figure.update_xaxes(title="Trials run", rangemode="tozero")
    figure.update_yaxes(title="Hypervolume", rangemode="tozero")
    return figure


def best_by_count(trials: pd.DataFrame, sites: Sites, theme: Theme = LIGHT, score: str = "accuracy") -> go.Figure:
    """Validation score against the number of skipped sites: every trial, and the best for each number."""
    done = measured(trials)
    counts = done["skip"].map(len)
    best = done.groupby(counts)["accuracy"].max()
    figure = go.Figure(layout=layout(theme, height=320))
    figure.add_scatter(
        x=counts,
        y=done["accuracy"],
        mode="markers",
        name="Trials",
        customdata=done["number"].tolist(),
        hoverinfo="text",
        marker={"size": 7, "opacity": 0.6, "color": theme.scale[1]},
        hovertext=[labels.hover(row, sites, f"validation {score}") for row in done.to_dict("records")],
    )
    figure.add_scatter(
        x=best.index,
        y=best,
        mode="lines",
        name="Best so many skipped",
        hoverinfo="skip",
        line={"color": theme.accent, "width": 2},
    )
    figure.update_layout(showlegend=False)
    every = {"dtick": 1} if len(sites) <= 12 else {}  # else plotly may put two ticks on one whole number
    figure.update_xaxes(title=f"Attentions skipped, of {len(sites)}", tickformat="d", **every)
    figure.update_yaxes(title=f"Validation {escape(score)}", tickformat=".0%")
    return figure


def _trial_points(
    done: pd.DataFrame, baseline: Mapping[str, Any], sites: Sites, theme: Theme, axes: Axes
) -> go.Scatter:
    marker: dict[str, Any] = {"size": 7, "opacity": 0.7, "color": theme.scale[1]}
    if np.isfinite(done["redundancy"].to_numpy(float)).any():
        marker |= {
            "color": done["redundancy"],
            "colorscale": list(theme.scale),
            "colorbar": colour_bar(theme),
        }
    return go.Scatter(
        x=axes.place(done[axes.cost].astype(float), baseline),
        y=done["accuracy"],
        mode="markers",
        name="Trials",
        marker=marker,
        customdata=done["number"].tolist(),
        hoverinfo="text",
        meta="trials",
        hovertext=[
            labels.hover(row, sites, f"validation {axes.score}", axes.facts(row)) for row in done.to_dict("records")
        ],
    )


def _finalists(
    rows: pd.DataFrame, baseline: Mapping[str, Any], sites: Sites, theme: Theme, axes: Axes, *, chosen: bool
) -> go.Scatter:
    colour = theme.chosen if chosen else theme.accent
    bars = {"type": "data", "color": fade(colour, 0.55), "thickness": 1.2, "width": 3}
    shape, on_front = "star" if chosen else "circle", rows["on_front"].astype(bool)
    undecided = rows["front"] == "undecided" if "front" in rows else False
    place, accuracy = axes.place(rows[axes.cost], baseline), rows["accuracy"]
    across = {}
    if f"{axes.cost}_low" in rows:
        ends = [axes.place(rows[f"{axes.cost}{end}"], baseline) for end in ("_low", "_high")]
        across = {"error_x": bars | {"array": ends[0] - place, "arrayminus": place - ends[1]}}
    return go.Scatter(
        x=place,
        y=accuracy,
        mode="markers",
        customdata=rows["number"].tolist(),
        hoverinfo="text",
        name="Chosen" if chosen else "Finalists",
        marker={
            "symbol": np.where(on_front, shape, np.where(undecided, f"{shape}-open-dot", f"{shape}-open")),
            "size": 17 if chosen else 10,
            "color": colour,
            "opacity": 1,
            "line": {"width": 1.5, "color": theme.surface if on_front.all() else colour},
        },
        **across,
        error_y=bars | {"array": rows["accuracy_high"] - accuracy, "arrayminus": accuracy - rows["accuracy_low"]},
        hovertext=[
            labels.hover(row, sites, f"held-out {axes.score}", axes.facts(row)) for row in rows.to_dict("records")
        ],
    )


def measured(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that have both objectives; failed and running ones have not, stopped ones have estimates."""
    if trials.empty:
        return trials
    accuracy, latency = trials["accuracy"].to_numpy(float), trials["latency"].to_numpy(float)
    return trials[np.isfinite(accuracy) & np.isfinite(latency) & (latency > 0) & (trials["state"] != "STOPPED")]
