"""One self-contained HTML page of a study: it needs no network, no server and no other file.

The template shows text only; every word that came from outside (study, sites, hardware) is escaped, and a
content security policy in the page forbids the browser to fetch anything at all.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from eas_search.exceptions import StorageError
from eas_search.report import figures, labels
from eas_search.report.axes import Axes
from eas_search.report.close_up import close_up
from eas_search.report.headline import chosen_point, headline, loss_verdict
from eas_search.report.skip_map import skip_map
from eas_search.report.theme import DARK, LIGHT, Theme


@dataclass(frozen=True)
class PageData:
    """What the page shows.  Accuracies are fractions, latencies ratios to the baseline, times seconds.

    Attributes:
        trials: one row per trial: number, state, skip, skip_names, pia_dim, placement, accuracy (validation),
            latency, latency_low, latency_high, redundancy, kv_bytes (per token), seconds, origin; optionally
            config.
        front: one row per finalist: number, skip, skip_names, pia_dim, placement, accuracy (held-out),
            accuracy_low, accuracy_high, latency, latency_low, latency_high, decode_latency,
            decode_latency_low, decode_latency_high, kv_bytes, parameters, on_front (not dominated), chosen, config;
            optionally accuracy_seeds (of all trainings), front (`front`, `undecided` or `dominated`) and
            accuracy_change, …_low, …_high (against the baseline on the same samples). May be empty, without columns.
        baseline: zero_shot_accuracy, accuracy, accuracy_low, accuracy_high, prefill_ms, decode_ms, kv_bytes,
            parameters, latency.
        sites: every attention site, in order: index, name, tower, redundancy.
        summary: study_name, model, task, metric (accuracy if there is none), seed, budget, completed, hypervolume,
            objectives (accuracy and latency if there are none; all costs among them are keys of baseline),
            wall_clock (seconds by stage), versions, hardware, conditions.
        run_dir: output folder of the search, for the command that exports a point.
        interval_notes: sentences on how the intervals were computed.
    """

    trials: pd.DataFrame
    front: pd.DataFrame
    baseline: Mapping[str, Any]
    sites: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    run_dir: str | Path
    interval_notes: Sequence[str] = ()


def render_page(data: PageData) -> str:
    """The page as HTML text, about 5 MB, nearly all of it plotly.js."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eas_search.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Markers such as NaN are not JSON: the browser would refuse the whole block, so rather fail here.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.globals["labels"] = labels
    light, dark = _plots(data, LIGHT), _plots(data, DARK)
    chosen = chosen_point(data.front)
    rows = [] if data.front.empty else data.front.sort_values("latency").to_dict("records")
    done = [] if data.trials.empty else data.trials[data.trials["state"] == "COMPLETE"].to_dict("records")
    points = {str(row["number"]): _payload(row, data, held_out=False) for row in done}
    points |= {str(row["number"]): _payload(row, data, held_out=True) for row in rows}
    near = close_up(data.trials, data.front, data.baseline, Axes.of(data.summary))
    return environment.get_template("page.html.j2").render(
        data=data,
        headline=headline(data.front, data.baseline, len(data.sites), data.summary),
        chosen=chosen,
        verdict=loss_verdict(chosen) if chosen else None,
        score=labels.score_name(data.summary),
        axes=Axes.of(data.summary),
        selected=points[str(chosen["number"])] if chosen else None,
        rows=rows,
        plots=light,
        near=near,
        payload={
            "near": near,
            "points": points,
            "selected": str(chosen["number"]) if chosen else None,
            "figures": {name: {"light": _plain(figure), "dark": _plain(dark[name])} for name, figure in light.items()},
        },
        plotly_js=get_plotlyjs(),
    )


def write_page(data: PageData, path: str | Path) -> None:
    """Write `render_page(data)` to `path`, replacing an older page only when the new one is complete.

    Raises:
        StorageError: the file cannot be written.
    """
    target, text = Path(path), render_page(data)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        message = f"cannot write the page {target}: {error.strerror}; choose another --output"
        raise StorageError(message) from error


def pretty(config: Mapping[str, Any]) -> str:
    """`config` as JSON with one line per field; only lists of names are broken further, one name per line."""
    fields = []
    for key, value in config.items():
        named = isinstance(value, list | tuple) and any(isinstance(item, str) for item in value)
        text = json.dumps(value)
        if named:
            text = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        fields.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}"


def _plots(data: PageData, theme: Theme) -> dict[str, go.Figure]:
    """Figures by the id of their place in the page; those without data are left out."""
    score, axes = labels.score_name(data.summary), Axes.of(data.summary)
    plots = {"trade-off": figures.trade_off(data.trials, data.front, data.baseline, data.sites, theme, axes)}
    if not data.front.empty:
        plots["skip-map"] = skip_map(data.front, data.sites, theme)
    if not data.trials.empty:
        plots["progress"] = figures.progress(data.trials, theme)
        plots["by-count"] = figures.best_by_count(data.trials, data.sites, theme, score)
    return plots


def _plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as JSON types; plotly's own encoder turns arrays into base64 and NaN into null."""
    plain: dict[str, Any] = json.loads(figure.to_json())
    return {"data": plain["data"], "layout": plain["layout"]}


def _payload(row: Mapping[Any, Any], data: PageData, held_out: bool) -> dict[str, Any]:
    """What the panel shows after a click: facts as (name, text), the configuration, the command to export."""
    # A trial without a stored configuration still has the three fields that the search varies.
    stored = isinstance(row.get("config"), Mapping)
    config = row["config"] if stored else {key: row[key] for key in ("skip", "pia_dim", "placement")}
    score, axes = labels.upper_first(labels.score_name(data.summary)), Axes.of(data.summary)
    accuracy, prefill = labels.percent(row["accuracy"]), labels.speedup(row["latency"])
    if held_out:
        accuracy += f" ({labels.percent_interval(row['accuracy_low'], row['accuracy_high'])})"
    interval = labels.speedup_interval(row["latency_low"], row["latency_high"])
    skipped = f"{len(row['skip'])} of {len(data.sites)}: {labels.skip_text(row['skip'], data.sites)}"
    return {
        "number": int(row["number"]),
        "title": f"Trial {row['number']}",
        "kind": "chosen" if row.get("chosen") else "finalist" if held_out else "trial",
        "facts": [
            ["Skipped", skipped],
            [f"{score}, {'held-out' if held_out else 'validation'}", accuracy],
            *_trainings(row),
            *_change(row),
            ["Prefill speed-up", prefill if prefill == labels.MISSING else f"{prefill} ({interval})"],
            ["KV cache per token", labels.size(row["kv_bytes"])],
            *map(list, axes.facts(row)),
        ],
        "config": pretty(config),
        "complete": stored,
        "command": f"eas-search export {shlex.quote(str(data.run_dir))} --trial {row['number']}",
        "x": axes.place(row[axes.cost], data.baseline) if labels.known(row["latency"]) and row["latency"] > 0 else None,
        "y": row["accuracy"] if labels.known(row["accuracy"]) else None,
    }


def _trainings(row: Mapping[Any, Any]) -> list[list[str]]:
    """The fact on further trainings, where a point has had some."""
    text = labels.trainings(row.get("accuracy_seeds"))
    return [["Trained again", text]] if text else []


def _change(row: Mapping[Any, Any]) -> list[list[str]]:
    """The fact on the difference to the baseline, where a point has one."""
    verdict = loss_verdict(row)
    if verdict is None:
        return []
    change = labels.points(*(row[f"accuracy_change{end}"] for end in ("", "_low", "_high")))
    return [["Against the baseline", f"{change}, {verdict}"]]
