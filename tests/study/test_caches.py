"""A search finds the same with and without caches, says what they did, and may change their size when it resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eas_search.settings import SearchSettings
from eas_search.study.outputs import read_json

OFF = {"features": 0, "prefixes": 0}


def accuracies(run: SimpleNamespace) -> dict[str, float]:
    done = [trial.user_attrs for trial in run.study.trials if trial.state.name == "COMPLETE"]
    return {str(attrs["config"]): attrs["result"]["accuracy"] for attrs in done}


@pytest.mark.parametrize("steps", [0, 2])
def test_a_search_finds_the_same_without_caches(
    search: Callable[..., Any], make_settings: Callable[..., SearchSettings], tmp_path: Path, steps: int
) -> None:
    kept = make_settings(sampler="random", latency="measured", rungs=()).fine_tuned_for(steps)
    plain = make_settings(sampler="random", latency="measured", rungs=(), caches=OFF).fine_tuned_for(steps)
    assert kept.fingerprint() == plain.fingerprint()
    with_caches, without = search(kept, tmp_path / "with"), search(plain, tmp_path / "without")
    assert accuracies(with_caches) == accuracies(without)
    features, prefixes = (with_caches.result.summary["caches"][name] for name in ("image_features", "prefixes"))
    assert features["served"] > features["encoded"] > 0
    assert 0 < features["held"] <= features["limit"]
    assert steps or prefixes["reused"] > 0
    assert "Image features: " in with_caches.said
    assert steps or "Shared prefixes: " in with_caches.said
    off = read_json(tmp_path / "without" / "summary.json")["caches"]
    assert {cache["why_not"] for cache in off.values()} == {"switched off"}
    assert not any(cache["held"] or cache.get("served") or cache.get("reused") for cache in off.values())


def test_a_search_resumes_with_other_caches(
    search: Callable[..., Any], make_settings: Callable[..., SearchSettings], tmp_path: Path
) -> None:
    whole = search(make_settings(budget=5).fine_tuned_for(0), tmp_path / "whole")
    search(make_settings(budget=2, caches=OFF).fine_tuned_for(0), tmp_path / "parts")
    rest = search(make_settings(budget=5, caches={"features": 20_000}).fine_tuned_for(0), tmp_path / "parts")
    shared = accuracies(whole).keys() & accuracies(rest).keys()
    assert len(shared) >= 2
    assert all(accuracies(whole)[config] == accuracies(rest)[config] for config in shared)
    assert rest.result.summary["caches"]["image_features"]["held"] <= 20_000
    assert rest.result.summary["caches"]["image_features"]["full"]
