"""Worker processes: each loads the model once, evaluates trials and prepares finalists; the coordinator tells."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from eas_search.finalists import prepare_finalist
from eas_search.objective import TrialResult, evaluate, set_threads
from eas_search.plugins import load_plugins
from eas_search.prediction import predictor_stage
from eas_search.rungs import Rival
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.stages import supernet_stage
from eas_search.supernet import Supernet
from eas_search.workbench import Workbench

_opened: dict[str, tuple[Workbench, Supernet, list[float]]] = {}


@dataclass
class Workers:
    """`settings.jobs` processes, started when first needed, that share the output folder of a search."""

    settings: SearchSettings
    folder: Path
    started: bool = False

    def evaluate(self, config: SkipConfig, rival: Rival | None = None) -> Future[TrialResult]:
        """Start a trial."""
        return self._submit(_evaluate, config, rival)

    def prepare_finalists(self, configs: Mapping[int, SkipConfig], done: Callable[[int], None]) -> None:
        """Train and score finalists, and keep them in the stage folder, where `prepare_finalist` looks.

        What a lost or failing process leaves undone, the coordinator finds missing there and does itself.

        Args:
            configs: of the finalists, by trial number.
            done: called with the number of those that are over.
        """
        futures = [self._submit(_prepare, number, config) for number, config in configs.items()]
        for count, future in enumerate(as_completed(futures), start=1):
            if isinstance(future.exception(), BrokenExecutor):
                return
            done(count)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.started = True
        return _executor(self.settings.jobs).submit(function, self.settings, self.folder, *arguments)


@contextmanager
def workers(settings: SearchSettings, folder: Path) -> Iterator[Workers]:
    """The worker processes of a search; they end with the context."""
    pool = Workers(settings, folder)
    try:
        yield pool
    finally:
        if pool.started:
            _executor(settings.jobs).shutdown(wait=False, kill_workers=True)


def _executor(jobs: int) -> Any:
    """The processes; after one of them was killed, new ones: loky's executor is broken then.

    Other arguments than before would replace it, too, after waiting for all that is under way.
    """
    from joblib.externals.loky import get_reusable_executor

    return get_reusable_executor(max_workers=jobs, timeout=600, initializer=end_with, initargs=(os.getpid(),))


def end_with(parent: int, every: float = 1.0) -> None:
    """End this process within `every` seconds of its parent's end, also when that was killed.

    A worker would finish its evaluation, on which nobody waits, and then stay idle for minutes.
    """

    def watch() -> None:
        while psutil.pid_exists(parent) and (os.name != "posix" or os.getppid() == parent):
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _open(settings: SearchSettings, folder: Path) -> tuple[Workbench, Supernet, list[float]]:
    """The workbench and the kept supernet, loaded once per process."""
    key = f"{folder}:{settings.fingerprint()}"
    if key not in _opened:
        set_threads(settings.jobs)
        load_plugins(settings.plugins)
        bench = Workbench.open(settings, folder)
        stages = StageFolder(folder / "stages")
        supernet, redundancy = supernet_stage(bench, stages, None, lambda *_: None)
        if settings.latency == "predicted":
            predictor_stage(bench, stages)
        _opened[key] = (bench, supernet, redundancy)
        gc.freeze()  # see `heap.settled_heap`: the process does nothing else until it ends
    return _opened[key]


def _evaluate(settings: SearchSettings, folder: Path, config: SkipConfig, rival: Rival | None) -> TrialResult:
    return evaluate(*_open(settings, folder), config, rival)


def _prepare(settings: SearchSettings, folder: Path, number: int, config: SkipConfig) -> None:
    bench, supernet, _ = _open(settings, folder)
    prepare_finalist(bench, supernet, StageFolder(folder / "stages"), number, config)
