"""A break-even report for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eas_search.break_even.values import BreakEven, Gain, skipped
from eas_search.exceptions import ConfigError
from eas_search.report.labels import MISSING, size


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
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    counts = [f"k={k}" for k in skipped(report.layers)]
    for heading in ("context", "batch", "prefill a", *counts, "decode a", *counts, "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    mixed = len({gain.measured for point in report.points for gain in point.gains.values()}) > 1
    for point in report.points:
        mark = "*" if mixed and not point.prefill.measured else ""
        cells = [*_cells(point.prefill, report.layers), *_cells(point.decode, report.layers)]
        table.add_row(f"{mark}{point.context}", str(point.batch), *cells, size(point.kv_bytes) if point.decode else "")
    console.print(table)
    meaning = "a: the attentions' share of the time (~: give or take 5 points or more). KV: of one sample, all skipped"
    for line in (f"{meaning}.", f"{'* ' if mixed else ''}{report.method}.", *(f"{note}." for note in report.notes)):
        console.print(Text(line[0].upper() + line[1:] if line[1:2] != ":" else line))
    for verdict in report.verdicts:
        console.print(Text(verdict))


def _cells(gain: Gain | None, layers: int) -> list[str]:
    """The share and the three speed-ups."""
    if gain is None:
        return [MISSING] * 4
    unsure = "~" if gain.high - gain.low > 0.1 else ""
    return [f"{unsure}{100 * gain.share:.0f} %", *(f"{gain.speedup(k / layers):.2f}x" for k in skipped(layers))]
