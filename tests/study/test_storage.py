"""The storage of a study: who may write to it, what is refused, and what a dead run leaves behind."""

from __future__ import annotations

import errno
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from safetensors import SafetensorError

from eas_search import settings as settings_module
from eas_search.exceptions import ConfigError, EasSearchError, StorageError
from eas_search.export.files import writing
from eas_search.objective import TrialResult
from eas_search.samplers import FrontSampler
from eas_search.search_space import SearchSpace
from eas_search.settings import SearchSettings
from eas_search.study import create_study
from eas_search.study.endings import undisturbed
from eas_search.study.loop import TrialLoop, run_here
from eas_search.study.storage import load_or_create, only_writer, owner, prepare_output, reap


def make_loop(study: optuna.Study, space: SearchSpace, budget: int) -> TrialLoop:
    sampler = FrontSampler(space, range(len(space.sites)), seed=0)
    study.sampler = sampler
    return TrialLoop(study, space, sampler, SearchSettings(budget=budget), lambda *_: None)


@pytest.fixture
def interrupted(small_space: SearchSpace, fake_result: Callable[..., TrialResult]) -> optuna.Study:
    """A study with three completed trials and a fourth that is RUNNING."""
    study = load_or_create(InMemoryStorage(), "s", SearchSettings())
    make_loop(study, small_space, 3).run(run_here(fake_result), 1)
    make_loop(study, small_space, 4)._ask()
    return study


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """Another process that is alive."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_a_new_study_knows_its_objectives_and_settings(tmp_path: Path) -> None:
    settings = SearchSettings(budget=7)
    study = create_study(settings, tmp_path / "new" / "folder", "s")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "latency"]
    assert SearchSettings(**study.user_attrs["settings"]) == settings
    assert (tmp_path / "new" / "folder" / "study.db").is_file()


@pytest.mark.parametrize("change", [{"budget": 9}, {"jobs": 2}, {"time_limit": 5.0}, {"prefer": "accuracy=0.9"}, {}])
def test_budget_jobs_time_limit_and_preference_may_change(tmp_path: Path, change: dict[str, Any]) -> None:
    create_study(SearchSettings(), tmp_path, "s")
    create_study(SearchSettings(**change), tmp_path, "s")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed: 0 then, 5 now"),
        ({"dtype": "bfloat16"}, "dtype: float32 then, bfloat16 now"),
        ({"sampler": "tpe", "budget": 3}, "sampler: eas then, tpe now"),
        ({"space": {"towers": ["vision"]}}, "space"),
    ],
)
def test_other_settings_are_refused_and_the_first_difference_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    create_study(SearchSettings(), tmp_path, "s")
    with pytest.raises(StorageError, match=named) as error:
        create_study(SearchSettings(**change), tmp_path, "s")
    assert "\n" not in str(error.value)


def test_trials_of_another_protocol_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study(SearchSettings(), tmp_path, "s")
    monkeypatch.setattr(settings_module, "PROTOCOL", settings_module.PROTOCOL + 1)
    with pytest.raises(StorageError, match=r"another version of eas_search.*choose another --output"):
        create_study(SearchSettings(), tmp_path, "s")


def test_a_study_with_other_objectives_is_refused(tmp_path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="s", direction="minimize")
    with pytest.raises((StorageError, ValueError), match="directions") as error:
        create_study(SearchSettings(), tmp_path, "s")
    assert isinstance(error.value, StorageError)


def _damage(content: bytes, how: str) -> bytes:
    if how == "text":
        return b"this is not a database\n" * 50
    if how == "cut":
        return content[: len(content) // 2]
    if how == "header":
        return b"\0" * 100 + content[100:]
    return content[:4096] + b"\xa5" * 8192 + content[4096 + 8192 :]  # whole pages


@pytest.mark.parametrize("how", ["text", "cut", "header", "pages"])
def test_a_damaged_storage_is_refused_in_one_line_and_left_as_it_is(tmp_path: Path, how: str) -> None:
    path = tmp_path / "study.db"
    with only_writer(tmp_path):
        create_study(SearchSettings(), tmp_path, "s")._storage.remove_session()
    damaged = _damage(path.read_bytes(), how)
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"study\.db.* is damaged") as error:
        create_study(SearchSettings(), tmp_path, "s")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged


def test_a_commit_does_not_wait_for_the_disk_and_the_file_is_whole_after_a_run(tmp_path: Path) -> None:
    """The database file alone, as somebody may copy it, holds what was told while the writer's connection is open."""
    with only_writer(tmp_path):
        study = create_study(SearchSettings(), tmp_path, "s")
        backend: Any = study._storage
        with backend._backend.engine.connect() as connection:
            modes = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert modes == ["wal", 1]  # 1: NORMAL
        study.set_user_attr("mark", "told")
        assert (tmp_path / "study.db-wal").stat().st_size > 0
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "study.db", tmp_path / "copy")
    assert optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/copy/study.db").user_attrs["mark"] == "told"


@pytest.mark.parametrize("name", ["#2", "what?mode=memory", "A%41", "[lr=1]", "{SCHEMA_VERSION}", "実験 一", "a&b=c"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    for _ in range(2):
        with only_writer(prepared(folder)):
            create_study(SearchSettings(), folder, "s")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "study.db").is_file()


def prepared(folder: Path) -> Path:
    prepare_output(folder)
    return folder


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite says the same of a database that may not grow."""
    study = create_study(SearchSettings(), tmp_path, "s")
    study.set_user_attr("kept", 1)
    backend: Any = study._storage
    with backend._backend.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
    expected = pytest.raises(StorageError, match=r"no space left.*run the same command again: nothing is lost")
    with expected as error, only_writer(tmp_path):
        study.set_user_attr("big", ["x" * 1000] * 1000)
    assert "\n" not in str(error.value)
    backend.remove_session()
    assert create_study(SearchSettings(), tmp_path, "s").user_attrs["kept"] == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_line_whoever_comes_upon_it(tmp_path: Path, error: Exception) -> None:
    message = rf"'{tmp_path}' cannot be written: no space left"
    with pytest.raises(StorageError, match=message), only_writer(tmp_path):
        raise error
    with pytest.raises(StorageError, match=message), only_writer(tmp_path):
        raise EasSearchError("three trials in a row failed") from error
    export = rf"'{tmp_path / 'export'}' cannot be written: no space left"  # which may be on another disk
    with pytest.raises(StorageError, match=export), only_writer(tmp_path), writing(tmp_path / "export"):
        raise error
    with pytest.raises(ValueError, match="something else"), only_writer(tmp_path):
        raise ValueError("something else")


def test_a_study_with_trials_of_another_program_is_refused_before_anything_is_written() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"])
    load_or_create(storage, "s", SearchSettings())  # an empty one is as good as new
    study = optuna.create_study(storage=storage, study_name="t", directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(values=[1.0, 2.0]))
    with pytest.raises(StorageError, match=r"'t' holds trials that are not of eas_search.*another --study-name"):
        load_or_create(storage, "t", SearchSettings())
    assert study.user_attrs == {}


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("create table shopping (item text)")
    connection.close()
    before = (tmp_path / "study.db").read_bytes()
    with pytest.raises(StorageError, match=r"study\.db"):
        create_study(SearchSettings(), tmp_path, "s")
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////dev/null/x.db", "nosuchdialect://host/db"])
def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(StorageError) as error:
        create_study(SearchSettings(), tmp_path, "s", url)
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file" / "under", tmp_path / "file"):
        with pytest.raises(StorageError, match="choose another --output"):
            prepare_output(folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


def test_one_run_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(StorageError, match="in use by another run"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"host": "elsewhere"}, {"boot": 0.0}, {"started": 0.0}, None])
def test_trials_of_a_dead_run_fail_and_are_queued_again(
    interrupted: optuna.Study, small_space: SearchSpace, change: dict[str, Any] | None
) -> None:
    lost = interrupted.trials[3]
    who = None if change is None else {**owner(), **change}
    interrupted._storage.set_trial_user_attr(lost._trial_id, "owner", who)
    assert reap(interrupted) == 1
    states = [trial.state for trial in interrupted.trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL, TrialState.WAITING]
    trial, _ = make_loop(interrupted, small_space, 9)._ask()
    assert trial.params == lost.params
    assert trial.user_attrs["origin"] == lost.user_attrs["origin"]
    assert reap(interrupted) == 1  # its own trials are cleaned up too
    assert not interrupted.get_trials(states=(TrialState.RUNNING,))


def test_a_queued_trial_that_died_before_it_had_parameters_is_queued_again(
    interrupted: optuna.Study, small_space: SearchSpace
) -> None:
    reap(interrupted)
    make_loop(interrupted, small_space, 9)._ask()
    queued = small_space.to_params(small_space.config([1, 7], 1, 1))
    interrupted.enqueue_trial(queued, user_attrs={"origin": "ranking prefix"})
    interrupted.ask()  # killed between taking the trial from the queue and setting its parameters
    reap(interrupted)
    asked = [make_loop(interrupted, small_space, 9)._ask()[0] for _ in range(2)]
    assert queued in [trial.params for trial in asked]
    assert "ranking prefix" in [trial.user_attrs["origin"] for trial in asked]


def test_nothing_to_clean_up_changes_nothing(interrupted: optuna.Study) -> None:
    reap(interrupted)
    before = [(trial.number, trial.state) for trial in interrupted.trials]
    assert reap(interrupted) == 0
    assert [(trial.number, trial.state) for trial in interrupted.trials] == before


def test_trials_of_another_run_that_is_alive_are_left_alone(interrupted: optuna.Study, sleeper: psutil.Process) -> None:
    who = {**owner(), "pid": sleeper.pid, "started": sleeper.create_time()}
    interrupted._storage.set_trial_user_attr(interrupted.trials[3]._trial_id, "owner", who)
    with pytest.raises(ConfigError, match=f"process {sleeper.pid}"):
        reap(interrupted)
    assert interrupted.trials[3].state == TrialState.RUNNING


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_until_the_storage_is_done(tmp_path: Path, number: signal.Signals) -> None:
    study, reached = create_study(SearchSettings(), tmp_path, "s"), []

    def ask() -> None:
        with undisturbed():
            signal.raise_signal(number)
            reached.append(study.ask().number)

    # A process that a shell starts in the background inherits an ignored Ctrl-C.
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert reached == [0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert reap(study) == 1
