"""The Optuna storage of a study: opening it, owning it, and cleaning up after runs that were killed."""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import filelock
import optuna
import psutil
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import TrialState
from sqlalchemy import URL
from sqlalchemy.event import listen

from eas_search.exceptions import ConfigError, StorageError
from eas_search.full_disk import full_disk_explained
from eas_search.settings import SearchSettings


def prepare_output(folder: Path) -> None:
    """Make the output folder and check that it can be written.

    Raises:
        StorageError: it cannot.
    """
    with full_disk_explained(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"output folder {str(folder)!r} cannot be written ({error.strerror}); expected a folder you may write "
                "to: choose another --output"
            ) from error


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the output folder: one coordinator at a time. The kernel lets go when the process ends, however it ends.

    Raises:
        StorageError: another run holds it, or there is no space left for what is written inside.
    """
    lock = filelock.FileLock(str(folder / "run.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StorageError(
            f"output folder {str(folder)!r} is in use by another run; expected to be its only writer: wait for it, or "
            "choose another --output"
        ) from error
    try:
        with full_disk_explained(folder):
            yield
    finally:
        _settle(folder / "study.db")
        lock.release()


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage at `url`, or `study.db` in the output folder.

    Raises:
        StorageError: the file is damaged or the storage cannot be reached.
    """
    path = folder / "study.db"
    if url is None:
        _check_sqlite(path)
        # In text, a path's "#", "?" or "%" would mean something else.
        url = URL.create("sqlite", database=str(path)).render_as_string()
    try:
        with full_disk_explained(folder):
            storage = RDBStorage(url)
            if storage.engine.dialect.name == "sqlite":
                listen(storage.engine, "connect", _write_ahead)
                storage.engine.dispose()  # the next connection is made with it
            return storage
    except StorageError:
        raise
    except Exception as error:  # SQLAlchemy, drivers and Optuna each raise their own kinds here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise StorageError(f"storage {url!r} cannot be opened: {reason}; expected an Optuna storage URL") from error


def _write_ahead(connection: sqlite3.Connection, _: object) -> None:
    """Set up a connection so that a commit need not wait for the disk: a trial makes about 30 of them.

    A process that is killed loses nothing. After a power failure the database is whole, but may lack the last trials.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _settle(path: Path) -> None:
    """Bring what was written ahead into the database file, so that it is whole by itself, for instance to be copied."""
    if not path.exists():
        return
    # Where that fails now, whoever opens it next does it.
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _check_sqlite(path: Path) -> None:
    """Refuse a damaged database before Optuna touches it."""
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)
        try:
            result = connection.execute("PRAGMA quick_check").fetchone()[0]
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if result == "ok" and tables and "studies" not in tables:
                result = "it holds no studies"
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        result = str(error)
    if result != "ok":
        raise StorageError(
            f"study storage {str(path)!r} is damaged or not Optuna's ({result}); expected a study: "
            "restore a copy, or move it away to start anew. Nothing was changed"
        )


def load_or_create(storage: BaseStorage, name: str, settings: SearchSettings) -> Study:
    """The study called `name`, made on first use.

    Raises:
        StorageError: it exists with other settings or objectives, or is no search of this package.
    """
    costs = len(settings.objectives) - 1
    directions: list[Literal["maximize", "minimize"]] = ["maximize", *["minimize"] * costs]  # type: ignore[list-item]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    if (found := [direction.name.lower() for direction in study.directions]) != directions:
        raise StorageError(
            f"study {name!r} has directions {found}; expected {directions} for the objectives "
            f"{', '.join(settings.objectives)}: choose another --study-name"
        )
    known = study.user_attrs.get("fingerprint")
    if known is None:
        if study.get_trials(deepcopy=False):
            raise StorageError(
                f"study {name!r} holds trials that are not of eas_search; expected a new study or one of its own: "
                "choose another --study-name"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(settings.objectives))
        study.set_user_attr("settings", settings.model_dump(mode="json"))
        study.set_user_attr("fingerprint", settings.fingerprint())
    elif known != settings.fingerprint():
        difference = settings.first_difference(study.user_attrs["settings"])
        raise StorageError(
            f"study {name!r} was made with other settings ({difference}); expected the same ones to resume: repeat "
            "them, or choose another --output, and in a storage of your own another --study-name"
        )
    return study


def owner() -> dict[str, Any]:
    """Who runs a trial: enough to tell later whether this very process is still alive."""
    return {
        "host": os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", ""),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "boot": psutil.boot_time(),
    }


def _alive(who: dict[str, Any] | None) -> bool:
    me = owner()
    if who is None or who["host"] != me["host"]:
        # Another host's process cannot be asked. Only one coordinator writes to a storage, so it is not running.
        return False
    if abs(who["boot"] - me["boot"]) > 5 or not psutil.pid_exists(who["pid"]):
        return False
    try:
        return abs(psutil.Process(who["pid"]).create_time() - who["started"]) < 1
    except psutil.Error:
        return False


def reap(study: Study) -> int:
    """Fail the trials that a dead run left running and queue their configurations again; returns how many.

    Raises:
        ConfigError: a trial belongs to another run that is still alive.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        who = trial.user_attrs.get("owner")
        if who is not None and _alive(who) and who != owner():
            raise ConfigError(
                f"study {study.study_name!r} is being written by process {who['pid']}; expected to be its only writer: "
                "wait for it, or choose another --study-name"
            )
    for trial in running:
        study.tell(trial.number, state=TrialState.FAIL)
        # A queued trial may have died before all its parameters were set.
        params = trial.system_attrs.get("fixed_params") or trial.params
        if params:
            study.enqueue_trial(params, user_attrs={"origin": trial.user_attrs.get("origin", "resumed")})
    return len(running)
