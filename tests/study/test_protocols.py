"""Two ways to run a search: the paper's protocol with a fixed number of sites, and without any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eas_search.bandit import VARIANTS
from eas_search.export import verify
from eas_search.names import ONE_SHOT
from eas_search.settings import SearchSettings
from eas_search.stage_folder import StageFolder
from eas_search.study.outputs import read_json

Search = Callable[[SearchSettings, Path], SimpleNamespace]


@pytest.fixture
def optimizer_steps() -> Iterator[list[object]]:
    """One entry per step of any optimizer."""
    steps: list[object] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    yield steps
    handle.remove()


def test_a_search_without_training_takes_no_gradient_step_and_verifies(
    search: Search, make_settings: Callable[..., SearchSettings], tmp_path: Path, optimizer_steps: list[object]
) -> None:
    settings = make_settings(budget=3).fine_tuned_for(0)
    done = search(settings, tmp_path / "run")
    assert optimizer_steps == []
    assert done.result.reached
    verify(tmp_path / "run" / "export")
    # Every adapter of the supernet that is not a closed-form start is as it was made: up-projections are zero.
    record = StageFolder(tmp_path / "run" / "stages").read("supernet")
    assert record is not None
    ups = {name: value for name, value in record[1].items() if ".eas_adapter.ups." in name}
    assert ups
    assert not any(value.any() for value in ups.values())
    starts = [value for name, value in record[1].items() if ".pia_stream.ups." in name]
    assert starts
    assert all(value.any() for value in starts)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["conditions"]["trial fine-tune"].startswith("0 steps")
    # The same hook sees the steps of an ordinary fine-tune.
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()
    assert len(optimizer_steps) == 1


def test_a_fixed_number_of_sites_goes_from_the_search_to_the_export(
    search: Search, make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    """METER's rules with an update every 2 steps; the first trial is the bandit's top k, the others its sampler's."""
    brief = {"steps": 8, "batch_size": 8, "learning_rate": 2e-2}
    rules = VARIANTS["meter"].model_copy(update={"every": 2}).model_dump()
    supernet = {"training": brief, "bandit": rules, "bandit_updates": None, "bandit_batch": 8}
    settings = make_settings(budget=3, sampler="bandit", fixed_k=2, supernet=supernet)
    done = search(settings, tmp_path / "run")
    skips = [tuple(trial.user_attrs["config"]["skip"]) for trial in done.study.trials]
    assert [len(skip) for skip in skips] == [2, 2, 2]
    record = StageFolder(tmp_path / "run" / "stages").read("supernet")
    assert record is not None
    scores = record[0]["metrics"]["bandit"]
    assert any(scores)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert skips[0] == tuple(sorted(record[0]["places"][i][0] for i in order[:2]))
    facts = read_json(tmp_path / "run" / "export" / "eas_config.json")
    assert len(facts["skip_config"]["skip"]) == 2
    verify(tmp_path / "run" / "export")


def test_every_metric_is_recorded_with_its_scores(finished: SimpleNamespace) -> None:
    redundancy = read_json(finished.folder / "summary.json")["redundancy"]
    assert list(redundancy["metrics"]) == ["bandit", *ONE_SHOT]
    assert redundancy["ranking"] == "bandit"
    for metric in redundancy["metrics"].values():
        assert len(metric["scores"]) == 4
        assert all(math.isfinite(score) for score in metric["scores"].values())
        assert metric["kendall_tau"] is None or -1 <= metric["kendall_tau"] <= 1
    assert redundancy["metrics"]["last_k"]["scores"] == {
        f"model.language_model.layers.{i}.self_attn": i / 4 for i in range(4)
    }
