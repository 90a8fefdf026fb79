"""A search from its settings to its files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study

from eas_search.exceptions import ConfigError
from eas_search.measures import kv_bytes_per_token
from eas_search.origin import bind_settings
from eas_search.prediction import describe_errors, finalists_errors, predictor_stage
from eas_search.samplers import check_budget
from eas_search.settings import SearchSettings
from eas_search.stage_folder import StageFolder
from eas_search.stages import Baseline, baseline_stage, supernet_stage
from eas_search.study.endings import undisturbed
from eas_search.study.finals import hold_finals
from eas_search.study.heap import settled_heap
from eas_search.study.progress import Display
from eas_search.study.storage import load_or_create, only_writer, open_storage, prepare_output, reap
from eas_search.study.summary import Outcome, hand_over
from eas_search.study.trials import Trials
from eas_search.study.workers import workers
from eas_search.workbench import Workbench


@dataclass
class SearchResult:
    """What a search leaves behind.

    Attributes:
        folder: the output folder.
        completed: completed trials.
        front: the finalists, see `report.page.PageData.front`.
        baseline: of the unmodified model.
        summary: content of `summary.json`.
        reached: whether the budget was reached.
    """

    folder: Path
    completed: int
    front: pd.DataFrame
    baseline: Baseline
    summary: dict[str, Any]
    reached: bool


def create_study(settings: SearchSettings, folder: Path, name: str, storage: str | None = None) -> Study:
    """The Optuna study of a search, made on first use.

    Args:
        settings: must be those of the first time, apart from budget, jobs, time limit and preference.
        folder: output folder.
        name: of the study.
        storage: Optuna storage URL; None for `study.db` in the folder.

    Raises:
        StorageError: the folder or the storage cannot be used, or holds another search.
    """
    prepare_output(folder)
    bind_settings(StageFolder(folder / "stages"), settings)
    return load_or_create(open_storage(storage, folder), name, settings)


def run_study(study: Study, settings: SearchSettings, folder: Path, display: Display) -> SearchResult:
    """Run or resume a search up to its budget and write its files into `folder`.

    Raises:
        EasSearchError: anything a user can cure; finished trials are kept.
    """
    with only_writer(folder):
        try:
            return _Search(study, settings, folder, display).run()
        except BaseException:
            # Also for Ctrl-C: whatever was under way fails and is queued again, nothing stays RUNNING.
            with undisturbed():
                reap(study)
            raise


def check_costs(bench: Workbench) -> None:
    """Refuse a cost that no skipped attention could lower.

    Raises:
        ConfigError: `kv_bytes`, and no searchable attention has a KV cache.
    """
    if "kv_bytes" not in bench.settings.objectives:
        return
    cached = any(site.causal for site in bench.sites)
    if not cached or kv_bytes_per_token(bench.model, bench.latency_inputs()) == 0:
        raise ConfigError(
            f"objective 'kv_bytes' is the same for every trial: no searchable attention of {bench.settings.model!r} "
            "has a KV cache; expected costs that skipping lowers: leave it out of --objectives, or search other towers"
        )


@dataclass
class _Search:
    study: Study
    settings: SearchSettings
    folder: Path
    display: Display
    goal: int = 0

    def run(self) -> SearchResult:
        deadline = None if self.settings.time_limit is None else time.monotonic() + self.settings.time_limit
        with self._timed("load"):
            again = reap(self.study)
            if again:
                self.display.note(f"{again} interrupted trial(s) of an earlier run are queued again")
            self.display.stage(f"Loading model {self.settings.model!r} and task {self.settings.task!r}")
            bench = Workbench.open(self.settings, self.folder)
            check_budget(self.settings.sampler, bench.space, self.settings.budget)
            check_costs(bench)
            # A small space ends before the budget does: nothing is evaluated twice.
            self.goal = min(self.settings.budget, bench.space.size)
            if self.goal < self.settings.budget:
                self.display.note(f"The search space holds {self.goal} configurations; all of them will be tried")
            for note in bench.task.notes:
                self.display.note(f"Data: {note}")
            for site, reason in bench.refused.items():
                self.display.note(f"Left out of the search: {site}: {reason}")
        with settled_heap():
            return self._search(bench, deadline)

    def _search(self, bench: Workbench, deadline: float | None) -> SearchResult:
        stages = StageFolder(self.folder / "stages")
        with self._timed("baseline"):
            self.display.stage("Baseline: score, adapter-only fine-tune and latency of the unmodified model")
            baseline, adapted = baseline_stage(bench, stages, self.display.step)
            self.display.note(
                f"Baseline: {bench.task.metric} {baseline.zero_shot_accuracy:.3f} before, {baseline.accuracy:.3f} "
                f"after adapter-only fine-tuning (held-out); prefill {1000 * baseline.prefill_s:.1f} ms"
            )
        with self._timed("supernet"):
            self.display.stage("Supernet: closed-form start, joint training, redundancy scores")
            supernet, redundancy = supernet_stage(bench, stages, adapted, self.display.step)
            top = sorted(zip(redundancy, bench.sites, strict=True), key=lambda pair: -pair[0])[:3]
            self.display.note("Most redundant attentions: " + ", ".join(site.name for _, site in top))
        if self.settings.latency == "predicted":
            with self._timed("predictor"):
                self.display.stage("Latency predictor: timing a few configurations")
                self.display.note(predictor_stage(bench, stages).describe())
        with workers(self.settings, self.folder) as pool:
            with self._timed("trials"):
                trials = Trials(self.study, bench, supernet, redundancy, self.folder, self.display, pool)
                completed = trials.run(deadline)
            with self._timed("finalists"):
                finals = hold_finals(self.study, bench, supernet, stages, self.display, pool)
        if self.settings.latency == "predicted":
            self.display.note(describe_errors(finalists_errors(bench, finals.front)))
        for note in bench.caches.notes():
            self.display.note(note)
        outcome = Outcome(self.study, self.folder, bench, baseline, redundancy, finals, completed)
        summary = hand_over(outcome, self.display, self._timed)
        return SearchResult(self.folder, completed, outcome.finals.front, baseline, summary, completed >= self.goal)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Seconds of a stage, added to those of earlier runs of this study, also when the stage is interrupted."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with undisturbed():
                wall_clock = dict(self.study.user_attrs.get("wall_clock", {}))
                wall_clock[stage] = round(wall_clock.get(stage, 0.0) + time.perf_counter() - begin, 3)
                self.study.set_user_attr("wall_clock", wall_clock)
