"""A complete search on a tiny model: its files, running it again, running it anew, running it in several processes."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import psutil
import pytest
import torch

import eas_search
from eas_search.exceptions import ConfigError, StorageError, VerificationError
from eas_search.finalists import Finalist, finalist_name, prepare_finalist
from eas_search.kept_adapters import KeptAdapters
from eas_search.pia import Pia, PiaShape
from eas_search.pooling import PoolSession
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.study import finals
from eas_search.study.frames import mark_chosen
from eas_search.study.outputs import read_json
from eas_search.study.progress import TrialNews
from eas_search.study.trials import Trials
from eas_search.warm_start import SiteMoments, write_closed_form

BUDGET = 5  # of the finished search
COUNTED = ["accuracy", "parameters"]  # objectives that do not depend on timings


def trials_by_config(study: optuna.Study) -> dict[str, tuple[float, int, int]]:
    done = [trial.user_attrs for trial in study.trials if trial.state.name == "COMPLETE"]
    return {
        json.dumps(attrs["config"]): tuple(attrs["result"][name] for name in ("accuracy", "kv_bytes", "parameters"))
        for attrs in done
    }


def test_every_file_is_there_and_nothing_half_written(finished: SimpleNamespace) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    expected = {"study.db", "trials.csv", "pareto.json", "pareto.html", "best.json", "export", "summary.json"}
    assert expected <= names
    assert not [path for path in finished.folder.rglob("*") if path.suffix in (".tmp", ".pkl", ".pt", ".bin")]


def test_the_figures_are_there_when_the_export_fails(
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    finished_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise VerificationError("the export's answers differ")

    monkeypatch.setattr("eas_search.study.outputs.write_export", fail)
    for name in ("summary.json", "pareto.html"):
        (finished_copy / name).unlink()
    with pytest.raises(VerificationError):
        search(make_settings(), finished_copy)
    assert read_json(finished_copy / "summary.json")["completed"] == BUDGET
    assert (finished_copy / "pareto.html").is_file()


def test_the_trial_table_has_one_row_per_trial_with_its_figures(finished: SimpleNamespace) -> None:
    with (finished.folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == BUDGET == len(finished.study.trials)
    for row, trial in zip(rows, finished.study.trials, strict=True):
        config = SkipConfig(**json.loads(row["config"]))
        assert (int(row["number"]), row["state"]) == (trial.number, "COMPLETE")
        assert [float(row["accuracy"]), float(row["latency"])] == pytest.approx(trial.values)
        assert float(row["latency_low"]) <= float(row["latency"]) <= float(row["latency_high"])
        assert tuple(map(int, row["skip"].split())) == config.skip
        assert all(name.endswith("self_attn") for name in row["skip_names"].split())
        assert row["placement"] == config.placement
        assert int(float(row["kv_bytes"])) == 2 * 4 * 32 * (4 - len(config.skip))  # keys and values, 4 bytes, width 32
        assert float(row["seconds"]) > 0
        assert row["origin"]


def test_the_front_has_both_objectives_with_intervals_around_them(finished: SimpleNamespace) -> None:
    front = read_json(finished.folder / "pareto.json")
    for row in front:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        for name in ("latency", "decode_latency"):
            assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert SkipConfig(**row["config"]).skip == tuple(row["skip"])
    assert [row["latency"] for row in front] == sorted(row["latency"] for row in front)
    for row in front:
        dominating = [o for o in front if o["accuracy"] >= row["accuracy"] and o["latency"] < row["latency"]]
        assert row["on_front"] == (not dominating)


def test_the_chosen_point_is_exported_and_chosen_without_a_look_at_held_out_data(finished: SimpleNamespace) -> None:
    front, best = read_json(finished.folder / "pareto.json"), read_json(finished.folder / "best.json")
    assert [row for row in front if row["chosen"]] == [best]
    other = mark_chosen(pd.DataFrame(front).assign(accuracy=0.0, on_front=False), "knee", (1.0, 1.0))
    knee = mark_chosen(pd.DataFrame(front), "knee", (1.0, 1.0))
    assert other["chosen"].tolist() == knee["chosen"].tolist()
    faster = [row["selection_accuracy"] for row in front if row["latency"] < best["latency"]]
    assert max(faster, default=0) <= best["selection_accuracy"]
    facts = read_json(finished.folder / "export" / "eas_config.json")
    assert facts["merged"]
    assert facts["skip_config"]["skip"] == best["skip_names"]
    assert facts["about"]["claims"]["accuracy"] == best["accuracy"]
    assert facts["about"]["trial"] == best["number"]


def test_every_finalist_is_compared_with_the_baseline_and_with_the_front(finished: SimpleNamespace) -> None:
    front, summary = read_json(finished.folder / "pareto.json"), read_json(finished.folder / "summary.json")
    for row in front:
        assert row["accuracy_change"] == pytest.approx(row["accuracy"] - summary["baseline"]["accuracy"], abs=1e-9)
        assert row["accuracy_change_low"] < row["accuracy_change_high"]
        assert (row["front"] == "front") == row["on_front"]
        assert row["front"] in ("front", "undecided", "dominated")
    assert summary["undecided"] == [row["number"] for row in front if row["front"] == "undecided"]
    assert summary["hypervolume_low"] <= summary["hypervolume_high"]  # equal where nothing is faster than the baseline


def test_a_race_before_the_finals_is_held_once(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    settings = make_settings(candidates=4, finalists=1, rungs=[])
    first = search(settings, tmp_path / "run")
    race = first.result.summary["race"]
    assert 1 <= race["left"] <= race["candidates"] <= 4
    assert race["samples_scored"] <= 32 * race["candidates"]
    assert len(first.result.front) == 1
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "stages").glob("race-*")}
    again = search(settings, tmp_path / "run")
    assert again.result.summary["race"] == race
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "stages").glob("race-*")} == kept


def test_a_race_goes_on_with_what_trials_have_trained(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    """Bit for bit what training again gives; 0 bytes keep nothing, and what does not fit is trained again."""

    def run(name: str, room: int) -> tuple[dict[str, int], list[int], list[int]]:
        folder = tmp_path / name
        settings = make_settings(candidates=4, finalists=1, rungs=[], caches={"adapters": room}, objectives=COUNTED)
        result = search(settings, folder).result
        sizes = [file.stat().st_size for file in (folder / "stages/trials").glob("*.safetensors")]
        rows = [
            json.loads(file.read_text(encoding="utf-8"))["rows"] for file in (folder / "stages").glob("race-*.json")
        ]
        return result.summary["race"], sizes, [*rows[0], *result.front["number"]]

    all_race, all_sizes, chosen = run("all", 2**31)
    some_race, some_sizes, some_chosen = run("some", min(all_sizes))
    no_race, no_sizes, no_chosen = run("none", 0)
    assert (len(all_sizes), len(some_sizes), len(no_sizes)) == (5, 1, 0)
    assert (all_race["trained"], no_race["trained"]) == (0, no_race["candidates"])
    assert no_race["candidates"] - 1 <= some_race["trained"] <= no_race["candidates"]
    assert chosen == some_chosen == no_chosen
    assert all_race["samples_scored"] == some_race["samples_scored"] == no_race["samples_scored"]


def test_finalists_are_trained_several_times_where_wanted(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    """The first training is the one that a search without further ones has."""
    training = {"steps": 12, "batch_size": 8, "learning_rate": 0.1}
    wishes: dict[str, Any] = {"objectives": COUNTED, "finalists": 2, "final": training}
    once = search(make_settings(**wishes), tmp_path / "once").result.front.set_index("number")
    thrice = search(make_settings(final_seeds=3, **wishes), tmp_path / "thrice").result.front.set_index("number")
    assert sorted(once.index) == sorted(thrice.index)
    assert once["accuracy_seeds"].tolist() == [[accuracy] for accuracy in once["accuracy"]]
    for number, row in thrice.iterrows():
        assert len(row["accuracy_seeds"]) == 3
        assert row["accuracy_seeds"][0] == row["accuracy"] == once["accuracy"][number]
    assert any(len(set(values)) > 1 for values in thrice["accuracy_seeds"])
    page = (tmp_path / "thrice/pareto.html").read_text(encoding="utf-8")
    assert "3 trainings: " in page
    assert "trainings: " not in (tmp_path / "once/pareto.html").read_text(encoding="utf-8")


def test_a_damaged_file_of_a_trial_is_named(tmp_path: Path) -> None:
    kept, config = KeptAdapters(tmp_path, 2**20), SkipConfig(skip=(1,), pia_dim=2)
    model = torch.nn.Linear(3, 2)
    assert kept.read(config) is None
    assert kept.keep(config, model)
    assert kept.read(config)["weight"].equal(model.weight)
    (tmp_path / f"{config.digest}.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match=config.digest):
        kept.read(config)
    assert not KeptAdapters(None, 2**20).keep(config, model)


def test_the_summary_says_with_what_and_where_it_was_measured(finished: SimpleNamespace) -> None:
    summary, front = read_json(finished.folder / "summary.json"), read_json(finished.folder / "pareto.json")
    assert summary["completed"] == summary["budget"] == BUDGET
    assert summary["front"] == [row["number"] for row in front if row["on_front"]]
    assert summary["seed"] == 0
    assert {"eas_search", "torch", "transformers", "optuna"} <= set(summary["versions"])
    assert "unknown" not in summary["versions"].values()
    assert summary["hardware"]["device"] == "cpu"
    assert {"load", "baseline", "supernet", "trials", "finalists", "export"} <= set(summary["wall_clock"])
    assert 0 <= summary["hypervolume"] <= 1
    assert math.isfinite(summary["baseline"]["prefill_ms"])
    assert SearchSettings(**summary["settings"]) == finished.settings


def test_the_page_needs_nothing_but_itself(finished: SimpleNamespace) -> None:
    page = (finished.folder / "pareto.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not any(mark in page for mark in ("<script src", '<link rel="stylesheet', '<img src="http'))


def test_the_python_interface_gives_the_same_as_the_files(finished: SimpleNamespace) -> None:
    front = eas_search.pareto_front(finished.study)
    assert isinstance(front, pd.DataFrame)
    assert set(front["number"]) <= {trial.number for trial in finished.study.trials}
    assert len(eas_search.trials_frame(finished.study)) == BUDGET
    assert finished.result.reached
    assert finished.result.completed == BUDGET
    assert finished.result.front["number"].tolist() == [r["number"] for r in read_json(finished.folder / "pareto.json")]


def test_running_again_adds_nothing_and_keeps_every_result(
    search: Callable[..., SimpleNamespace], finished: SimpleNamespace, finished_copy: Path
) -> None:
    before = {name: (finished_copy / name).read_bytes() for name in ("trials.csv", "pareto.json", "best.json")}
    weights = (finished_copy / "export" / "student.safetensors").read_bytes()
    again = search(finished.settings, finished_copy)
    assert len(again.study.trials) == BUDGET
    assert {name: (finished_copy / name).read_bytes() for name in before} == before
    assert (finished_copy / "export" / "student.safetensors").read_bytes() == weights
    old, new = (read_json(folder / "summary.json") for folder in (finished.folder, finished_copy))
    assert all(new["wall_clock"][stage] >= seconds for stage, seconds in old["wall_clock"].items())
    assert {**old, "wall_clock": 0} == {**new, "wall_clock": 0}


def test_same_seed_same_proposals_and_accuracies(
    search: Callable[..., SimpleNamespace],
    finished: SimpleNamespace,
    make_settings: Callable[..., SearchSettings],
    tmp_path: Path,
) -> None:
    anew = search(make_settings(budget=4), tmp_path)  # another budget: more or fewer ranking prefixes may come first
    assert trials_by_config(anew.study).items() <= trials_by_config(finished.study).items()
    assert [t.params for t in anew.study.trials] == [t.params for t in finished.study.trials][:4]
    more = search(make_settings(), tmp_path)
    assert [t.params for t in more.study.trials] == [t.params for t in finished.study.trials]
    assert trials_by_config(more.study) == trials_by_config(finished.study)


@dataclass
class Saboteur:
    """A display that kills a worker process after a trial, from the second on, until that has cost one under way."""

    study: optuna.Study
    killed: list[int] = field(default_factory=list)

    def trial(self, news: TrialNews) -> None:
        if news.done < 2 or any(trial.state.name == "FAIL" for trial in self.study.trials):
            return
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # one killed before may be a zombie by now
                if child.pid not in self.killed and "popen_loky" in " ".join(child.cmdline()):
                    child.kill()
                    self.killed.append(child.pid)
                    return

    def stage(self, *_: Any) -> None: ...

    step = note = close = stage


@pytest.fixture(scope="module")
def parallel(make_settings: Callable[..., SearchSettings], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A search with two workers, one of which is killed on the way."""
    folder, settings = tmp_path_factory.mktemp("parallel"), make_settings(jobs=2, budget=7)
    study, kept = eas_search.create_study(settings, folder, "parallel"), list[bool]()
    display = Saboteur(study)

    def spied(bench: Any, supernet: Any, stages: StageFolder, number: int, config: SkipConfig) -> Finalist:
        kept.append(stages.read(finalist_name(config)) is not None)
        return prepare_finalist(bench, supernet, stages, number, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finals, "prepare_finalist", spied)
        result = eas_search.run_study(study, settings, folder, display)
    return SimpleNamespace(study=study, result=result, killed=display.killed, folder=folder, kept=kept)


def test_a_killed_worker_costs_no_trial_of_the_budget(parallel: SimpleNamespace) -> None:
    assert parallel.killed
    states = [trial.state.name for trial in parallel.study.trials]
    assert states.count("COMPLETE") == 7
    assert states.count("RUNNING") == states.count("WAITING") == 0
    assert 1 <= states.count("FAIL") <= 3  # what both were at, and what one was given before the kill was noticed
    params = [trial.params for trial in parallel.study.trials if trial.state.name == "COMPLETE"]
    assert all(trial.params in params for trial in parallel.study.trials)


def test_workers_get_the_same_accuracies_as_one_process(
    parallel: SimpleNamespace,
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    finished_copy: Path,
) -> None:
    ours = search(make_settings(budget=7), finished_copy)
    alone, together = trials_by_config(ours.study), trials_by_config(parallel.study)
    shared = set(alone) & set(together)
    assert shared
    assert {key: alone[key] for key in shared} == {key: together[key] for key in shared}


def test_workers_prepare_the_finalists(
    parallel: SimpleNamespace,
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    tmp_path: Path,
) -> None:
    """One process that goes on behind the same trials comes to the same."""
    assert parallel.kept
    assert all(parallel.kept)  # the coordinator trained none
    folder = shutil.copytree(parallel.folder, tmp_path / "alone")
    kept = {file.name: read_json(file) for file in (folder / "stages").glob("finalist-*.json")}
    for file in (folder / "stages").glob("finalist-*"):
        file.unlink()
    search(make_settings(budget=7), folder, "parallel")
    assert {file.name: read_json(file) for file in (folder / "stages").glob("finalist-*.json")} == kept


def test_one_sample_of_each_kind_is_enough(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    """All tokens that count may be one: there is nothing to regress on."""
    one = dict.fromkeys(("train", "validation", "selection", "test", "calibration"), 1)
    done = search(make_settings(samples=one, budget=1), tmp_path)
    assert done.result.reached
    explained = read_json(tmp_path / "stages" / "supernet.json")["explained"]
    assert all(map(math.isfinite, explained.values()))


def test_without_variety_a_pia_writes_the_mean() -> None:
    pia = Pia(PiaShape(width=8, rank=4))
    moments = SiteMoments()
    moments.add(torch.arange(16.0).expand(5, -1), {"stream": torch.full((5, 8), 2.0)})
    assert write_closed_form(pia, moments, "stream") == 0.0
    torch.testing.assert_close(pia(torch.randn(2, 3, 8), PoolSession("all"), "x"), torch.full((2, 3, 8), 2.0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"baseline": {"steps": 3, "learning_rate": 1e30}}, "expected those of a working model: lower baseline"),
        ({"supernet": {"training": {"steps": 3, "learning_rate": 1e30}}}, "smaller supernet.training.learning_rate"),
    ],
    ids=["baseline", "supernet"],
)
def test_training_that_diverges_is_one_line(
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    tmp_path: Path,
    change: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        search(make_settings(**change), tmp_path)
    assert "\n" not in str(error.value)


def test_a_metric_that_is_not_finite_is_left_out(finished: SimpleNamespace, finished_copy: Path) -> None:
    record = read_json(finished_copy / "stages" / "supernet.json")
    record["metrics"]["taylor"][0] = math.nan
    (finished_copy / "stages" / "supernet.json").write_text(json.dumps(record), encoding="utf-8")
    bench: Any = SimpleNamespace(
        settings=finished.settings,
        space=SimpleNamespace(size=1),
        sites=(),
        splits={"test": SimpleNamespace(scoring=SimpleNamespace(metric="accuracy"))},
    )
    trials: Any = Trials(finished.study, bench, None, record["redundancy"], finished_copy, None)  # type: ignore[arg-type]
    assert set(trials.rankings()) == set(record["metrics"]) - {"random", "taylor"}
    trials.redundancy = [math.nan]
    with pytest.raises(ConfigError, match="'bandit' is not finite"):
        trials.rankings()


def test_finalists_may_learn_from_the_intact_model(
    tmp_path: Path, search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings]
) -> None:
    """The baseline, which is trained for as many steps, has nobody to learn from."""
    settings = make_settings(budget=1)
    distilled = settings.model_copy(update={"final": settings.final.model_copy(update={"distill": 0.5})})
    assert search(distilled, tmp_path / "run").result.completed == 1
