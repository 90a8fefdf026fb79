"""`eas-search`: the search and what comes after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from eas_search.exceptions import StorageError
from eas_search.run import console, guarded, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
app.command("run")(run_command)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
RunFolder = Annotated[Path, typer.Argument(help="Output folder of a search.")]
Storage = Annotated[str | None, typer.Option(help="Optuna storage URL, if the search was given one.")]
ExportFolder = Annotated[Path, typer.Argument(help="Folder of an exported model.")]


@app.command()
def sites(
    model: Annotated[str, typer.Option(help="'demo', a hub id, or a model folder.")] = "demo",
    debug: Debug = False,
) -> None:
    """List the attention sites of a model, without loading its weights."""
    import torch

    from eas_search.architectures import attention_sites
    from eas_search.models.loading import architecture_class, load_config, model_location

    config = load_config(model_location(model), model)
    with torch.device("meta"):
        empty = architecture_class(config, model)._from_config(config)
    found = attention_sites(empty)
    table = Table(title=f"{len(found)} attention sites of {type(empty).__name__}", title_justify="left")
    for heading in ("index", "tower", "pattern", "parameters", "share of block", "name"):
        numeric = heading in ("index", "parameters", "share of block")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for site in found:
        size = sum(p.numel() for p in empty.get_submodule(site.name).parameters())
        whole = sum(p.numel() for p in empty.get_submodule(site.block).parameters())
        table.add_row(
            str(site.index), site.tower, site.pattern.name, f"{size:,}", f"{100 * size / whole:.0f} %", site.name
        )
    console.print(table)


@app.command()
def report(run: RunFolder, storage: Storage = None, debug: Debug = False) -> None:
    """Write trials.csv and pareto.html of a search again from its stored trials."""
    from eas_search.study.afterwards import rewrite_report

    path = rewrite_report(run, storage)
    console.print(f"Wrote {path}")


@app.command()
def export(
    run: RunFolder,
    trial: Annotated[int | None, typer.Option(help="Trial number [default: the chosen one].")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/export-N].")] = None,
    storage: Storage = None,
    debug: Debug = False,
) -> None:
    """Re-train a trial's configuration, measure it and export the merged model."""
    from eas_search.study.afterwards import export_trial

    folder = export_trial(run, trial, output, storage)
    console.print(f"Exported and verified: {folder}")


@app.command()
def verify(folder: ExportFolder, debug: Debug = False) -> None:
    """Reload an export and compare it with the answers of the trained student it was made from."""
    from eas_search.export import verify as check

    result = check(folder)
    for name, difference in result.report.differences.items():
        console.print(f"logits, {name}: largest difference {difference:.2g} (tolerance {result.report.tolerance:g})")
    console.print(f"greedy generation with cache: equal\n{folder} is what was trained.")


@app.command()
def evaluate(
    folder: ExportFolder,
    data: Annotated[Path | None, typer.Option(help="Folder with the task's data.")] = None,
    limit: Annotated[int | None, typer.Option(help="Held-out samples to use [default: as in the search].")] = None,
    debug: Debug = False,
) -> None:
    """Measure an export again: held-out accuracy, and latency against its base model."""
    from eas_search.study.afterwards import evaluate_export

    figures = evaluate_export(folder, data, limit)
    table = Table(title="Measured now, beside what the export claims", title_justify="left")
    for heading in ("", "now", "claimed"):
        table.add_column(heading)
    for name, (now, claimed) in figures.items():
        table.add_row(name, now, claimed)
    console.print(table)


def main() -> None:
    """Entry of the console script."""
    if not sys.stdout:
        raise StorageError("there is no standard output")
    sys.exit(guarded(lambda: app(standalone_mode=False), "--debug" in sys.argv))
