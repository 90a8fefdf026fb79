"""A search from its settings to its files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study

from eas_search.exceptions import EasSearchError
from eas_search.finalists import Finalist, measure_finalists, prepare_finalist, select_finalists
from eas_search.objective import TrialResult, evaluate
from eas_search.plugins import plugin_name
from eas_search.report.front import non_dominated
from eas_search.report.page import PageData, write_page
from eas_search.samplers import check_budget, make_sampler, ranking_prefixes
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stages import Baseline, StageFolder, baseline_stage, supernet_stage
from eas_search.study import outputs
from eas_search.study.frames import front_frame, mark_chosen, trials_frame
from eas_search.study.loop import TrialLoop, run_here, run_in_workers
from eas_search.study.progress import Display, TrialNews
from eas_search.study.quality import DEFINITION, metric_quality
from eas_search.study.storage import load_or_create, only_writer, open_storage, prepare_output, reap, undisturbed
from eas_search.supernet import Supernet
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


@dataclass
class _Search:
    study: Study
    settings: SearchSettings
    folder: Path
    display: Display
    sites: int = 0
    metric: str = "accuracy"
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
            self.sites, self.metric = len(bench.sites), bench.splits["test"].scoring.metric
            # A small space ends before the budget does: nothing is evaluated twice.
            self.goal = min(self.settings.budget, bench.space.size)
            if self.goal < self.settings.budget:
                self.display.note(f"The search space holds {self.goal} configurations; all of them will be tried")
            for note in bench.task.notes:
                self.display.note(f"Data: {note}")
            for site, reason in bench.refused.items():
                self.display.note(f"Left out of the search: {site}: {reason}")
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
        with self._timed("trials"):
            completed = self._trials(bench, supernet, redundancy, deadline)
        with self._timed("finalists"):
            finalists, front = self._finalists(bench, supernet, stages)
        return self._hand_over(bench, baseline, redundancy, finalists, front, completed)

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

    def _trials(self, bench: Workbench, supernet: Supernet, redundancy: list[float], deadline: float | None) -> int:
        with undisturbed():
            known = self._queue_prefixes(bench, redundancy)
        settings = self.settings
        sampler = make_sampler(
            settings.sampler, bench.space, redundancy, settings.seed, known, settings.supernet.bandit
        )
        self.study.sampler = sampler
        loop = TrialLoop(self.study, bench.space, sampler, self.settings, self._news, deadline)
        before = len(loop.completed())
        if before < self.goal:
            self.display.stage(f"Trials: {before} of {self.goal} done")
            if self.settings.jobs == 1:
                loop.run(run_here(lambda config: evaluate(bench, supernet, redundancy, config)), 1)
            else:
                with run_in_workers(self.settings, self.folder) as submit:
                    loop.run(submit, self.settings.jobs)
        return len(loop.completed())

    def _queue_prefixes(self, bench: Workbench, redundancy: list[float]) -> int:
        """Queue the ranking's prefixes that are not in the study yet; returns how many trials it had.

        A kill may have come between two of them. Their number follows from the study's first budget, not a later one.
        """
        trials = self.study.get_trials(deepcopy=False)
        queued = [trial.system_attrs.get("fixed_params") for trial in trials]
        first_budget = self.study.user_attrs["settings"]["budget"]
        for config in ranking_prefixes(bench.space, redundancy, max(1, first_budget // 3)):
            params = bench.space.to_params(config)
            if params not in queued:
                self.study.enqueue_trial(params, user_attrs={"origin": "ranking prefix"})
        return len(trials)

    def _news(self, number: int, config: SkipConfig, result: TrialResult) -> None:
        done = trials_frame(self.study)
        done = done[done["state"] == "COMPLETE"]
        accuracy, latency = done["accuracy"].astype(float), done["latency"].astype(float)
        best = int(accuracy.to_numpy().argmax())
        self.display.trial(
            TrialNews(
                done=len(done),
                budget=self.goal,
                number=number,
                skipped=len(config.skip),
                sites=self.sites,
                accuracy=result.accuracy,
                latency=result.latency,
                front=int(non_dominated(accuracy.to_numpy(), latency.to_numpy()).sum()),
                best=f"{accuracy.iloc[best]:.3f} at {1 / latency.iloc[best]:.2f}×",
                metric=self.metric,
            )
        )

    def _finalists(
        self, bench: Workbench, supernet: Supernet, stages: StageFolder
    ) -> tuple[list[Finalist], pd.DataFrame]:
        trials = trials_frame(self.study, {site.index: site.name for site in bench.sites})
        # A configuration proposed twice has one result; it must not take two places.
        done = trials[trials["state"] == "COMPLETE"].drop_duplicates(subset=["skip", "pia_dim", "placement"])
        if done.empty:
            raise EasSearchError(
                "no trial was completed, so there is no front; expected at least one: raise --time-limit and run again"
            )
        chosen = select_finalists(done["accuracy"].tolist(), done["latency"].tolist(), self.settings.finalists)
        self.display.stage(f"Finalists: re-training {len(chosen)} configurations, timing them side by side")
        finalists = []
        for position, index in enumerate(chosen):
            row = done.iloc[index]
            config = SkipConfig(**row["config"])
            finalists.append(prepare_finalist(bench, supernet, stages, int(row["number"]), config))
            self.display.step("finalists", position + 1, len(chosen))
        figures = measure_finalists(bench, finalists, stages)
        return finalists, front_frame(finalists, figures, bench.sites)

    def _hand_over(  # every product of the stages goes into the files
        self,
        bench: Workbench,
        baseline: Baseline,
        redundancy: list[float],
        finalists: list[Finalist],
        front: pd.DataFrame,
        completed: int,
    ) -> SearchResult:
        folder = self.folder
        trials = trials_frame(self.study, {site.index: site.name for site in bench.sites})
        outputs.write_trials(trials, folder / "trials.csv")
        outputs.write_text(folder / "pareto.json", outputs.to_json(front.to_dict("records")))
        front = mark_chosen(front, self.settings.prefer, baseline.validation_accuracy)
        outputs.write_text(folder / "pareto.json", outputs.to_json(front.to_dict("records")))
        row = {str(key): value for key, value in front[front["chosen"]].iloc[0].items()}
        outputs.write_text(folder / "best.json", outputs.to_json(row))
        finalist = next(f for f in finalists if f.number == row["number"])
        self.display.stage("Export: merged model, reloaded and compared with the trained one")
        with self._timed("export"):
            outputs.write_export(bench, finalist, row, baseline, folder / "export")
        summary = self._summary(bench, baseline, trials, front, completed)
        outputs.write_text(folder / "summary.json", outputs.to_json(summary))
        page = PageData(
            trials=trials,
            front=front,
            baseline=outputs.page_baseline(baseline),
            sites=outputs.site_rows(bench, redundancy),
            summary=json.loads(outputs.to_json(summary)),
            run_dir=str(folder),
            interval_notes=outputs.INTERVAL_NOTES,
        )
        write_page(page, folder / "pareto.html")
        return SearchResult(folder, completed, front, baseline, summary, completed >= self.goal)

    def _metrics(self, bench: Workbench, trials: pd.DataFrame) -> dict[str, Any]:
        """Every redundancy metric: its scores by site, and how well they foretold the trials."""
        record = StageFolder(self.folder / "stages").read("supernet")
        assert record is not None, "the supernet stage is over"
        metrics, names = record[0]["metrics"], record[0]["sites"]
        quality = metric_quality(trials, [site.index for site in bench.sites], metrics)
        return {
            "ranking": self.settings.ranking,
            "kendall_tau": DEFINITION,
            "metrics": {
                name: {**quality[name], "scores": dict(zip(names, scores, strict=True))}
                for name, scores in metrics.items()
            },
        }

    def _summary(
        self, bench: Workbench, baseline: Baseline, trials: pd.DataFrame, front: pd.DataFrame, completed: int
    ) -> dict[str, Any]:
        chosen = front[front["chosen"]].iloc[0]
        return {
            "study_name": self.study.study_name,
            "model": self.settings.model,
            "task": self.settings.task,
            "metric": bench.splits["test"].scoring.metric,
            "seed": self.settings.seed,
            "budget": self.settings.budget,
            "completed": completed,
            "hypervolume": outputs.front_hypervolume(front),
            "baseline": outputs.page_baseline(baseline),
            "redundancy": self._metrics(bench, trials),
            "front": [int(number) for number in front[front["on_front"]]["number"]],
            "chosen": int(chosen["number"]),
            "wall_clock": self.study.user_attrs["wall_clock"],
            "versions": outputs.versions(),
            "hardware": bench.hardware,
            "conditions": outputs.conditions(bench),
            "plugins": [plugin_name(plugin) for plugin in self.settings.plugins],
            "settings": self.settings.model_dump(mode="json"),
        }
