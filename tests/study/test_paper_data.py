"""Whole searches on the data sets of the paper, in their original layouts, on a tiny METER and a tiny LLaVA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paper_tiny import BUILDERS

import eas_search
from eas_search.settings import SearchSettings
from eas_search.study.outputs import read_json

STUDIES = Path(__file__).parents[2] / "studies"
BRIEF = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}
QUICK = {"rounds": 3, "blocks": 1, "warmup": 0, "decode_tokens": 0, "min_sample_s": 0.0005}
SMALL = {
    "space": {"pia_dims": [2]},
    "samples": {"train": 32, "validation": 16, "test": 16, "calibration": 8},
    "student": {"adapter_dim": 2},
    "baseline": BRIEF,
    "supernet": {"training": BRIEF, "bandit_updates": 1, "bandit_batch": 8},
    "trial": BRIEF,
    "final": BRIEF,
    "finalists": 2,
    "latency_batch": 2,
    "trial_latency": QUICK,
    "final_latency": QUICK,
    "budget": 2,
}
TASKS = {
    "vqav2": ("meter", "VQA accuracy"),
    "nlvr2": ("meter_nlvr2", "accuracy"),
    "flickr30k": ("meter", "pool R@1"),
    "slake": ("llava", "recall/accuracy"),
    "aid": ("llava", "accuracy"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_search_ends_with_a_front_and_a_verified_export(
    search: Callable[..., SimpleNamespace], task: str, tmp_path: Path
) -> None:
    model, metric = TASKS[task]
    BUILDERS[task](tmp_path / "data")
    BUILDERS[model](tmp_path / "model")
    options = {"pool": 4} if task == "flickr30k" else {}
    settings = SearchSettings(
        model=str(tmp_path / "model"), task=task, data=tmp_path / "data", task_options=options, device="cpu", **SMALL
    )
    done = search(settings, tmp_path / "run")
    summary, best = (read_json(tmp_path / "run" / name) for name in ("summary.json", "best.json"))
    assert done.result.reached
    assert (summary["completed"], summary["metric"]) == (2, metric)
    assert len(read_json(tmp_path / "run" / "pareto.json")) >= 1
    assert 0 <= best["accuracy_low"] <= best["accuracy"] <= best["accuracy_high"] <= 1
    eas_search.verify(tmp_path / "run" / "export")
    if model != "llava":
        assert all("cross_modal" in name for name in best["skip_names"])
        assert (best["placement"], best["config"]["pooling"]) == ("residual", "all")
    if task == "flickr30k":
        found = recall().measure(tmp_path / "run" / "export", tmp_path / "data", 5)
        assert (found["images"], found["captions"]) == (5, 10)
        assert 0 <= found["image R@1"] <= found["image R@5"] == 1.0


def recall() -> Any:
    """studies/flickr30k_meter/recall.py, which is a script."""
    spec = importlib.util.spec_from_file_location("recall", STUDIES / "flickr30k_meter" / "recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["vqav2_meter", "nlvr2_meter", "flickr30k_meter", "slake_llava", "aid_llava"])
@pytest.mark.parametrize("file", ["config.yaml", "tiny.yaml"])
def test_the_study_files_are_valid_and_carry_the_published_rules(study: str, file: str) -> None:
    settings = SearchSettings.from_file(STUDIES / study / file, {})
    assert study.startswith(settings.task)
    bandit = settings.supernet.bandit
    assert (bandit.policy, bandit.learning_rate) == ("sigmoid", 1.0)
    if file == "config.yaml":
        assert (bandit.candidates, bandit.every) == ((3, 10) if "meter" in study else (5, 3))
        assert settings.fixed_k == (10 if "meter" in study else 12)
