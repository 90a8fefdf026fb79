"""What a person reads at the end of a search: the front as a table, the verdict, and where everything is."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from eas_search.report.headline import headline
from eas_search.report.labels import runs
from eas_search.settings import SearchSettings
from eas_search.study.search import SearchResult

MARKS = {
    "undecided": "≈ another point costs less and scores as well, but not surely better",
    "dominated": "↓ off the front",
}


def show_result(console: Console, result: SearchResult, settings: SearchSettings) -> None:
    """Print the closing table: the front, fastest first, and where everything is."""
    baseline = result.baseline
    metric = result.summary["metric"]
    title = f"Pareto front: held-out {metric}, merged models timed side by side"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    perplexity = "perplexity" in baseline.breakdown
    # A long name of the metric would take the place of a figure; the title has it.
    score = ("accuracy" if "match" in metric else metric if len(metric) <= 8 else "score", *["perplexity"] * perplexity)
    # Costs that the table has only where they are objectives, as shares of the original model's.
    extra = [name for name in ("parameters", "flops") if name in result.summary["objectives"]]
    right = (*score, "prefill", "95 %", "decode", "KV", *extra)
    for heading in ("", "trial", "skipped", "PIA", *right):
        # Only the skip set may take several lines: everything else fits a terminal of 80 columns beside it.
        wraps = heading == "skipped"
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=not wraps)
    kv, decode = baseline.kv_bytes, baseline.decode_s is not None
    further = [f"{baseline.breakdown['perplexity']:.4g}"] if perplexity else []
    reference = (
        f"{100 * baseline.accuracy:.1f} %",
        *further,
        "1.00×",
        "",
        "1.00×" if decode else "",
        "100 %" if kv else "",
        *["100 %"] * len(extra),
    )
    table.add_row("", "baseline", "none", "", *reference)
    shown = result.front[(result.front["front"] != "dominated") | result.front["chosen"]]
    for row in shown.to_dict("records"):
        table.add_row(
            ("★" if row["chosen"] else "") + ("" if row["on_front"] else "≈" if row["front"] == "undecided" else "↓"),
            str(row["number"]),
            f"{len(row['skip'])}: {' '.join(runs(row['skip']))}",
            f"{row['placement']} {row['pia_dim']}" if row["skip"] else "",
            f"{100 * row['accuracy']:.1f} %",
            *([f"{row['breakdown']['perplexity']:.4g}"] if perplexity else []),
            f"{1 / row['latency']:.2f}×",
            f"{1 / row['latency_high']:.2f}–{1 / row['latency_low']:.2f}",
            f"{1 / row['decode_latency']:.2f}×" if decode and row["decode_latency"] else "",
            f"{100 * row['kv_bytes'] / kv:.0f} %" if kv else "",
            *[f"{100 * row[name] / getattr(baseline, name):.0f} %" for name in extra],
        )
    console.print(table)
    verdict = headline(result.front, {"accuracy": baseline.accuracy}, result.summary["sites"], result.summary)
    console.print(verdict.replace("\u00a0", " "))
    for kind in shown["front"].unique():
        if kind in MARKS:
            console.print(f"{MARKS[kind]}.")
    folder = result.folder
    seconds = sum(result.summary["wall_clock"].values())
    console.print(f"{result.completed} trials in {seconds:.0f} s.  ★ is exported: {folder / 'export'}")
    console.print(f"Open {folder / 'pareto.html'} in a browser; export another point with:")
    trust = " --trust-remote-code" if settings.loading.trust_remote_code else ""
    console.print(f"  eas-search export {shlex.quote(str(folder))} --trial N{trust}", soft_wrap=True)
