"""The end of a search: its choice among the finalists, its files, and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study

from eas_search.plugins import plugin_name
from eas_search.prediction import prediction_report
from eas_search.report.page import PageData, write_page
from eas_search.stage_folder import StageFolder
from eas_search.stages import Baseline
from eas_search.study import outputs
from eas_search.study.finals import Finals
from eas_search.study.frames import mark_chosen, trials_frame
from eas_search.study.progress import Display
from eas_search.study.quality import DEFINITION, metric_quality
from eas_search.workbench import Workbench

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass
class Outcome:
    """What the stages of a search have produced.

    Attributes:
        study: with all trials.
        folder: where the files go.
        bench: the workbench.
        baseline: of the unmodified model.
        redundancy: score of every searchable site.
        finals: the finalists.
        completed: completed trials.
    """

    study: Study
    folder: Path
    bench: Workbench
    baseline: Baseline
    redundancy: list[float]
    finals: Finals
    completed: int


def hand_over(outcome: Outcome, display: Display, timed: Timed) -> dict[str, Any]:
    """Choose, export and write every file; the table of the finals then has its choice marked.

    Whatever the export fails on, the figures are written.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: no finalist is as accurate as was asked for; the table of the finalists is written before.
        VerificationError: the reloaded export does not answer like the trained student.
    """
    folder, bench, baseline, finals = outcome.folder, outcome.bench, outcome.baseline, outcome.finals
    trials = trials_frame(outcome.study, {site.index: site.name for site in bench.sites})
    outputs.write_trials(trials, folder / "trials.csv")
    outputs.write_text(folder / "pareto.json", outputs.to_json(finals.front.to_dict("records")))
    costs = bench.settings.objectives[1:]
    corner = (baseline.selection_accuracy, float(getattr(baseline, costs[0])))
    front = mark_chosen(finals.front, bench.settings.prefer, corner, costs)
    outcome.finals = finals = replace(finals, front=front)
    outputs.write_text(folder / "pareto.json", outputs.to_json(front.to_dict("records")))
    row = {str(key): value for key, value in front[front["chosen"]].iloc[0].items()}
    outputs.write_text(folder / "best.json", outputs.to_json(row))
    finalist = next(f for f in finals.finalists if f.number == row["number"])
    kind, why_not_eas = outputs.possible_format(finalist.student)
    if why_not_eas is not None:
        display.note(f"Export in the format {kind}: eas is impossible, {why_not_eas}")
    display.stage("Export: merged model, reloaded and compared with the trained one")
    try:
        with timed("export"):
            outputs.write_export(bench, finalist, row, baseline, folder / "export", kind)
    finally:
        summary = write_findings(outcome, trials)  # also says how long the export took
    return summary


def write_findings(outcome: Outcome, trials: pd.DataFrame) -> dict[str, Any]:
    """Write `summary.json` and the page; returns the former's content. Arguments as for `summarise`."""
    folder, summary = outcome.folder, summarise(outcome, trials)
    outputs.write_text(folder / "summary.json", outputs.to_json(summary))
    page = PageData(
        trials=trials,
        front=outcome.finals.front,
        baseline=outputs.page_baseline(outcome.baseline),
        sites=outputs.site_rows(outcome.bench, outcome.redundancy),
        summary=json.loads(outputs.to_json(summary)),
        run_dir=str(folder),
        interval_notes=outputs.INTERVAL_NOTES,
    )
    write_page(page, folder / "pareto.html")
    return summary


def summarise(outcome: Outcome, trials: pd.DataFrame) -> dict[str, Any]:
    """The content of `summary.json`; the front's choice is marked, `trials` are from `trials_frame`."""
    front, bench, settings = outcome.finals.front, outcome.bench, outcome.bench.settings
    chosen = front[front["chosen"]].iloc[0]
    return {
        "study_name": outcome.study.study_name,
        "model": settings.model,
        "task": settings.task,
        "metric": bench.splits["test"].scoring.metric,
        "seed": settings.seed,
        "budget": settings.budget,
        "completed": outcome.completed,
        "sites": len(bench.sites),
        "objectives": list(settings.objectives),
        **outputs.front_hypervolume(front, outcome.finals.finalists),
        **outputs.objectives_hypervolume(front, settings.objectives, outcome.baseline),
        "latency": prediction_report(bench, StageFolder(outcome.folder / "stages"), front),
        "baseline": outputs.page_baseline(outcome.baseline),
        "redundancy": _metrics(outcome, trials),
        "front": [int(number) for number in front[front["on_front"]]["number"]],
        "undecided": [int(number) for number in front[front["front"] == "undecided"]["number"]],
        "race": dict(outcome.finals.race),
        "chosen": int(chosen["number"]),
        "wall_clock": outcome.study.user_attrs["wall_clock"],
        "versions": outputs.versions(),
        "hardware": bench.hardware,
        "conditions": outputs.conditions(bench),
        "caches": outcome.study.user_attrs.get("caches"),
        "plugins": [plugin_name(plugin) for plugin in settings.plugins],
        "settings": settings.model_dump(mode="json"),
    }


def _metrics(outcome: Outcome, trials: pd.DataFrame) -> dict[str, Any]:
    """Every redundancy metric: its scores by site, and how well they foretold the trials."""
    record = StageFolder(outcome.folder / "stages").read("supernet")
    assert record is not None, "the supernet stage is over"
    metrics, names = record[0]["metrics"], record[0]["sites"]
    quality = metric_quality(trials, [site.index for site in outcome.bench.sites], metrics)
    return {
        "ranking": outcome.bench.settings.ranking,
        "kendall_tau": DEFINITION,
        "metrics": {
            name: {**quality[name], "scores": dict(zip(names, scores, strict=True))} for name, scores in metrics.items()
        },
    }
