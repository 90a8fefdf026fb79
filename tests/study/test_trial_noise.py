"""What the study of a trial's luck computes from its measurements."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eas_search.skip_config import SkipConfig

FILE = Path(__file__).parents[2] / "studies" / "trial_noise" / "measure.py"
SHARED = ("intervals", "record", "supernets")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("trial_noise", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in SHARED:
        sys.modules.pop(name, None)


def test_the_parts_of_the_luck_are_told_apart(study: Any) -> None:
    rng, sets, orders = np.random.default_rng(0), 200, 300
    shared, left = rng.normal(scale=0.03, size=orders), rng.normal(scale=0.01, size=(sets, orders))
    found = study.luck(rng.normal(scale=0.2, size=(sets, 1)) + shared + left)
    assert found["left"] == pytest.approx(0.01, rel=0.02)
    assert found["shared"] == pytest.approx(0.03, rel=0.1)
    assert found["alone"] == pytest.approx(np.hypot(found["shared"], found["left"]))


def test_luck_of_two_sets_and_two_orders_by_hand(study: Any) -> None:
    # Means of orders .5 and .7, of sets .55 and .65; what is left over is ±.05 everywhere.
    found = study.luck(np.array([[0.40, 0.70], [0.60, 0.70]]))
    assert found["left"] == pytest.approx(0.1)  # squares 4 · .05² over one degree of freedom
    assert found["shared"] == pytest.approx(np.sqrt(0.02 - 0.01 / 2))


def test_luck_of_a_difference(study: Any) -> None:
    rng = np.random.default_rng(1)
    common, own = rng.normal(scale=0.04, size=(50, 400)), rng.normal(scale=0.01, size=(100, 400))
    found = study.luck_of_differences(np.concatenate([common, common]) + own)  # each pair has a luck of its own
    assert found["shared"] == pytest.approx(0.01 * np.sqrt(2), rel=0.02)
    assert found["alone"] == pytest.approx(np.sqrt(2 * (0.04**2 + 0.01**2)), rel=0.02)


@pytest.mark.parametrize("skip", [(1,), (2, 5), (1, 2, 3, 4)])
def test_a_neighbour_differs_by_one_exchange(study: Any, skip: tuple[int, ...]) -> None:
    bench = SimpleNamespace(sites=[SimpleNamespace(index=index) for index in range(6)])
    for seed in range(20):
        found = study.neighbour(bench, SkipConfig(skip=skip), np.random.default_rng(seed)).skip
        assert len(found) == len(skip)
        assert len({*found} - {*skip}) == len({*skip} - {*found}) == 1
        assert 0 not in found


def test_a_common_order_ranks_sets_that_only_the_order_confuses(study: Any) -> None:
    ability, orders = np.linspace(0.5, 0.6, 12)[:, None], np.array([0.0, 0.3, -0.2])
    seen = ability + orders
    found = study.agreements(seen, seen, np.random.default_rng(0))
    assert found["common"] == pytest.approx([1.0] * 3)
    assert np.mean(found["own"]) < 0.7
