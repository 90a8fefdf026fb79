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

STRIP, ROW, GAP = 80, 28, 14  # pixels: the strip of redundancies, a point of the front, and between the two


def skip_map(front: pd.DataFrame, sites: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> go.Figure:
    """Which sites each front point and the chosen one skip, fastest on top, under the redundancy of every site."""
    rows = front[front["on_front"].astype(bool) | front["chosen"].astype(bool)].sort_values("latency")
    cells = ROW * max(len(rows), 1)  # the height follows the number of rows
    figure = make_subplots(
        rows=2, shared_xaxes=True, row_heights=[STRIP, cells], vertical_spacing=GAP / (STRIP + cells + GAP)
    )
    names = [escape(str(site["name"])) for site in sites]
    figure.add_trace(_redundancies(sites, names, theme), row=1, col=1)
    figure.add_trace(_skip_sets(rows, sites, names, theme), row=2, col=1)
    figure.update_layout(
        layout(theme, height=STRIP + cells + GAP + 110), bargap=0.25, showlegend=False, margin={"t": 36, "l": 110}
    )
    towers = [(tower, list(members)) for tower, members in groupby(range(len(sites)), lambda i: sites[i]["tower"])]
    if len(towers) > 1:
        _name_towers(figure, towers, theme)
    _label_sites(figure, sites, [members for _, members in towers])
    _label_rows(figure, rows)
    return figure


def _redundancies(sites: Sequence[Mapping[str, Any]], names: Sequence[str], theme: Theme) -> go.Bar:
    values = [site["redundancy"] if labels.known(site["redundancy"]) else None for site in sites]
    return go.Bar(
        x=list(range(len(sites))),
        y=values,
        marker={"color": theme.muted, "opacity": 0.75},
        hoverinfo="text",
        hovertext=[f"{name}<br>redundancy {labels.number(r)}" for name, r in zip(names, values, strict=True)],
    )


def _skip_sets(
    rows: pd.DataFrame, sites: Sequence[Mapping[str, Any]], names: Sequence[str], theme: Theme
) -> go.Heatmap:
    skips = [[int(site["index"] in skip) for site in sites] for skip in rows["skip"]]
    numbers, speed = rows["number"].tolist(), [labels.speedup(value) for value in rows["latency"]]
    return go.Heatmap(
        z=skips,
        xgap=3,
        ygap=3,
        zmin=0,
        zmax=1,
        showscale=False,
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


def _name_towers(figure: go.Figure, towers: Sequence[tuple[str, Sequence[int]]], theme: Theme) -> None:
    for tower, members in towers:
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


def _label_sites(figure: go.Figure, sites: Sequence[Mapping[str, Any]], towers: Sequence[Sequence[int]]) -> None:
    short = labels.site_labels(sites)
    every = 1 + len(sites) // 40  # labels of very deep models would run into each other
    ticks = [i for members in towers for i in members[::every] if i + every - 1 <= members[-1]]
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


def _label_rows(figure: go.Figure, rows: pd.DataFrame) -> None:
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        showgrid=False,
        fixedrange=True,
        row=2,
        range=[len(rows) - 0.5, -0.5],
        ticktext=[
            f"{'★ ' if chosen else ''}#{number} · {labels.speedup(latency)} "
            for chosen, number, latency in zip(rows["chosen"], rows["number"], rows["latency"], strict=True)
        ],
    )
