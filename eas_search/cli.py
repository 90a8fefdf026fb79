"""`eas-search`: the search and what comes after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from eas_search.exceptions import ConfigError, StorageError
from eas_search.plugins import load_plugins
from eas_search.run import console, guarded, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
app.command("run")(run_command)
convert_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(convert_app, name="convert")

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
RunFolder = Annotated[Path, typer.Argument(help="Output folder of a search.")]
Storage = Annotated[str | None, typer.Option(help="Optuna storage URL, if the search was given one.")]
ExportFolder = Annotated[Path, typer.Argument(help="Folder of an exported model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")]
PLUGIN = "Python file or module to import first, which registers a task or pattern. Runs it."


def _import(plugins: list[str] | None) -> None:
    load_plugins(plugins or ())


Plugins = Annotated[list[str] | None, typer.Option("--plugin", callback=_import, is_eager=True, help=PLUGIN)]


@app.command()
def sites(  # noqa: PLR0913, PLR0917  (one parameter per flag is how typer works)
    model: Annotated[str, typer.Option(help="'demo', a hub id, or a model folder.")] = "demo",
    towers: Annotated[str | None, typer.Option(help="Only these, e.g. text,vision [default: all].")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every site instead of one for equal layers.")] = False,
    context: Annotated[int, typer.Option(min=1, help="Tokens at which shares of FLOPs are counted.")] = 1024,
    trust_remote_code: Trust = False,
    gain: Annotated[
        bool, typer.Option("--break-even", help="Also: the most that skipping can gain here, before any search.")
    ] = False,
    contexts: Annotated[
        str | None, typer.Option(help="With --break-even: tokens per sample, e.g. 64,2048 [default: up to four].")
    ] = None,
    batches: Annotated[str, typer.Option(help="With --break-even: samples per batch.")] = "1,8",
    measure: Annotated[str, typer.Option(help="With --break-even: auto, always, or never (formulas only).")] = "auto",
    device: Annotated[str, typer.Option(help="With --break-even: cpu, cuda, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="With --break-even: precision of the model.")] = "float32",
    time_limit: Annotated[float, typer.Option(help="With --break-even: seconds of measuring.")] = 45.0,
    json: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None,
    plugin: Plugins = None,
    debug: Debug = False,
) -> None:
    """List the attentions of a model that can be skipped, without loading its weights."""
    from eas_search.models.loading import empty_model
    from eas_search.site_survey import survey
    from eas_search.sites_table import print_survey

    empty = empty_model(model, trust_remote_code)
    surveyed = survey(empty, None if towers is None else [name.strip() for name in towers.split(",")], context)
    print_survey(console, surveyed, every)
    figures = surveyed.to_dict()
    if gain:
        from eas_search.break_even import BreakEvenSettings, break_even
        from eas_search.break_even.table import integers, print_break_even

        settings = BreakEvenSettings(
            contexts=None if contexts is None else integers("--contexts", contexts),
            batches=integers("--batches", batches),
            measure=measure,
            device=device,
            dtype=dtype,
            time_limit_s=time_limit,
        )
        with console.status("") as status:
            result = break_even(empty, settings, status.update)
        print_break_even(console, result)
        figures["break_even"] = result.to_dict()
    if json is not None:
        from eas_search.export.files import write_json

        if not json.parent.is_dir():
            raise ConfigError(f"--json {str(json)!r} is in no folder that exists; expected one: make it first")
        write_json(json, figures)
        console.print(f"Wrote {json}")


@app.command()
def report(run: RunFolder, storage: Storage = None, debug: Debug = False) -> None:
    """Write trials.csv and pareto.html of a search again from its stored trials."""
    from eas_search.study.afterwards import rewrite_report

    path = rewrite_report(run, storage)
    console.print(f"Wrote {path}")


@app.command()
def export(  # noqa: PLR0913, PLR0917  (one parameter per flag is how typer works)
    run: RunFolder,
    trial: Annotated[int | None, typer.Option(help="Trial number [default: the chosen one].")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write [default: RUN/export-N[-FORMAT]].")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="eas, adapter, lora, stock, torch-export, onnx or decilm [default: eas, or adapter if it must be].",
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show which formats can hold this configuration.")] = False,
    storage: Storage = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    debug: Debug = False,
) -> None:
    """Re-train a trial's configuration, measure it, export it and verify the export."""
    from eas_search.study.afterwards import export_trial, plan_export

    if plan:
        number, verdicts = plan_export(run, trial, storage, trust_remote_code)
        table = Table(title=f"Export formats for trial {number}", title_justify="left")
        for heading in ("format", "", "why"):
            table.add_column(heading, overflow="fold")
        for name, verdict in verdicts.items():
            table.add_row(name, verdict.kind, verdict.reason)
        console.print(table)
        return
    folder = export_trial(run, trial, output, storage, kind, trust_remote_code)
    console.print(f"Exported and verified: {folder}")


@app.command()
def verify(
    folder: ExportFolder, trust_remote_code: Trust = False, plugin: Plugins = None, debug: Debug = False
) -> None:
    """Reload an export and compare it with the recorded answers of the trained student it was made from."""
    from eas_search.study.afterwards import verify_export

    result = verify_export(folder, trust_remote_code)
    table = Table(title=f"Largest differences, format {result.kind}", title_justify="left")
    table.add_column("asked", overflow="fold")
    table.add_column("difference", justify="right")
    for name, difference in result.report.differences.items():
        table.add_row(name, f"{difference:.1e}")
    for name, reason in result.left_out.items():
        table.add_row(f"{name} ({reason})", "–")
    console.print(table)
    generated = {None: "nothing to generate", True: "generated tokens equal", False: "generated tokens differ"}
    console.print(
        f"Largest {result.report.largest:.1e} (tolerance {result.report.tolerance:g}); "
        f"{generated[result.generated_equal]}\n{folder} is what was trained."
    )


@app.command()
def evaluate(
    folder: ExportFolder,
    data: Annotated[Path | None, typer.Option(help="Folder with the task's data.")] = None,
    limit: Annotated[int | None, typer.Option(help="Held-out samples to use [default: as in the search].")] = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    debug: Debug = False,
) -> None:
    """Measure an export again: held-out accuracy, and latency against its base model."""
    from eas_search.study.afterwards import evaluate_export

    figures = evaluate_export(folder, data, limit, trust_remote_code)
    table = Table(title="Measured now, beside what the export claims", title_justify="left")
    for heading in ("", "now", "claimed"):
        table.add_column(heading)
    for name, (now, claimed) in figures.items():
        table.add_row(name, now, claimed)
    console.print(table)


@app.command()
def score(
    predictions: Annotated[Path, typer.Option(help="JSON: choice (position from 0, letter or text) by problem id.")],
    data: Annotated[Path, typer.Option(help="Folder with the task's data.")],
    task: Annotated[str, typer.Option(help="Task whose published columns are wanted.")] = "scienceqa",
    split: Annotated[str, typer.Option(help="Name of the split in pid_splits.json.")] = "test",
    debug: Debug = False,
) -> None:
    """Score a file of predictions: ScienceQA's nine columns."""
    from eas_search.tasks.science_columns import read_predictions, score_predictions

    if task != "scienceqa":
        raise ConfigError(f"task {task!r} has no published columns; expected 'scienceqa': use `eas-search evaluate`")
    found = score_predictions(data, read_predictions(predictions), split)
    table = Table(title=f"Accuracy on {split}, %", title_justify="left")
    for name in found:
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * value:.2f}" for value in found.values()))
    console.print(table)


@convert_app.callback()
def convert() -> None:
    """Turn published checkpoints into a model folder that `--model` takes."""


@convert_app.command("lavin")
def convert_lavin(
    llama: Annotated[str, typer.Option(help="Folder with params.json and consolidated.*.pth, or a Hugging Face one.")],
    clip: Annotated[str, typer.Option(help="File with OpenAI's state dict, or a Hugging Face folder or hub id.")],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    adapters: Annotated[Path | None, typer.Option(help="checkpoint-*.pth of LaVIN or LaVIN-EAS.")] = None,
    skip: Annotated[str, typer.Option(help="LLaMA layers that its run skipped, e.g. '4,7,21'.")] = "",
    debug: Debug = False,
) -> None:
    """Put LaVIN together from LLaMA, CLIP and, if there is one, a checkpoint of its adapters."""
    from eas_search.conversion import convert_lavin as put_together
    from eas_search.models.lavin.convert import Sources

    layers = [part.strip() for part in skip.split(",") if part.strip()]
    if not all(layer.isdecimal() for layer in layers):
        raise ConfigError(f"skip is {skip!r}; expected numbers of layers with commas between them, e.g. '4,7,21'")
    for folder in put_together(Sources(llama, clip, adapters, tuple(map(int, layers))), output):
        console.print(f"Wrote {folder}")


@convert_app.command("meter")
def convert_meter(
    checkpoint: Annotated[Path, typer.Option(help="Published .ckpt file of METER, pretrained or fine-tuned.")],
    head: Annotated[str, typer.Option(help="What the model ends in: vqa, nlvr2 or retrieval.")],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    image_size: Annotated[int | None, typer.Option(help="Pixels [default: the checkpoint's].")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")] = "roberta-base",
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of METER with CLIP's vision transformer and RoBERTa into a model folder."""
    from eas_search.conversion import METER_HEADS, MeterSource
    from eas_search.conversion import convert_meter as put_together

    kind = next((known for known in METER_HEADS if known == head), None)
    if kind is None:
        raise ConfigError(f"head is {head!r}; expected one of {', '.join(METER_HEADS)}")
    for folder in put_together(MeterSource(checkpoint, kind, image_size, tokenizer), output):
        console.print(f"Wrote {folder}")


def main() -> None:
    """Entry of the console script."""
    if not sys.stdout:
        raise StorageError("there is no standard output")
    sys.exit(guarded(lambda: app(standalone_mode=False), "--debug" in sys.argv))
