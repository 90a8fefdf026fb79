"""What can be asked of a finished or interrupted search: the page again, another export, a second measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study
from optuna.trial import TrialState

from eas_search.exceptions import ConfigError, StorageError
from eas_search.export import about, load_pretrained
from eas_search.finalists import measure_finalists, prepare_finalist
from eas_search.latency import LatencyConfig, measure_latency
from eas_search.measures import accuracy_interval
from eas_search.models.loading import load_model
from eas_search.report.page import PageData, write_page
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stages import StageFolder, baseline_stage, supernet_stage
from eas_search.study import outputs
from eas_search.study.frames import front_frame, trials_frame
from eas_search.study.storage import only_writer, open_storage
from eas_search.tasks import get_task
from eas_search.training import correct_answers, on_device
from eas_search.workbench import Workbench


def open_study(run: Path, storage: str | None = None) -> tuple[Study, SearchSettings]:
    """The study of an output folder and its settings; `storage` as it was given to the search.

    Raises:
        StorageError: there is no such study.
    """
    import optuna

    if storage is None and not (run / "study.db").is_file():
        raise StorageError(
            f"{str(run)!r} holds no study.db; expected the output of a search: run one first, or name its --storage"
        )
    opened = open_storage(storage, run)
    names = [summary.study_name for summary in opened.get_all_studies()]
    name = names[0] if len(names) == 1 else outputs.read_json(run / "summary.json")["study_name"]
    if name not in names:
        raise StorageError(f"the storage of {str(run)!r} holds studies {names}; expected {name!r}: check --storage")
    study = optuna.load_study(study_name=name, storage=opened)
    return study, SearchSettings(**study.user_attrs["settings"])


def rewrite_report(run: Path, storage: str | None = None) -> Path:
    """Write trials.csv and pareto.html again; finalists and conditions come from the files of the search."""
    study, _ = open_study(run, storage)
    summary = outputs.read_json(run / "summary.json")
    front = pd.DataFrame(outputs.read_json(run / "pareto.json"))
    record = StageFolder(run / "stages").read("supernet")
    if record is None:
        raise StorageError(f"{str(run)!r} has no finished supernet stage; expected a finished search: run it again")
    names, scores = record[0]["sites"], record[0]["redundancy"]
    rows = [
        {"index": index, "name": name, "tower": tower, "redundancy": score}
        for (index, tower), name, score in zip(record[0]["places"], names, scores, strict=True)
    ]
    trials = trials_frame(study, {row["index"]: row["name"] for row in rows})
    outputs.write_trials(trials, run / "trials.csv")
    for column in ("skip", "skip_names"):
        front[column] = [tuple(value) for value in front[column]]
    page = PageData(trials, front, summary["baseline"], rows, summary, str(run), outputs.INTERVAL_NOTES)
    write_page(page, run / "pareto.html")
    return run / "pareto.html"


def export_trial(run: Path, number: int | None, output: Path | None, storage: str | None = None) -> Path:
    """Re-train (or take the kept finalist of) a trial, time it, export and verify it.

    Raises:
        ConfigError: there is no such completed trial.
    """
    study, settings = open_study(run, storage)
    if number is None:
        number = int(outputs.read_json(run / "best.json")["number"])
    done = {trial.number: trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if number not in done:
        known = f"{min(done)} to {max(done)}" if done else "none yet"
        raise ConfigError(
            f"trial {number} is not a completed trial of {str(run)!r}; expected one of {known}: see trials.csv"
        )
    folder = output or run / f"export-{number}"
    with only_writer(run):
        bench = Workbench.open(settings, None)
        stages = StageFolder(run / "stages")
        baseline, adapted = baseline_stage(bench, stages, lambda *_: None)
        supernet, _ = supernet_stage(bench, stages, adapted, lambda *_: None)
        config = SkipConfig(**done[number].user_attrs["config"])
        finalist = prepare_finalist(bench, supernet, stages, number, config)
        figures = measure_finalists(bench, [finalist], stages)
        row = {str(key): value for key, value in front_frame([finalist], figures, bench.sites).iloc[0].items()}
        outputs.write_export(bench, finalist, row, baseline, folder)
    return folder


def evaluate_export(folder: Path, data: Path | None, limit: int | None) -> dict[str, tuple[str, str]]:
    """Accuracy and latency of an export, measured now, as (now, claimed) by name."""
    facts = about(folder)
    if not facts:
        raise StorageError(
            f"export {str(folder)!r} names no task and base model; expected one from `eas-search export`"
        )
    model = load_pretrained(folder)
    base, processor = load_model(facts["base_model"], "cpu", str(next(model.parameters()).dtype).removeprefix("torch."))
    task, claims = get_task(facts["task"], data), facts["claims"]
    held_out = int(facts["conditions"]["held-out samples"]) if limit is None else limit
    split = task.encode(processor, task.examples("test", held_out))
    accuracy, low, high = accuracy_interval(correct_answers(model, split))
    validation = task.encode(processor, task.examples("validation", facts["latency_batch"]))
    inputs = on_device(validation.prompts(facts["latency_batch"]), model)
    report = measure_latency(model, inputs, baseline=base, config=LatencyConfig())

    def interval(value: float, bottom: float, top: float) -> str:
        return f"{value:.4f} ({bottom:.4f} – {top:.4f})"

    figures = {
        "held-out accuracy": (
            interval(accuracy, low, high),
            interval(*(claims[f"accuracy{end}"] for end in ("", "_low", "_high"))),
        )
    }
    for name, phase, key in (("prefill", report.prefill, "latency"), ("decode", report.decode, "decode_latency")):
        if phase is not None:
            ratio: Any = phase.ratio
            figures[f"{name} time, relative"] = (
                interval(ratio.estimate, ratio.low, ratio.high),
                interval(*(claims[f"{key}{end}"] for end in ("", "_low", "_high"))),
            )
    return figures
