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


def test_an_interval_is_that_of_the_seeds(studies: Any) -> None:
    """Of a mean the jackknife is exact: t s / √n of the seeds' means, whatever the sets within them are."""
    values = np.random.default_rng(1).normal(size=(12, 5))
    means = values.mean(axis=1)
    reach = 2.200985 * means.std(ddof=1) / np.sqrt(12)  # Student's t, 11 degrees of freedom, from a printed table
    expected = (values.mean(), values.mean() - reach, values.mean() + reach)
    assert studies.shared.interval(values, np.mean) == pytest.approx(expected)
    assert studies.shared.interval(np.full((3, 4), 0.25), np.mean) == (0.25, 0.25, 0.25)


def test_an_interval_of_a_ratio_covers_the_truth(studies: Any) -> None:
    """In 95 % of 400 repetitions, ± 3 of the binomial's standard deviations; seeds and sets both scatter."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        level = rng.normal(0.5, 0.05, size=(16, 1))
        values = np.stack([1.1 * level, level + np.zeros(1)], axis=-1) + rng.normal(0, 0.05, size=(16, 8, 2))
        _, low, high = studies.shared.interval(values, lambda drawn: drawn[..., 0].mean() / drawn[..., 1].mean())
        covered += low <= 1.1 <= high
    assert 0.917 <= covered / 400 <= 0.983


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
    rows = [
        {"seed": 0, "skip": [], "0": {"pia": [0.6, 0.3, 0.6, 0.3], "deletion": [0.5, 0.2, 0.5, 0.2]}},
        {"seed": 1, "skip": [], "0": {"pia": [0.9, 0.3, 0.9, 0.3], "deletion": [0.5, 0.2, 0.5, 0.2]}},
    ]
    four, six = studies.bench.ratios({"skipped": [4, 6]}, rows)
    assert (four["skipped"], six["skipped"]) == (4, 6)
    assert four["ratio"] == pytest.approx(1.5)
    assert (four["low"], four["high"]) == pytest.approx((1.5 - 12.7062 * 0.3, 1.5 + 12.7062 * 0.3))  # 1.2 and 1.8
    assert [six[name] for name in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)
