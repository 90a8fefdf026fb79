"""The trials: one coordinator asks, workers evaluate, the coordinator alone tells."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field

import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from eas_search.exceptions import EasSearchError
from eas_search.objective import TrialResult
from eas_search.search_space import SearchSpace
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.study.endings import undisturbed
from eas_search.study.storage import owner

MAX_FAILURES_IN_A_ROW = 3
MAX_WORKERS_LOST = 2  # by one configuration, before it counts as a failure
Evaluate = Callable[[SkipConfig], TrialResult]


class TooManyFailures(EasSearchError):
    """Trials fail one after the other; going on would not help."""


@dataclass
class TrialLoop:
    """Asks for configurations and tells results until `budget` trials, or the whole space, are complete.

    Attributes:
        study: with its storage; this object is its only writer.
        space: turns parameters into configurations.
        sampler: proposes; its `origins`, if any, are recorded.
        settings: budget, jobs and time limit are used.
        on_result: called after every completed trial with (number, configuration, result).
        deadline: time.monotonic() value after which no trial starts.
        known: what is evaluated so far; kept up to date.
    """

    study: Study
    space: SearchSpace
    sampler: BaseSampler
    settings: SearchSettings
    on_result: Callable[[int, SkipConfig, TrialResult], None]
    deadline: float | None = None
    known: dict[SkipConfig, TrialResult] = field(default_factory=dict)
    failures: int = 0
    lost: Counter[SkipConfig] = field(default_factory=Counter)

    def completed(self) -> list[FrozenTrial]:
        """The completed trials so far."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def run(self, submit: Callable[[SkipConfig], Future[TrialResult]], slots: int) -> None:
        """Keep `slots` evaluations under way. `submit` starts one and returns its future.

        Raises:
            TooManyFailures: three trials in a row failed.
        """
        with undisturbed():
            self.known |= self._known()
            left = min(self.settings.budget, self.space.size) - len(self.completed())
        pending: dict[Future[TrialResult], tuple[Trial, SkipConfig]] = {}
        while left > 0 or pending:
            while left > 0 and len(pending) < slots and not self._late():
                left -= 1
                with undisturbed():
                    trial, config = self._ask()
                    if config in self.known:  # proposed again: the same figures, no second evaluation
                        self._tell(trial, config, self.known[config])
                        continue
                pending[submit(config)] = (trial, config)
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                trial, config = pending.pop(future)
                with undisturbed():
                    finished = self._finish(trial, config, future)
                if finished:
                    self.known[config] = future.result()
                else:
                    left += 1

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _known(self) -> dict[SkipConfig, TrialResult]:
        return {
            self.space.to_config(trial.params): TrialResult(**trial.user_attrs["result"]) for trial in self.completed()
        }

    def _ask(self) -> tuple[Trial, SkipConfig]:
        trial = self.study.ask(fixed_distributions=self.space.distributions())
        config = self.space.to_config(trial.params)
        origins: dict[int, str] = getattr(self.sampler, "origins", {})
        trial.set_user_attr("owner", owner())
        if "origin" not in trial.user_attrs:
            trial.set_user_attr("origin", origins.get(trial.number, type(self.sampler).__name__))
        trial.set_user_attr("config", config.model_dump(mode="json"))
        return trial, config

    def _finish(self, trial: Trial, config: SkipConfig, future: Future[TrialResult]) -> bool:
        """Tell a finished evaluation; False when it failed."""
        try:
            result = future.result()
            if not all(map(math.isfinite, (result.latency, *result.values(self.settings.objectives)))):
                raise ValueError(f"accuracy {result.accuracy}, latency {result.latency}: not finite")
        except Exception as error:  # whatever a model can raise: the trial fails, the search goes on
            if isinstance(error, BrokenExecutor) and self.lost[config] < MAX_WORKERS_LOST:
                # A killed worker takes the evaluations of all others with it; they are not to blame.
                self.lost[config] += 1
                self.study.tell(trial, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs={"origin": trial.user_attrs["origin"]})
                return False
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            trial.set_user_attr("error", cause)
            self.study.tell(trial, state=TrialState.FAIL)
            self.failures += 1
            if self.failures >= MAX_FAILURES_IN_A_ROW:
                raise TooManyFailures(
                    f"{self.failures} trials in a row failed, the last one with {cause}; expected them to finish: run "
                    "again with --debug for the traceback; finished trials are kept"
                ) from error
            return False
        self.failures = 0
        self._tell(trial, config, result)
        return True

    def _tell(self, trial: Trial, config: SkipConfig, result: TrialResult) -> None:
        trial.set_user_attr("result", result.to_dict())
        self.study.tell(trial, result.values(self.settings.objectives))
        self.on_result(trial.number, config, result)


def run_here(evaluate: Evaluate) -> Callable[[SkipConfig], Future[TrialResult]]:
    """Evaluate in this process, at once; Ctrl-C passes through."""

    def submit(config: SkipConfig) -> Future[TrialResult]:
        future: Future[TrialResult] = Future()
        try:
            future.set_result(evaluate(config))
        except Exception as error:
            future.set_exception(error)
        return future

    return submit


optuna.logging.set_verbosity(optuna.logging.WARNING)
