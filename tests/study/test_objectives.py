"""Searches with other objectives than accuracy and latency, and with predicted or measured latencies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eas_search
from eas_search.exceptions import ConfigError, StorageError
from eas_search.objective import TrialResult
from eas_search.report.axes import Axes
from eas_search.run import _settle
from eas_search.settings import SearchSettings
from eas_search.study.outputs import read_json
from eas_search.study.progress import Tally

OBJECTIVES = ("accuracy", "kv_bytes", "latency", "flops")


@pytest.fixture(scope="module")
def several(
    search: Callable[..., SimpleNamespace],
    make_settings: Callable[..., SearchSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A search that minimises three costs at once; the first of them is the KV cache."""
    settings = make_settings(objectives=OBJECTIVES, sampler="nsga2", budget=6)
    return search(settings, tmp_path_factory.mktemp("several") / "run")


def dominated(row: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """The definition, word by word."""
    costs = OBJECTIVES[1:]
    return any(
        other["accuracy"] >= row["accuracy"]
        and all(other[cost] <= row[cost] for cost in costs)
        and (other["accuracy"] > row["accuracy"] or any(other[cost] < row[cost] for cost in costs))
        for other in others
    )


def test_a_study_is_told_the_values_of_its_objectives(several: SimpleNamespace) -> None:
    study = several.study
    assert [direction.name for direction in study.directions] == ["MAXIMIZE"] + ["MINIMIZE"] * 3
    assert study.metric_names == list(OBJECTIVES)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) == 6
    for trial in done:
        result = trial.user_attrs["result"]
        assert trial.values == [result[name] for name in OBJECTIVES]
    front = eas_search.pareto_front(study)
    rows = eas_search.trials_frame(study).to_dict("records")
    whole = [row for row in rows if row["state"] == "COMPLETE"]
    best = {tuple(row[name] for name in OBJECTIVES) for row in whole if not dominated(row, whole)}
    assert {tuple(row) for row in front[list(OBJECTIVES)].itertuples(index=False)} == best
    assert front["kv_bytes"].is_monotonic_increasing


def test_the_finalists_are_judged_by_all_objectives(several: SimpleNamespace) -> None:
    front = read_json(several.folder / "pareto.json")
    for row in front:
        assert row["flops"] > 0
        assert row["kv_bytes"] == 2 * 4 * 32 * (4 - len(row["skip"]))
        twins = [other for other in front if [other[n] for n in OBJECTIVES] == [row[n] for n in OBJECTIVES]]
        assert row["on_front"] == (not dominated(row, front) and row["number"] == twins[0]["number"])
    assert sum(row["chosen"] for row in front) == 1
    summary = read_json(several.folder / "summary.json")
    assert summary["objectives"] == list(OBJECTIVES)
    assert summary["baseline"]["kv_bytes"] == 2 * 4 * 32 * 4
    assert 0 <= summary["objectives_hypervolume"] <= 1


def test_the_page_shows_accuracy_against_the_first_cost(several: SimpleNamespace) -> None:
    page = (several.folder / "pareto.html").read_text(encoding="utf-8")
    payload = json.loads(page.split('id="page-data">')[1].split("</script>")[0])
    front = {str(row["number"]): row for row in read_json(several.folder / "pareto.json")}
    for number, row in front.items():
        point = payload["points"][number]
        assert point["x"] == pytest.approx(1 - len(row["skip"]) / 4)  # share of the cache that is left
        assert point["y"] == row["accuracy"]
        assert "FLOPs of a prefill" in dict(point["facts"])
    plot = payload["figures"]["trade-off"]["light"]
    assert "KV cache" in plot["layout"]["xaxis"]["title"]["text"]
    assert plot["layout"]["xaxis"]["autorange"] == "reversed"
    texts = [text for trace in plot["data"] for text in trace.get("hovertext", []) if "Trial" in text]
    assert texts
    assert all("FLOPs of a prefill" in text for text in texts)
    assert '<th scope="col" class="number">FLOPs of a prefill</th>' in page


def test_latencies_are_predicted_once_and_compared_with_measured_ones(
    several: SimpleNamespace, search: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    report = read_json(several.folder / "summary.json")["latency"]
    assert report["trials"] == "predicted"
    assert report["standard_error"] > 0
    measured = read_json(several.folder / "stages" / "predictor.json")["measured"]
    assert report["measured_models"] == len(measured) == 10  # the original, too
    assert f"leave-one-out error {100 * report['leave_one_out_error']:.1f} %" in several.said
    assert f"{100 * report['finalists_mape']:.1f} % off on average" in several.said
    rows = {row["number"]: row for row in read_json(several.folder / "pareto.json")}
    trials = {trial.number: trial.user_attrs["result"] for trial in several.study.trials}
    expected = {number: trials[number]["latency"] / row["latency"] - 1 for number, row in rows.items()}
    assert report["finalists_errors"] == {str(n): pytest.approx(error) for n, error in expected.items()}
    assert report["finalists_mape"] == pytest.approx(sum(map(abs, expected.values())) / len(expected))
    # Resuming reads the predictor: one that is changed on disk is the one that predicts.
    folder = Path(shutil.copytree(several.folder, tmp_path / "copy"))
    path = folder / "stages" / "predictor.json"
    content = read_json(path)
    fitted = content["predictor"]
    fitted["coefficients"] = {term: 7.0 * (term == "base") for term in fitted["coefficients"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    more = search(several.settings.model_copy(update={"budget": 7}), folder)
    assert more.study.trials[-1].user_attrs["result"]["latency"] == pytest.approx(7.0)


def test_measured_latencies_need_no_predictor(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    done = search(
        make_settings(latency="measured", objectives=("accuracy", "parameters"), sampler="random", budget=3),
        tmp_path / "run",
    )
    assert read_json(done.folder / "summary.json")["latency"] == {"trials": "measured"}
    assert not (done.folder / "stages" / "predictor.json").exists()
    assert [len(trial.values) for trial in done.study.trials] == [2] * 3
    sizes = {trial.values[1] for trial in done.study.trials}
    assert all(size == int(size) > 1000 for size in sizes)


def test_a_kv_cache_that_nothing_can_shrink_is_refused(
    search: Callable[..., SimpleNamespace], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    settings = make_settings(objectives=("accuracy", "kv_bytes"), space={"towers": ["vision"], "pia_dims": [2]})
    with pytest.raises(ConfigError, match=r"'kv_bytes' is the same for every trial.*search other towers"):
        search(settings, tmp_path / "run")


def test_a_study_keeps_its_objectives(make_settings: Callable[..., SearchSettings], tmp_path: Path) -> None:
    """In a storage that other folders share."""
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    eas_search.create_study(make_settings(), tmp_path / "one", "s", storage)
    costs = make_settings(objectives=("accuracy", "latency", "kv_bytes"))
    with pytest.raises(StorageError, match=r"directions .*expected .*accuracy, latency, kv_bytes"):
        eas_search.create_study(costs, tmp_path / "three", "s", storage)
    with pytest.raises(StorageError, match=r"objectives: .*latency.* then, .*flops.* now"):
        eas_search.create_study(make_settings(objectives=("accuracy", "flops")), tmp_path / "other", "s", storage)


def test_flags_reach_the_settings_and_leave_the_rest_of_a_file(study_file: Path) -> None:
    given = {"objectives": ["accuracy", "flops"], "latency": "measured", "space": {"towers": ["text", "vision"]}}
    settings, _ = _settle(dict(given), study_file, None, None, None)
    assert settings.objectives == ("accuracy", "flops")
    assert settings.latency == "measured"
    assert (settings.space.towers, settings.space.pia_dims) == (("text", "vision"), (2, 4))
    assert SearchSettings(**given).space.towers == ("text", "vision")


def test_the_tally_counts_the_front_of_all_objectives() -> None:
    tally = Tally(9, 12, objectives=("accuracy", "kv_bytes", "flops"))
    common = {"latency_low": 0.5, "latency_high": 1.5, "redundancy": 0.0, "parameters": 1, "seconds": 1.0}
    points = [  # accuracy, KV bytes, FLOPs, latency; how many are on the front then
        (0.8, 64, 100, 0.9, 1),
        (0.8, 64, 100, 0.5, 1),  # a twin, though faster: latency is no objective
        (0.7, 64, 120, 0.4, 1),  # dominated
        (0.7, 32, 120, 0.4, 2),
        (0.7, 64, 80, 0.7, 3),
        (0.9, 32, 80, 0.8, 1),  # dominates all
    ]
    for accuracy, kv_bytes, flops, latency, front in points:
        figures = {"accuracy": accuracy, "kv_bytes": kv_bytes, "flops": flops, "latency": latency, "device": "cpu"}
        tally.add(TrialResult(**common, **figures))
        assert len(tally.front) == front
    assert tally.best is not None
    assert (tally.best.accuracy, tally.best.latency) == (0.9, 0.8)


def test_axes_of_a_summary() -> None:
    assert Axes.of({}) == Axes("accuracy", ("latency",))
    baseline = {"latency": 1.0, "kv_bytes": 512}
    assert Axes.of({"metric": "score"}).place(0.8, baseline) == pytest.approx(1.25)
    assert Axes.of({"objectives": ["accuracy", "kv_bytes"]}).place(128, baseline) == pytest.approx(0.25)
