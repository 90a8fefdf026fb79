"""`python -m eas_search.run`: the search from the command line.

Only light modules are imported at the top: the first line appears before torch is loaded.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from eas_search import __version__
from eas_search.exceptions import ConfigError, EasSearchError
from eas_search.names import SAMPLERS

if TYPE_CHECKING:
    from eas_search.settings import SearchSettings

# Without markup: a path, a name or a reason may hold what looks like some, e.g. `runs/[lr=1]`.
console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

INTERRUPTED, USER_ERROR, UNFINISHED = 130, 2, 1
# Flags that no study file can set.
TRUST, PLUGINS, STEPS = "trust_remote_code", "plugins", "fine_tune_steps"
# typer carries its own copy of click, so the base of its errors is found through a public name.
UsageError: Any = typer.BadParameter.__base__


@dataclass(frozen=True)
class RunPlace:
    """Where a search is kept."""

    output: Path
    study_name: str
    storage: str | None


def run_command(  # noqa: PLR0913, PLR0917  (one parameter per flag is how typer works)
    budget: Annotated[int | None, typer.Option(help="Total number of completed trials [default: 50].")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML study file; flags win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="'demo', a hub id, or a model folder [default: demo].")] = None,
    task: Annotated[str | None, typer.Option(help="Name of a task [default: digits-vqa].")] = None,
    data: Annotated[Path | None, typer.Option(help="The task's data: a file, a folder or a hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Output folder [default: runs/STUDY_NAME].")] = None,
    study_name: Annotated[str | None, typer.Option(help="Name of the study [default: TASK-MODEL].")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL [default: OUTPUT/study.db].")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides samples, proposals and training [default: 0].")] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes [default: 1].")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)} [default: eas].")] = None,
    fine_tune_steps: Annotated[
        int | None, typer.Option(help="Steps of every fine-tune; 0: no training, closed-form starts only.")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="accuracy, then latency, kv_bytes, parameters, flops [default: accuracy,latency]."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Of trials: predicted or measured; finalists are measured [default: predicted].")
    ] = None,
    towers: Annotated[
        str | None, typer.Option(help="Whose attentions may go, e.g. text,vision [default: the text's].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto [default: auto].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the frozen model [default: float32].")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="Of training and trials: bf16, no or auto: where it is faster [default: auto].")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto, or JSON from modules to devices: several devices [default: one].")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="4bit: frozen layers in NF4 (CUDA only).")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations: less memory, slower training.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Python file or module to import first, which registers a task or pattern. Runs it."),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no trial starts.")] = None,
    prefer: Annotated[
        str | None, typer.Option(help="knee, or accuracy=0.99 (× the baseline's) [default: knee].")
    ] = None,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Print the first training batch as the model gets it, and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Search which attentions can go, and export a model without them.

    Writes trials.csv, pareto.html, best.json, export/ and more into OUTPUT. The same command again resumes.
    """
    values = locals()
    given = {
        name: values[name]
        for name in (
            "budget",
            "model",
            "task",
            "data",
            "seed",
            "jobs",
            "sampler",
            "latency",
            "device",
            "dtype",
            "mixed_precision",
            "device_map",
            "quantization",
            "gradient_checkpointing",
            "time_limit",
            "prefer",
        )
        if values[name] is not None
    }
    if objectives is not None:
        given["objectives"] = names(objectives)
    if towers is not None:
        given["space"] = {"towers": names(towers)}
    console.print(Text.assemble((f"eas_search {__version__}", "bold"), "  which attentions can this model do without?"))
    given |= {TRUST: trust_remote_code, PLUGINS: tuple(plugin or ()), STEPS: fine_tune_steps}
    if show_batch:
        _show_batch(given, config)
    else:
        _search(given, config, output, study_name, storage)


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")]


def _show_batch(given: dict[str, Any], config: Path | None) -> None:
    settings, _ = _settle(given, config, None, None, None)
    from eas_search.study.preview import describe_first_batch

    for line in describe_first_batch(settings):
        console.print(line, soft_wrap=True)


def _search(
    given: dict[str, Any], config: Path | None, output: Path | None, study_name: str | None, storage: str | None
) -> None:
    console.print("Loading libraries …")
    settings, place = _settle(given, config, output, study_name, storage)
    from eas_search.full_disk import full_disk_explained
    from eas_search.study import create_study, run_study
    from eas_search.study.closing import show_result
    from eas_search.study.endings import SureInterrupt
    from eas_search.study.progress import make_display

    with full_disk_explained(place.output):
        study = create_study(settings, place.output, place.study_name, place.storage)
    display = make_display(console)
    sure = SureInterrupt(display)
    try:
        result = run_study(study, settings, place.output, sure)
    finally:
        sure.restore()
        display.close()
    show_result(console, result, settings)
    if not result.reached:
        console.print(
            f"Stopped at {result.completed} of {settings.budget} trials (time limit). Resume with: {this_command()}"
        )
        raise typer.Exit(UNFINISHED)


def _settle(
    given: dict[str, Any], config: Path | None, output: Path | None, study_name: str | None, storage: str | None
) -> tuple[SearchSettings, RunPlace]:
    """Settings and place from flags and study file; everything that can be wrong with them is said before any work."""
    if (budget := given.get("budget")) is not None and budget < 1:
        raise ConfigError(f"--budget is {budget}; expected 1 or more completed trials: try --budget 50")
    from eas_search.models.loading import model_location
    from eas_search.models.placement import check_placement
    from eas_search.plugins import load_plugins
    from eas_search.settings import SearchSettings
    from eas_search.tasks import get_task

    trust, plugins, steps = given.pop(TRUST, False), given.pop(PLUGINS, ()), given.pop(STEPS, None)
    load_plugins(plugins)
    settings = SearchSettings(**given) if config is None else SearchSettings.from_file(config, given)
    settings = settings.with_plugins(plugins)
    if steps is not None:
        settings = settings.fine_tuned_for(steps)
    if trust:
        settings = settings.trusting_remote_code()
    model_location(settings.model)
    check_placement(settings.loading)
    get_task(settings.task, settings.data, settings.task_options)
    name = study_name or f"{settings.task}-{Path(settings.model).name}"
    return settings, RunPlace(output or Path("runs") / folder_name(name), name, storage)


def folder_name(study: str) -> str:
    """The default folder of a study. A name from a user never becomes a path: only harmless characters reach it.

    Where others were left out, a digest keeps names apart that would look the same without them.
    """
    harmless = re.sub(r"[^A-Za-z0-9._-]+", "-", study).strip(".-")
    if harmless == study:
        return study
    return f"{harmless or 'study'}-{hashlib.sha256(study.encode()).hexdigest()[:8]}"


def this_command() -> str:
    """The command line that was typed, ready to be typed again."""
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "eas_search.run"] if program in ("run.py", "__main__.py") else [program]
    return shlex.join([*start, *sys.argv[1:]])


def guarded(call: Callable[[], Any], debug: bool) -> int:
    """Run a command; turn what a user caused into one line and an exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        # An encoding without "★" must not end a search that has just finished.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = call()
    except EasSearchError as error:
        if debug:
            raise
        errors.print(f"eas-search: {error}")
        return USER_ERROR
    except typer.Abort:
        code = INTERRUPTED
    except UsageError as error:
        errors.print(f"eas-search: {_typed(error)}{error.format_message()} See --help.")
        return USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        errors.print(f"\nInterrupted; finished trials are kept. Resume with: {this_command()}")
    return int(code or 0)


def _typed(error: Any) -> str:
    """The option and value that a usage error is about; typer leaves the value out."""
    options = getattr(getattr(error, "param", None), "opts", [])
    words = [word for argument in sys.argv for word in argument.split("=", 1)]
    return "".join(f"{option} {value}: " for option, value in pairwise(words) if option in options)


def main() -> None:
    """Entry of `python -m eas_search.run`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(run_command)
    sys.exit(guarded(lambda: app(standalone_mode=False), "--debug" in sys.argv))


if __name__ == "__main__":
    main()
