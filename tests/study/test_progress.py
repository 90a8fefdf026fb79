"""What is said while trials run: the tally, kept trial by trial, against the front computed anew."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from eas_search.objective import TrialResult
from eas_search.report.front import non_dominated
from eas_search.skip_config import SkipConfig
from eas_search.study.progress import PlainDisplay, Tally


@pytest.fixture
def told(fake_result: Callable[..., TrialResult]) -> Callable[..., TrialResult]:
    """A trial with these objectives."""
    blank = fake_result(SkipConfig())
    return lambda accuracy, latency, **others: replace(blank, accuracy=accuracy, latency=latency, **others)


@pytest.mark.parametrize("steps", [4, 1000])
@pytest.mark.parametrize("costs", [1, 2])
def test_the_front_that_is_kept_is_the_front_of_all(told: Callable[..., TrialResult], steps: int, costs: int) -> None:
    """With few steps many trials are equal in one objective or in all."""
    chance = np.random.default_rng(steps)
    points = chance.integers(1, steps + 1, size=(80, 3)) / steps
    tally = Tally(80, 12, objectives=("accuracy", "latency", "kv_bytes")[: 1 + costs])
    for count, (accuracy, latency, kv_bytes) in enumerate(points.tolist(), start=1):
        result = told(accuracy, latency, kv_bytes=kv_bytes)
        tally.add(result)
        sofar = points[:count, : 1 + costs]
        kept = sofar[non_dominated(sofar[:, 0], sofar[:, 1:])]
        assert sorted(tally.front) == sorted((-a, *rest) for a, *rest in kept.tolist())
        news = tally.news(count, SkipConfig(skip=(1, 2)), result)
        best = sofar[:, 0].max()
        assert news.best == f"{best:.3f} at {1 / sofar[sofar[:, 0] == best][:, 1].min():.2f}×"
        assert (news.done, news.budget, news.front, news.skipped, news.sites) == (count, 80, len(kept), 2, 12)


def test_a_stopped_trial_counts_but_is_on_no_front_and_is_said_to_be_stopped(told: Callable[..., TrialResult]) -> None:
    tally, said = Tally(5, 12), io.StringIO()
    tally.add(told(0.8, 0.9))
    stopped = told(0.9, 0.5, stopped_at=100)
    tally.add(stopped)
    assert (tally.done, tally.front) == (2, [(-0.8, 0.9)])
    PlainDisplay(Console(file=said, width=200)).trial(tally.news(1, SkipConfig(skip=(3,)), stopped))
    assert "trial 2/5: 1 of 12 skipped, accuracy 0.900, 2.00× (stopped after 100 samples) | front 1" in said.getvalue()
