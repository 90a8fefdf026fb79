"""What the studies of the supernet's options and of PIA's gain compute from their measurements."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

MODULES = ("bench", "measure", "supernets")
STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shared module and both studies."""
    for folder in ("supernet_options", "bench_pia"):
        monkeypatch.syspath_prepend(str(STUDIES / folder))
    monkeypatch.syspath_prepend(str(STUDIES))
    for name in MODULES:
        sys.modules.pop(name, None)
    import bench
    import measure
    import supernets

    yield SimpleNamespace(bench=bench, measure=measure, shared=supernets)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_settings_change_in_part(studies: Any) -> None:
    config = {"model": "demo", "task": "digits-vqa", "test": 50, "settings": {"supernet": {"training": {"steps": 7}}}}
    settings = studies.shared.settings_of(config, seed=3)
    assert (settings.seed, settings.samples.test, settings.supernet.training.steps) == (3, 50, 7)
    assert settings.supernet.training.learning_rate == 2e-3  # the supernet's own, not that of any fine-tune
    assert studies.shared.changed(settings, {"trial": {"distill": 0.5}}).trial.steps == settings.trial.steps


def test_an_interval_draws_seeds_and_then_sets(studies: Any) -> None:
    """One set per seed: the usual 1.96 s / √n. Sets that do not differ add nothing to what the seeds' spread gives."""
    values = np.random.default_rng(1).normal(size=(400, 1))
    mean, low, high = studies.shared.interval(values, np.mean, draws=4000)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    again = studies.shared.interval(np.repeat(values, 5, axis=1), np.mean, draws=4000)
    assert again == pytest.approx((mean, low, high), abs=0.01)
    assert studies.shared.interval(np.full((3, 4), 0.25), np.mean) == (0.25, 0.25, 0.25)


def test_gains_are_paired(studies: Any) -> None:
    config = {"options": {"today": {}, "new": {"against": "today"}}}
    rows = [
        {"seed": 1, "option": "new", "trial": [0.61, 0.41]},
        {"seed": 0, "option": "today", "trial": [0.7, 0.5]},
        {"seed": 1, "option": "today", "trial": [0.6, 0.4]},
        {"seed": 0, "option": "new", "trial": [0.71, 0.51]},
    ]
    found = studies.measure.compare(config, rows, "trial")["new"]
    assert found["accuracy"] == pytest.approx(0.56)
    assert [found[name] for name in ("gain", "low", "high")] == pytest.approx([0.01] * 3)


def test_ratios_are_of_mean_accuracies_by_size(studies: Any) -> None:
    """Sizes take turns; (0.6 + 0.9) / (0.5 + 0.5) with four sites skipped, (0.3 + 0.3) / (0.2 + 0.2) with six."""
    rows = [{"seed": 0, "skip": [], "0": {"pia": [0.6, 0.3, 0.9, 0.3], "deletion": [0.5, 0.2, 0.5, 0.2]}}]
    four, six = studies.bench.ratios({"skipped": [4, 6]}, rows)
    assert (four["skipped"], six["skipped"]) == (4, 6)
    assert four["ratio"] == pytest.approx(1.5)
    assert (four["low"], four["high"]) == pytest.approx((1.2, 1.8))  # one set drawn twice
    assert [six[name] for name in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)
