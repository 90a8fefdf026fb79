"""A break-even report for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eas_search.break_even.values import BreakEven, skipped
from eas_search.exceptions import ConfigError
from eas_search.report.labels import size


def integers(flag: str, text: str) -> tuple[int, ...]:
    """Numbers separated by commas.

    Raises:
        ConfigError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{flag} is {text!r}; expected whole numbers with commas between them, e.g. 64,2048"
        ) from error


def print_break_even(console: Console, report: BreakEven) -> None:
    """Print the grid and what it means."""
    console.print()
    title = f"The most that skipping k of {report.layers} {report.tower} attentions can gain, S(k) = 1/(1 - a k/L)"
    console.print(Text(title))
    phases = dict.fromkeys(phase for point in report.points for phase in point.gains)
    mixed = len({gain.measured for point in report.points for gain in point.gains.values()}) > 1
    for phase in phases:
        console.print(_grid(report, phase, mixed))
    meaning = "a: the attentions' share of the time (~: give or take 5 points or more)"
    if "decode" in phases:
        meaning += ". KV: of one sample, all skipped"
    if any(point.prefill.spared for point in report.points):
        meaning += ". Last k: of the stack; behind them FFNs compute the last token only, unless PIAs pool"
    for line in (f"{meaning}.", f"{'* ' if mixed else ''}{report.method}.", *(f"{note}." for note in report.notes)):
        console.print(Text(line[0].upper() + line[1:] if line[1:2] != ":" else line))
    for verdict in report.verdicts:
        console.print(Text(verdict))


def _grid(report: BreakEven, phase: str, mixed: bool) -> Table:
    """Share and speed-ups of one phase, a row for each context and batch; `mixed`: those not measured are marked."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    counts = skipped(report.layers)
    last = counts[:2] if any(point.gains[phase].spared for point in report.points) else ()
    headings = [f"k={k}" for k in counts] + [f"last {k}" for k in last] + ["KV"] * (phase == "decode")
    table.add_column(phase, min_width=len("prefill"))
    for heading in ("context", "batch", "a", *headings):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len("~100 %") if heading == "a" else None)
    for point in report.points:
        gain = point.gains[phase]
        mark = "*" if mixed and not gain.measured else ""
        unsure = "~" if gain.high - gain.low > 0.1 else ""
        speedups = [gain.speedup(k / report.layers) for k in counts]
        speedups += [gain.speedup_of_last(k, report.layers) for k in last]
        cells = [f"{unsure}{100 * gain.share:.0f} %", *(f"{speedup:.2f}x" for speedup in speedups)]
        kept = [size(point.kv_bytes)] if phase == "decode" else []
        table.add_row("", f"{mark}{point.context}", str(point.batch), *cells, *kept)
    return table
