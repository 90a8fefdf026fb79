"""What can be asked of a finished or interrupted search: the page again, another export, a second measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study
from optuna.trial import TrialState

from eas_search.exceptions import ConfigError, StorageError
from eas_search.export import (
    ExportReport,
    Verdict,
    check_possible,
    check_writable,
    get_format,
    load_export,
    plan_formats,
    read_content,
    verify,
)
from eas_search.finalists import measure_finalists, prepare_finalist
from eas_search.latency import LatencyConfig, measure_latency
from eas_search.measures import accuracy_interval
from eas_search.models.loading import empty_model, load_model
from eas_search.models.options import LoadOptions
from eas_search.origin import bind_settings
from eas_search.report.page import PageData, write_page
from eas_search.settings import PROTOCOL, SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.stage_folder import StageFolder
from eas_search.stages import baseline_scores, baseline_stage, supernet_stage
from eas_search.study import outputs
from eas_search.study.frames import front_frame, trials_frame
from eas_search.study.storage import only_writer, open_storage
from eas_search.tasks import get_task
from eas_search.training import on_device, sample_scores
from eas_search.workbench import Workbench, load_for_task

NEEDED = ("base_model", "task", "claims", "latency_batch")  # of what an export says of itself, to measure it again


def open_study(run: Path, storage: str | None = None) -> tuple[Study, SearchSettings]:
    """The study of an output folder and its settings; `storage` as it was given to the search.

    Raises:
        StorageError: there is no such study, or it is not one of a search.
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
    if "settings" not in study.user_attrs:
        raise StorageError(f"study {name!r} is not one of eas_search; expected a search's: check --storage")
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


def trial_config(run: Path, number: int | None, storage: str | None) -> tuple[SearchSettings, int, SkipConfig]:
    """(settings of the search, number, skip configuration) of a trial; None is the chosen one.

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
    return settings, number, SkipConfig(**done[number].user_attrs["config"])


def plan_export(
    run: Path, number: int | None, storage: str | None = None, trust_remote_code: bool = False
) -> tuple[int, dict[str, Verdict]]:
    """(number, verdict per format) of a trial, from its configuration and the model's alone: no weights are loaded.

    Raises:
        ConfigError: there is no such completed trial.
        UnsupportedModelError: the model needs code that comes with it, and `trust_remote_code` is not set.
    """
    settings, number, config = trial_config(run, number, storage)
    task = get_task(settings.task, settings.data, settings.task_options)
    student: Any = apply_skips(empty_model(settings.model, trust_remote_code, task.head), config)
    if settings.quantization is not None:
        student.is_quantized = True  # as what the search had, with weights, says of itself
    return number, plan_formats(student)


def export_trial(
    run: Path,
    number: int | None,
    output: Path | None,
    storage: str | None = None,
    kind: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Re-train (or take the kept finalist of) a trial, time it, export it in a format and verify it.

    What can be refused is refused before anything is trained. A format of None is the one that a search writes.

    Raises:
        ConfigError: there is no such completed trial, or no such format.
        UnsupportedModelError: the format cannot hold this configuration.
        StorageError: the output folder cannot be written.
    """
    if kind is not None:
        get_format(kind)  # an unknown one is refused at once
    settings, number, config = trial_config(run, number, storage)
    settings = settings.trusting_remote_code() if trust_remote_code else settings
    folder = output or run / (f"export-{number}" if kind in (None, "eas") else f"export-{number}-{kind}")
    check_writable(folder)
    with only_writer(run):
        bind_settings(StageFolder(run / "stages"), settings)
        bench = Workbench.open(settings, run)  # a trial that is trained again is trained as the study was
        student = bench.student(config)
        kind = kind or outputs.possible_format(student)[0]
        check_possible(get_format(kind), student)
        stages = StageFolder(run / "stages")
        baseline, adapted = baseline_stage(bench, stages, lambda *_: None)
        supernet, _ = supernet_stage(bench, stages, adapted, lambda *_: None)
        finalist = prepare_finalist(bench, supernet, stages, number, config)
        figures = measure_finalists(bench, [finalist], stages)
        table = front_frame([finalist], figures, bench.sites, baseline_scores(stages))
        row = {str(key): value for key, value in table.iloc[0].items()}
        outputs.write_export(bench, finalist, row, baseline, folder, kind)
    return folder


def verify_export(folder: Path, trust_remote_code: bool = False) -> ExportReport:
    """`export.verify`, with a base model that may bring code of its own if `trust_remote_code` says so."""
    content = read_content(folder)
    facts, base = _facts(content), None
    if isinstance(facts.get("base_model"), str) and (trust_remote_code or facts.get("quantization")):
        options = _base_options(content, trust_remote_code)
        base, _ = load_model(facts["base_model"], options, facts.get("head", "generation"), facts.get("labels"))
    return verify(folder, base=base)


def _facts(content: dict[str, Any]) -> dict[str, Any]:
    """What an export says of the search that it is from."""
    facts = content.get("about")
    return facts if isinstance(facts, dict) else {}


def _base_options(content: dict[str, Any], trust_remote_code: bool) -> LoadOptions:
    """How the base model of an export is loaded: in the precision of the search; four bits need an accelerator."""
    four_bits = _facts(content).get("quantization")
    return LoadOptions(
        device="auto" if four_bits else "cpu",
        dtype=content["dtype"],
        quantization=four_bits,
        trust_remote_code=trust_remote_code,
    )


def evaluate_export(
    folder: Path, data: Path | None, limit: int | None, trust_remote_code: bool = False
) -> dict[str, tuple[str, str]]:
    """Accuracy and latency of an export, measured now, as (now, claimed) by name.

    Raises:
        StorageError: the export does not say what it was trained for.
        ConfigError: it is no model that generates, or there are no such data.
        UnsupportedModelError: its base model needs code of its own, and `trust_remote_code` is not set.
    """
    content = read_content(folder)
    facts = _facts(content)
    if missing := [name for name in NEEDED if name not in facts]:
        raise StorageError(
            f"export {str(folder)!r} does not say its {missing[0].replace('_', ' ')}; expected one that a search or "
            "`eas-search export` wrote: export it again"
        )
    if not get_format(content["kind"]).generates:
        raise ConfigError(
            f"export {str(folder)!r} has format {content['kind']!r}, a graph of the prefill; expected one that is a "
            "model: evaluate the format eas"
        )
    task, claims = get_task(facts["task"], data, facts.get("task_options")), facts["claims"]
    base, processor = load_for_task(task, facts["base_model"], _base_options(content, trust_remote_code))
    model = load_export(folder, base)
    held_out = facts.get("held_out_limit") if limit is None else limit
    split = task.encode(processor, task.examples("test", held_out))
    scores = sample_scores(model, split)
    accuracy, low, high = accuracy_interval(scores)
    validation = task.encode(processor, task.examples("validation", facts["latency_batch"]))
    inputs = on_device(validation.prompts(facts["latency_batch"]), model)
    report = measure_latency(model, inputs, baseline=base, config=LatencyConfig())

    def interval(value: float, bottom: float, top: float) -> str:
        return f"{value:.4f} ({bottom:.4f} – {top:.4f})"

    def claimed(name: str) -> str:
        values = [claims.get(f"{name}{end}") for end in ("", "_low", "_high")]
        return "" if None in values else interval(*values)

    figures = {
        f"held-out {split.scoring.metric}": (
            interval(accuracy, low, high),
            claimed("accuracy"),
        )
    }
    if facts.get("protocol") != PROTOCOL:
        figures["  samples as taken by"] = ("this version", "another version")
    for name, value in split.scoring.report(split, scores).items():
        before = claims.get("breakdown", {}).get(name)
        figures[f"  {name}"] = (f"{value:.4f}", "" if before is None else f"{before:.4f}")
    for name, phase, key in (("prefill", report.prefill, "latency"), ("decode", report.decode, "decode_latency")):
        if phase is not None:
            ratio: Any = phase.ratio
            figures[f"{name} time, relative"] = (
                interval(ratio.estimate, ratio.low, ratio.high),
                claimed(key),
            )
    return figures
