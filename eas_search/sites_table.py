"""The survey of a model's sites for a terminal: equal layers in one row, reasons as numbered notes below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eas_search.report.labels import MISSING, quantity, runs
from eas_search.site_survey import Survey, SurveyedSite, norm_placement

COLUMNS = ("site", "name", "tower", "pattern", "heads", "param.", "FLOPs", "PIA")
RIGHT = ("heads", "param.", "FLOPs")


@dataclass
class Notes:
    """Reasons by number, in the order in which they are first given."""

    reasons: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """The note that stands for `reason`, like "[2]"."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"[{self.reasons.index(reason) + 1}]"


def print_survey(console: Console, survey: Survey, every: bool = False) -> None:
    """Print table, notes, refused attentions and the verdict.

    Args:
        console: where to.
        survey: what.
        every: one row per site instead of one per run of equal layers.
    """
    notes = Notes()
    title = f"{len(survey.sites)} attention sites of {survey.model}"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for heading in COLUMNS:
        folds = heading in ("site", "name")
        table.add_column(heading, justify="right" if heading in RIGHT else "left", overflow="fold", no_wrap=not folds)
    groups: dict[tuple[str, ...], list[SurveyedSite]] = {}
    for entry in survey.sites:
        before, layer, after = _split_name(entry)
        key = (before, after, layer if every else "", *_cells(entry, notes))
        groups.setdefault(key, []).append(entry)
    for (before, after, _, *cells), group in groups.items():
        layers = spans([int(_split_name(entry)[1]) for entry in group])
        name = f"{before}{layers if len(group) == 1 else '{' + layers + '}'}{after}"
        table.add_row(spans([entry.site.index for entry in group]), Text(name), *map(Text, cells))
    console.print(table)
    lines = [
        f"heads: number/of keys × width. FLOPs: the attention's share of its block at {survey.context:,} tokens. "
        "PIA: where one can be placed; all = ffn, residual, parallel, which also merge."
    ]
    lines += [f"[{number}] {reason}" for number, reason in enumerate(notes.reasons, 1)]
    by_reason: dict[str, list[str]] = {}
    for name, reason in survey.refused.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 and not every else ""
        listed = ", ".join(names if every else names[:2])
        lines.append(f"no site: {listed}{more}: {reason}")
    for line in (*lines, survey.verdict):
        console.print(Text(line))


def _split_name(entry: SurveyedSite) -> tuple[str, str, str]:
    """A site's name apart: before the number of its block, that number, behind it."""
    stem, _, number = entry.site.block.rpartition(".")
    return f"{stem}.", number, entry.site.name[len(entry.site.block) :]


def _cells(entry: SurveyedSite, notes: Notes) -> tuple[str, ...]:
    """Every column but the site and its name."""
    site, cost = entry.site, entry.cost
    heads = MISSING if cost is None else str(cost.heads.heads)
    if cost is not None:
        if cost.heads.kv_heads != cost.heads.heads:
            heads += f"/{cost.heads.kv_heads}"
        heads += f"×{cost.heads.key_width}"
    share = f"{100 * entry.share:.0f} %" if entry.share is not None else f"{MISSING} {notes.mark(entry.uncounted)}"
    place = "all" if len(site.placements) == 3 else ", ".join(site.placements)
    if reason := entry.refused or site.merge_refusal:
        place = f"{'none' if entry.refused else place} {notes.mark(reason)}"
    parameters = MISSING if cost is None else quantity(cost.parameters).replace("\u00a0", "")
    tower = site.tower if site.kind == "self" else f"{site.tower} {site.kind}"
    return (tower, f"{site.pattern.name} {norm_placement(site)}", heads, parameters, share, place)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as short text: "0–31", "3, 7 … 31" where every step is the same, else runs and single ones."""
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    return ", ".join(runs(numbers))
