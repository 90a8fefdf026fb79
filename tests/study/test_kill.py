"""A search that is killed, again and again, or interrupted by hand."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from eas_search.settings import SearchSettings

Start = Callable[..., "subprocess.Popen[str]"]
BUDGET = 6


def command(study_file: Path, output: Path, budget: int = BUDGET) -> list[object]:
    return ["-m", "eas_search.run", "--config", study_file, "--output", output, "--budget", budget]


def resume_hint(study_file: Path, output: Path, flags: str) -> str:
    hint = f"python -m eas_search.run --config {study_file} --output '{output}' {flags}"
    return f"Interrupted; finished trials are kept. Resume with: {hint}"


def stored(output: Path) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{output / 'study.db'}"
    names = [summary.study_name for summary in optuna.get_all_study_summaries(url)] if output.is_dir() else []
    return optuna.load_study(study_name=names[0], storage=url).trials if names else []


def completed(output: Path) -> dict[int, tuple[list[float], dict[str, int]]]:
    return {
        trial.number: (trial.values, trial.params) for trial in stored(output) if trial.state == TrialState.COMPLETE
    }


def accuracies(trials: list[optuna.trial.FrozenTrial]) -> list[tuple[list[tuple[str, int]], float]]:
    """(parameters, accuracy) of the completed trials; one that was interrupted may come later than else."""
    return sorted((sorted(t.params.items()), t.values[0]) for t in trials if t.state == TrialState.COMPLETE)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said: {process.communicate()[1]}")


def test_killing_a_search_three_times_loses_no_trial_and_changes_none(
    start: Start,
    study_file: Path,
    tmp_path: Path,
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
) -> None:
    output, chance = tmp_path / "run", random.Random(0)
    seen: dict[int, tuple[list[float], dict[str, int]]] = {}
    for news in ("Baseline:", f"/{BUDGET}:", f"/{BUDGET}:"):
        process = start(*command(study_file, output))
        wait_for(process, news)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        now = completed(output)
        assert seen.items() <= now.items()
        seen = now
    assert seen
    assert len(seen) < BUDGET
    process = start(*command(study_file, output))
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert "Pareto front" in said
    assert seen.items() <= completed(output).items()
    states = [trial.state for trial in stored(output)]
    assert states.count(TrialState.COMPLETE) == BUDGET
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    straight = search(make_settings(budget=BUDGET), tmp_path / "straight")
    assert accuracies(stored(output)) == accuracies(straight.study.trials)


@pytest.mark.parametrize(("number", "moment"), [("SIGINT", "supernet: "), ("SIGINT", "/60:"), ("SIGTERM", "/60:")])
def test_ctrl_c_ends_within_seconds_says_how_to_resume_and_cleans_up(
    start: Start, study_file: Path, tmp_path: Path, number: str, moment: str
) -> None:
    """So does SIGTERM, which schedulers and containers send.

    The tiny space ends before the budget does: (2⁴ − 1) skip sets, two ranks, two placements.
    """
    output = tmp_path / "a run"
    process = start(*command(study_file, output, budget=500))
    wait_for(process, moment)
    before, used = time.monotonic(), sum(psutil.Process(process.pid).cpu_times()[:2])
    earlier = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process.send_signal(getattr(signal, number))
    _, complaints = process.communicate(timeout=60)
    worked = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - earlier - used
    assert worked < 3  # seconds of its own, so that a busy machine does not matter
    assert time.monotonic() - before < 15
    assert process.returncode == 130
    assert "Traceback" not in complaints
    assert complaints.strip().splitlines() == [resume_hint(study_file, output, "--budget 500")]
    assert TrialState.RUNNING not in [trial.state for trial in stored(output)]
    assert bool(completed(output)) == (moment == "/60:")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_workers_do_not_outlive_their_search(start: Start, study_file: Path, tmp_path: Path, number: str) -> None:
    output = tmp_path / "a run"
    process = start(*command(study_file, output, budget=500), "--jobs", 2)
    wait_for(process, "/60:")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(getattr(signal, number))
    _, complaints = process.communicate(timeout=60)  # returns when the last of them has let go of its output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    if number == "SIGTERM":
        assert process.returncode == 130
        assert complaints.strip().splitlines() == [resume_hint(study_file, output, "--budget 500 --jobs 2")]
        assert TrialState.RUNNING not in [trial.state for trial in stored(output)]
