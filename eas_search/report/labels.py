"""Numbers and names as short text, the same in plots, tables and sentences.

Values that are missing (None, NaN) become an en dash.  Latencies are ratios to the baseline and are shown as
speed-ups, their reciprocal, because "1.27×" is easier to read than "0.79 of the time".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean, stdev
from string import ascii_lowercase
from typing import Any

MISSING = "–"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_NBSP = "\u00a0"  # keeps a number and its unit on one line


def known(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return value is not None and math.isfinite(value)


def percent(fraction: Any) -> str:
    """0.8125 → "81.2 %"."""
    return f"{100 * fraction:.1f}{_NBSP}%" if known(fraction) else MISSING


def percent_interval(low: Any, high: Any) -> str:
    """0.79, 0.833 → "79.0–83.3 %"."""
    return f"{100 * low:.1f}–{100 * high:.1f}{_NBSP}%" if known(low) and known(high) else MISSING


def trainings(accuracies: Any) -> str:
    """Of several trainings, 0.948, 0.942, 0.951 → "3 trainings: 94.7 ± 0.5 %" (standard deviation); "" of fewer."""
    if not isinstance(accuracies, list | tuple) or len(accuracies) < 2:
        return ""
    return f"{len(accuracies)} trainings: {100 * mean(accuracies):.1f} ± {100 * stdev(accuracies):.1f}{_NBSP}%"


def points(change: Any, low: Any, high: Any) -> str:
    """Change of a fraction in percentage points, −0.012, −0.023, −0.001 → "−1.2 (−2.3 to −0.1) points"."""
    if not (known(change) and known(low) and known(high)):
        return MISSING
    texts = [f"{100 * value:+.1f}".replace("-", "−") for value in (change, low, high)]
    return f"{texts[0]} ({texts[1]} to {texts[2]}) points"


def with_interval(value: Any, low: Any = None, high: Any = None) -> str:
    """0.2871, 0.2801, 0.2944 → "0.2871 (0.2801–0.2944)"."""
    if not known(value):
        return MISSING
    return f"{value:.4f} ({low:.4f}–{high:.4f})" if known(low) and known(high) else f"{value:.4f}"


def speedup(latency: Any) -> str:
    """Latency ratio 0.787 → "1.27×"; a third decimal where two would read as 1.00×."""
    if not known(latency) or latency <= 0:
        return MISSING
    value = 1 / latency
    return f"{value:.{3 if abs(value - 1) < 0.005 else 2}f}×"


def speedup_interval(low: Any, high: Any) -> str:
    """Interval of a latency ratio as the interval of the speed-up, 0.76, 0.82 → "1.22–1.32×"."""
    if not (known(low) and known(high)) or low <= 0:
        return MISSING
    return f"{1 / high:.2f}–{1 / low:.2f}×"


def size(count: Any) -> str:
    """Bytes with a binary unit: 14336 → "14.0 KiB"."""
    if not known(count):
        return MISSING
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f}{_NBSP}B" if units[0] == "B" else f"{value:.1f}{_NBSP}{units[0]}"


def quantity(count: Any) -> str:
    """A large count: 7241748480 → "7.24 B"."""
    if not known(count):
        return MISSING
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            return f"{count / factor:.3g}{_NBSP}{unit}"
    return f"{count:.0f}"


def duration(seconds: Any) -> str:
    """3725.0 → "1 h 2 min"."""
    if not known(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f}{_NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min {rest}{_NBSP}s"
    return f"{minutes // 60}{_NBSP}h {minutes % 60}{_NBSP}min"


def number(value: Any) -> str:
    """0.12345 → "0.123"."""
    return f"{value:.3g}" if known(value) else MISSING


def milliseconds(value: Any) -> str:
    """12.34 → "12.3 ms"."""
    return f"{value:.3g}{_NBSP}ms" if known(value) else MISSING


def site_labels(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """One short label per site: the layer number in its dotted name, unique within its tower.

    A number that all sites of a kind share counts no layers ("block.3.layer.0" is 3); where several differ, all are
    named ("layers.2.blocks.5" is 2.5). Two attentions of one layer (self and cross) become "3a" and "3b", and the same
    letter stands for the same kind of attention in every layer; a name without a number keeps its index.
    """
    kinds = [(site["tower"], _NUMBER.sub("#", site["name"])) for site in sites]
    numbers: dict[Any, list[list[str]]] = {}
    for kind, site in zip(kinds, sites, strict=True):
        numbers.setdefault(kind, []).append(_NUMBER.findall(site["name"]))
    counting = {kind: [len(set(column)) > 1 for column in zip(*rows, strict=True)] for kind, rows in numbers.items()}
    keys = []
    for kind, site in zip(kinds, sites, strict=True):
        found = _NUMBER.findall(site["name"]) or [str(site["index"])]
        layer = [number for number, counts in zip(found, counting[kind], strict=False) if counts] or found[:1]
        keys.append((site["tower"], ".".join(layer)))
    total = Counter(keys)
    letters: dict[Any, dict[Any, str]] = {}  # by tower, of the kinds that share a layer with another one
    for key, kind in zip(keys, kinds, strict=True):
        if total[key] > 1:
            known = letters.setdefault(kind[0], {})
            known.setdefault(kind, ascii_lowercase[len(known) % 26] * (1 + len(known) // 26))
    return [key[1] + letters.get(kind[0], {}).get(kind, "") for key, kind in zip(keys, kinds, strict=True)]


def skip_text(skip: Sequence[int], sites: Sequence[Mapping[str, Any]]) -> str:
    """Skipped layers by tower, "text 3, 7–11 · vision 2"; the tower is left out where there is only one.

    `skip` holds indexes of sites as `sites` gives them; those that were not searched are not among `sites`.
    """
    if len(skip) == 0:
        return "none"
    groups: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        if site["index"] in skip:
            groups.setdefault(str(site["tower"]), []).append(place)
    short = site_labels(sites)
    texts = {tower: ", ".join(runs(members, short)) for tower, members in groups.items()}
    if len({site["tower"] for site in sites}) == 1:
        return next(iter(texts.values()))
    return " · ".join(f"{tower} {text}" for tower, text in texts.items())


def score_name(summary: Mapping[str, Any]) -> str:
    """What the task calls the score that the search maximises; accuracy where it says nothing."""
    return str(summary.get("metric") or "accuracy")


def upper_first(text: str) -> str:
    """The text as a sentence or heading begins with it."""
    return text[:1].upper() + text[1:]


def hover(
    row: Mapping[Any, Any],
    sites: Sequence[Mapping[str, Any]],
    score: str,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Lines that a plot shows for one trial, joined by <br>; `score` is like "held-out accuracy", `facts` are more."""
    accuracy = percent(row["accuracy"])
    if "accuracy_low" in row:
        accuracy += f" ({percent_interval(row['accuracy_low'], row['accuracy_high'])})"
    interval = speedup_interval(row["latency_low"], row["latency_high"])
    lines = [
        f"<b>Trial {row['number']}</b>" + (f" · {escape(str(row['origin']))}" if "origin" in row else ""),
        f"skips {len(row['skip'])}: {escape(skip_text(row['skip'], sites))}",
        f"adapter dimension {escape(str(row['pia_dim']))}, {escape(str(row['placement']))}",
        f"{escape(score)} {accuracy}",
        f"prefill {speedup(row['latency'])} ({interval})",
        f"KV cache {size(row['kv_bytes'])} per token",
        *(f"{name} {text}" for name, text in facts),
    ]
    if "redundancy" in row:
        lines.append(f"mean redundancy {number(row['redundancy'])}")
    return "<br>".join(lines)


def runs(indexes: Sequence[int], short: Sequence[str] | None = None) -> list[str]:
    """Labels of ascending `indexes` (None: the numbers), with three or more neighbours in a row as "first–last"."""
    rows: list[list[int]] = []
    for index in indexes:
        if rows and index == rows[-1][-1] + 1:
            rows[-1].append(index)
        else:
            rows.append([index])
    names = [[str(index) if short is None else short[index] for index in row] for row in rows]
    return [text for row in names for text in ([f"{row[0]}–{row[-1]}"] if len(row) > 2 else row)]
