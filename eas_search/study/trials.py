"""The trials of a search, from the ranking's prefixes to the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from optuna.study import Study

from eas_search.exceptions import ConfigError
from eas_search.names import Objective
from eas_search.objective import TrialResult, evaluate, foretold_cost
from eas_search.rungs import Rival, strongest_rival
from eas_search.samplers import make_sampler, ranking_prefixes
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.study.endings import undisturbed
from eas_search.study.loop import TrialLoop, run_here
from eas_search.study.progress import Display, Tally
from eas_search.study.workers import Workers
from eas_search.supernet import Supernet
from eas_search.workbench import Workbench

# What `foretold_cost` tells; with other objectives a trial that has lost in these may still win.
FORETOLD: frozenset[Objective] = frozenset({"accuracy", "latency", "kv_bytes"})


@dataclass
class Trials:
    """The stage of a search that asks, evaluates and tells.

    Attributes:
        study: with its storage.
        bench: model, samples and search space.
        supernet: from which every student inherits.
        redundancy: scores of the searchable sites.
        folder: the output folder.
        display: gets the news.
        pool: needed where the settings want more than one job.
    """

    study: Study
    bench: Workbench
    supernet: Supernet
    redundancy: list[float]
    folder: Path
    display: Display
    pool: Workers | None = None
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        # A small space ends before the budget does: nothing is evaluated twice.
        goal = min(self.settings.budget, self.bench.space.size)
        metric, objectives = self.bench.splits["test"].scoring.metric, self.settings.objectives
        self.tally = Tally(goal, len(self.bench.sites), metric, objectives)

    @property
    def settings(self) -> SearchSettings:
        """Of the search."""
        return self.bench.settings

    def rankings(self) -> dict[str, list[float]]:
        """What the proposals start from: the settings' ranking, and for `eas` every other recorded metric behind it.

        A metric that is not finite orders nothing and is left out: gradients may overflow where losses do not.

        Raises:
            ConfigError: the settings' ranking, or what the supernet loses without an attention, is not finite.
        """
        record = StageFolder(self.folder / "stages").read("supernet")
        metrics: dict[str, list[float]] = {} if record is None else record[0]["metrics"]
        rankings: dict[str, list[float]] = {self.settings.ranking: self.redundancy}
        for name in (self.settings.ranking, "leave_one_out"):
            if not all(map(math.isfinite, {**metrics, **rankings}.get(name, ()))):
                raise ConfigError(
                    f"redundancy by {name!r} is not finite, so the supernet's training has diverged; expected a "
                    f"smaller supernet.training.learning_rate than {self.settings.supernet.training.learning_rate:g}: "
                    "choose another --output with it"
                )
        if self.settings.sampler != "eas":
            return rankings
        others = {name: one for name, one in metrics.items() if name not in ("random", *rankings)}
        return {**rankings, **{name: one for name, one in others.items() if all(map(math.isfinite, one))}}

    def run(self, deadline: float | None = None) -> int:
        """Trials until the budget, the end of the space, or `deadline` (time.monotonic()); returns how many there are.

        Raises:
            TooManyFailures: three trials in a row failed.
        """
        settings, space = self.settings, self.bench.space
        with undisturbed():
            known = self._queue_prefixes()
        sampler = make_sampler(settings.sampler, space, self.rankings(), settings.seed, known, settings.supernet.bandit)
        self.study.sampler = sampler
        loop = TrialLoop(self.study, space, sampler, settings, self._news, deadline)
        for trial in loop.completed():
            self.tally.add(TrialResult(**trial.user_attrs["result"]))
        if self.tally.done < self.tally.goal:
            self.display.stage(f"Trials: {self.tally.done} of {self.tally.goal} done")
            rival = self._rivals(loop)
            if settings.jobs == 1:
                here = run_here(lambda c: evaluate(self.bench, self.supernet, self.redundancy, c, rival(c)))
                loop.run(here, 1)
            else:
                assert self.pool is not None
                evaluate_there = self.pool.evaluate
                loop.run(lambda config: evaluate_there(config, rival(config)), settings.jobs)
            with undisturbed():  # of the last run that added trials: a later one has nothing to say about them
                self.study.set_user_attr("caches", self.bench.caches.report())
        return self.tally.done

    def _rivals(self, loop: TrialLoop) -> Callable[[SkipConfig], Rival | None]:
        """Whom a configuration has to beat, by what is known when it is asked for."""
        if not self.settings.rungs or not FORETOLD.issuperset(self.settings.objectives):
            return lambda config: None
        cost = foretold_cost(self.bench)
        return lambda config: strongest_rival(loop.known.items(), config, cost)

    def _queue_prefixes(self) -> int:
        """Queue the rankings' prefixes that are not in the study yet; returns how many trials it had.

        A kill may have come between two of them. Their number follows from the study's first budget, not a later one.
        """
        trials = self.study.get_trials(deepcopy=False)
        queued = [trial.system_attrs.get("fixed_params") for trial in trials]
        first_budget = self.study.user_attrs["settings"]["budget"]
        for config in ranking_prefixes(self.bench.space, self.rankings(), max(1, first_budget // 3)):
            params = self.bench.space.to_params(config)
            if params not in queued:
                self.study.enqueue_trial(params, user_attrs={"origin": "ranking prefix"})
        return len(trials)

    def _news(self, number: int, config: SkipConfig, result: TrialResult) -> None:
        self.tally.add(result)
        self.display.trial(self.tally.news(number, config, result))
