"""From the samples of one interleaved run to the rows of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from variants import BASE, BOUND, OURS, PUBLISHED

from eas_search.latency import LatencyReport, PhaseLatency, Ratio, Timing

TARGETS = {PUBLISHED: 0.1, BOUND: 1.02}


@dataclass(frozen=True)
class Case:
    """One run: so many prompts of so many tokens."""

    shape: str
    tokens: int
    batch: int
    seed: int


def compare(report: LatencyReport, answers: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Our forms against the published merge, the bound and unmerged LaVIN: ratios of paired samples with intervals.

    Args:
        report: of one run.
        answers: numbers of generated tokens, for the time of prompt and answer together.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in (name for name in OURS if name in report):
        ours = report[name]
        rows[f"{name} / {BOUND}, prefill"] = _judged(ours.prefill.ratio, TARGETS[BOUND])
        if ours.decode is not None:
            rows[f"{name} / {BOUND}, decode"] = _judged(ours.decode.ratio)
        for other in (PUBLISHED, BASE):
            if other not in report:
                continue
            theirs = report[other]
            ratio = _ratio(ours.prefill.timing, theirs.prefill.timing, report)
            rows[f"{name} / {other}, prefill"] = _judged(ratio, TARGETS.get(other))
            if ours.decode is None or theirs.decode is None:
                continue
            rows[f"{name} / {other}, decode"] = _judged(_ratio(ours.decode.timing, theirs.decode.timing, report))
            for count in answers:
                pair = [_whole(one.prefill, one.decode, count) for one in (ours, theirs)]
                rows[f"{name} / {other}, prompt and {count} tokens"] = _judged(_ratio(*pair, report))
    return rows


def _ratio(timing: Timing, other: Timing, report: LatencyReport) -> Ratio:
    config = report.conditions["config"]
    return Ratio.of(timing, other, config["confidence"], config["process_sd"])


def _whole(prefill: PhaseLatency, decode: PhaseLatency | None, count: int) -> Timing:
    """Seconds for the prompt and `count` tokens after it, by block."""
    assert decode is not None, "asked for only where there is one"
    rounds = zip(prefill.timing.samples, decode.timing.samples, strict=True)
    return Timing(tuple(tuple(p + count * d for p, d in zip(*pair, strict=True)) for pair in rounds))


def _judged(ratio: Ratio, target: float | None = None) -> dict[str, Any]:
    """The ratio and, where there is a target, whether this run's interval lies below it, above it, or around it."""
    if target is None:
        return ratio.to_dict()
    low, high = ratio.within_run
    verdict = "reached" if high <= target else "missed" if low > target else "undecided"
    return {**ratio.to_dict(), "target": target, "verdict": verdict}


def judged_by_bound(ratio: Ratio) -> dict[str, Any]:
    """A ratio to the bound, and whether the target is reached."""
    return _judged(ratio, TARGETS[BOUND])


def summary(report: LatencyReport) -> dict[str, Any]:
    """Times by variant and phase in seconds, without the samples."""
    found = {}
    for name, measured in report.items():
        phases = {"prefill": measured.prefill, "decode": measured.decode}
        found[name] = {
            phase: {"median": value.timing.median, "p10": value.timing.p10, "p90": value.timing.p90}
            for phase, value in phases.items()
            if value is not None
        }
    first = next(iter(report.values()))
    phases = {"prefill": first.prefill, "decode": first.decode}
    found[BOUND] = {
        phase: {"median": value.baseline.median, "p10": value.baseline.p10, "p90": value.baseline.p90}
        for phase, value in phases.items()
        if value is not None
    }
    return found


def print_case(case: Case, report: LatencyReport, rows: dict[str, dict[str, Any]]) -> None:
    """Two tables: times of a batch, and the ratios."""
    console = Console()
    table = Table(title=f"{case.shape}: {case.batch} × {case.tokens} tokens, ms", title_justify="left")
    for heading in ("", "prefill", "/ bound", "95 %", "decode", "/ bound"):
        table.add_column(heading)
    first = next(iter(report.values()))
    decode = "" if first.decode is None else f"{1e3 * first.decode.baseline.median:.2f}"
    table.add_row(BOUND, f"{1e3 * first.prefill.baseline.median:.2f}", "1", "", decode, "1")
    for name, measured in report.items():
        low, high = measured.prefill.ratio.within_run
        cells = [name, f"{1e3 * measured.prefill.timing.median:.2f}", f"{measured.prefill.ratio.estimate:.3f}"]
        cells.append(f"{low:.3f} – {high:.3f}")
        if measured.decode is not None:
            cells += [f"{1e3 * measured.decode.timing.median:.2f}", f"{measured.decode.ratio.estimate:.3f}"]
        table.add_row(*cells)
    console.print(table)
    print_rows({name: row for name, row in rows.items() if "target" in row or PUBLISHED in name})


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    """A line each."""
    console = Console()
    for name, row in rows.items():
        goal = f"   target {row['target']}: {row['verdict']}" if "target" in row else ""
        low, high = row["within_run"]
        console.print(f"{name}: {row['estimate']:.3f} ({low:.3f} – {high:.3f}){goal}", highlight=False, soft_wrap=True)
