"""Colours and layout that the figures share, once for light and once for dark screens.

Both palettes are distinguishable with every common colour vision deficiency (blue against orange, after Okabe
and Ito); nothing is told by colour alone.  Backgrounds are transparent, so that a figure sits on the page it
is put on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one figure as #rrggbb: `accent` is the front, `scale` runs from low to high redundancy."""

    text: str
    muted: str
    grid: str
    surface: str
    accent: str
    chosen: str
    scale: tuple[str, str]


LIGHT = Theme("#1c2430", "#5d6878", "#e4e8ee", "#ffffff", "#0b6cb3", "#d55e00", ("#d3dae4", "#4d5b70"))
DARK = Theme("#e8ecf2", "#9aa6b6", "#2d3541", "#171c24", "#56b4e9", "#f0a030", ("#3a4453", "#b4c0d0"))


def fade(colour: str, opacity: float = 0.15) -> str:
    """`#rrggbb` as a translucent CSS colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def layout(theme: Theme, height: int) -> go.Layout:
    """The common layout; `height` is in pixels, the width is that of the page."""
    axis = {
        "gridcolor": theme.grid,
        "zeroline": False,
        "linecolor": theme.grid,
        "automargin": True,
        "tickfont": {"color": theme.muted},
        "title": {"font": {"color": theme.muted, "size": 13}},
    }
    label = {"color": theme.text, "family": FONT}
    return go.Layout(
        template={"layout": {"xaxis": axis, "yaxis": axis}},
        height=height,
        hovermode="closest",
        dragmode=False,
        font={"family": FONT, "size": 12.5, "color": theme.text},
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": theme.muted}},
        hoverlabel={"bgcolor": theme.surface, "bordercolor": theme.muted, "align": "left", "font": label},
    )


def colour_bar(theme: Theme) -> dict[str, Any]:
    """Scale of the redundancy, in the row of the legend, where it covers no data."""
    font = {"size": 11, "color": theme.muted}
    place = {"x": 1, "xanchor": "right", "xpad": 0, "y": 1.01, "yanchor": "bottom", "ypad": 0}
    title = {"text": "Redundancy of what is skipped", "side": "top", "font": font}
    size = {"orientation": "h", "thickness": 7, "len": 0.22, "nticks": 4, "outlinewidth": 0}
    return {"title": title, "tickfont": font, **place, **size}
