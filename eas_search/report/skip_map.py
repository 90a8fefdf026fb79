"""The map of what every point of the front skips; a pure function from plain data to a plotly figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eas_search.report import labels
from eas_search.report.theme import LIGHT, Theme, layout


def skip_map(front: pd.DataFrame, sites: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> go.Figure:
    """Which sites each front point skips, fastest point on top, under the redundancy of every site."""
    rows = front[front["on_front"].astype(bool)].sort_values("latency")
    names, short = [escape(str(site["name"])) for site in sites], labels.site_labels(sites)
    redundancy = [site["redundancy"] if labels.known(site["redundancy"]) else None for site in sites]
    skips = [[int(site["index"] in skip) for site in sites] for skip in rows["skip"]]
    numbers, speed = rows["number"].tolist(), [labels.speedup(value) for value in rows["latency"]]
    strip, cells = 80, 28 * max(len(rows), 1)  # pixels: the height follows the number of rows
    figure = make_subplots(
        rows=2, shared_xaxes=True, row_heights=[strip, cells], vertical_spacing=14 / (strip + cells + 14)
    )
    figure.add_bar(
        x=list(range(len(sites))),
        y=redundancy,
        marker={"color": theme.muted, "opacity": 0.75},
        hoverinfo="text",
        row=1,
        col=1,
        hovertext=[f"{name}<br>redundancy {labels.number(r)}" for name, r in zip(names, redundancy, strict=True)],
    )
    figure.add_heatmap(
        z=skips,
        xgap=3,
        ygap=3,
        zmin=0,
        zmax=1,
        showscale=False,
        row=2,
        col=1,
        hoverinfo="text",
        colorscale=[[0, theme.grid], [1, theme.accent]],
        customdata=[[number] * len(sites) for number in numbers],
        hovertext=[
            [
                f"<b>{names[i]}</b><br>{'skipped' if cell else 'kept'} in trial {number} ({fast})"
                for i, cell in enumerate(row)
            ]
            for row, number, fast in zip(skips, numbers, speed, strict=True)
        ],
    )
    figure.update_layout(
        layout(theme, height=strip + cells + 14 + 110),
        bargap=0.25,
        showlegend=False,
        margin={"t": 36, "l": 110},
    )
    places = groupby(range(len(sites)), lambda i: sites[i]["tower"])
    towers = [(tower, list(members)) for tower, members in places]
    for tower, members in towers if len(towers) > 1 else []:
        figure.add_annotation(
            text=escape(str(tower)),
            x=(members[0] + members[-1]) / 2,
            y=1,
            xref="x",
            yref="paper",
            yshift=18,
            showarrow=False,
            font={"color": theme.muted},
        )
        if members[0]:
            figure.add_vline(x=members[0] - 0.5, line={"color": theme.muted, "width": 1})
    marks = ["★ " if chosen else "" for chosen in rows["chosen"]]
    every = 1 + len(sites) // 40  # labels of very deep models would run into each other
    ticks = [i for _, members in towers for i in members[::every] if i + every - 1 <= members[-1]]
    figure.update_xaxes(
        tickvals=ticks,
        ticktext=[escape(short[i]) for i in ticks],
        tickfont={"size": 11},
        showgrid=False,
        tickangle=0,
        range=[-0.5, len(sites) - 0.5],
        fixedrange=True,
    )
    figure.update_xaxes(title="Layer of the attention", row=2)
    figure.update_yaxes(title="Redundancy", nticks=3, fixedrange=True, row=1)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        showgrid=False,
        fixedrange=True,
        row=2,
        range=[len(rows) - 0.5, -0.5],
        ticktext=[f"{m}#{n} · {fast} " for m, n, fast in zip(marks, numbers, speed, strict=True)],
    )
    return figure
