"""What a person sees while a search runs: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import le
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eas_search.names import Objective
from eas_search.objective import TrialResult
from eas_search.skip_config import SkipConfig


@dataclass
class TrialNews:
    """What is said about a finished trial."""

    done: int
    budget: int
    number: int
    skipped: int
    sites: int
    accuracy: float
    latency: float
    front: int
    best: str
    metric: str = "accuracy"
    stopped_at: int | None = None


@dataclass
class Tally:
    """What is told so far, kept so that a further trial costs nothing: how many, the front, the most accurate.

    Trials that were stopped count, but their accuracy is an estimate: they take no part in the rest.

    Attributes:
        goal: trials at which the search ends.
        sites: number of searchable sites.
        metric: name of the score.
        objectives: accuracy, then costs.
        done: trials told.
        front: of the non-dominated trials, minus accuracy and the costs; of equal ones the first.
        best: the most accurate trial, of equal ones the fastest.
    """

    goal: int
    sites: int
    metric: str = "accuracy"
    objectives: Sequence[Objective] = ("accuracy", "latency")
    done: int = 0
    front: list[tuple[float, ...]] = field(default_factory=list)
    best: TrialResult | None = None

    def add(self, result: TrialResult) -> None:
        """Count a trial."""
        self.done += 1
        if result.stopped_at is not None:
            return
        accuracy, *costs = result.values(self.objectives)
        point = (-accuracy, *costs)
        if not any(all(map(le, other, point)) for other in self.front):
            self.front = [other for other in self.front if not all(map(le, point, other))] + [point]
        if self.best is None or (result.accuracy, -result.latency) > (self.best.accuracy, -self.best.latency):
            self.best = result

    def news(self, number: int, config: SkipConfig, result: TrialResult) -> TrialNews:
        """What to say about the trial that was added last."""
        assert self.best is not None, "the first trial is never stopped: it has no rival"
        return TrialNews(
            done=self.done,
            budget=self.goal,
            number=number,
            skipped=len(config.skip),
            sites=self.sites,
            accuracy=result.accuracy,
            latency=result.latency,
            front=len(self.front),
            best=f"{self.best.accuracy:.3f} at {1 / self.best.latency:.2f}×",
            metric=self.metric,
            stopped_at=result.stopped_at,
        )


class Display(Protocol):
    """Receives news of a search."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def step(self, stage: str, done: int, total: int) -> None:
        """A stage has advanced."""

    def trial(self, news: TrialNews) -> None:
        """A trial has finished."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The search is over."""


@dataclass
class PlainDisplay:
    """One line per event, at most one per second for steps; for logs and pipes."""

    console: Console
    started: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    _first_trial: tuple[float, int] | None = None

    def _say(self, text: str) -> None:
        self.console.print(
            f"[{time.monotonic() - self.started:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True
        )

    def stage(self, text: str) -> None:
        """See `Display`."""
        self._say(text)

    def step(self, stage: str, done: int, total: int) -> None:
        """See `Display`."""
        now = time.monotonic()
        if done == total or now - self._last > 5.0:
            self._last = now
            self._say(f"{stage}: step {done} of {total}")

    def trial(self, news: TrialNews) -> None:
        """See `Display`."""
        now = time.monotonic()
        begin, before = self._first_trial = self._first_trial or (now, news.done)
        left = ""
        if news.done > before:
            left = f" | {(now - begin) / (news.done - before) * (news.budget - news.done):.0f} s left"
        stopped = "" if news.stopped_at is None else f" (stopped after {news.stopped_at} samples)"
        self._say(
            f"trial {news.done}/{news.budget}: {news.skipped} of {news.sites} skipped, {news.metric} "
            f"{news.accuracy:.3f}, {1 / news.latency:.2f}×{stopped} | front {news.front} | best {news.best}{left}"
        )

    def note(self, text: str) -> None:
        """See `Display`."""
        self._say(text)

    def close(self) -> None:
        """See `Display`."""


class LiveDisplay:
    """Progress bars of rich, with the front and the best point beside them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description:<11}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
        )
        self.tasks: dict[str, int] = {}
        self.progress.start()

    def _task(self, name: str, total: int) -> int:
        if name not in self.tasks:
            self.tasks[name] = int(self.progress.add_task(name, total=total, news=""))
        return self.tasks[name]

    def stage(self, text: str) -> None:
        """See `Display`."""
        self.progress.console.print(text, markup=False, highlight=False)

    def step(self, stage: str, done: int, total: int) -> None:
        """See `Display`."""
        self.progress.update(self._task(stage, total), completed=done, total=total)  # type: ignore[arg-type]

    def trial(self, news: TrialNews) -> None:
        """See `Display`."""
        line = f"front {news.front} · best {news.best}"
        self.progress.update(self._task("trials", news.budget), completed=news.done, total=news.budget, news=line)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """See `Display`."""
        self.stage(text)

    def close(self) -> None:
        """See `Display`."""
        self.progress.stop()


def make_display(console: Console) -> Display:
    """A live display for terminals, plain lines for everything else."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
