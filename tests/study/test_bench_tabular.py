"""The tabular benchmark judges a made-up table as a literal computation does."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STUDY = Path(__file__).parents[2] / "studies" / "bench_tabular"
SITES = 5


@pytest.fixture(scope="module")
def table() -> Any:
    """A site costs the more accuracy the later it stands; 1,800 samples of it."""
    sys.path[:0] = [str(STUDY), str(STUDY.parent)]
    try:
        from table import Table
    finally:
        del sys.path[:2]
    rng = np.random.default_rng(0)
    bits = np.arange(2**SITES)[:, None] >> np.arange(SITES) & 1
    accuracy = 0.9 - bits @ np.array([0.005, 0.02, 0.05, 0.1, 0.2])
    difficulty = rng.random(1800)  # the same for all sets, as of real samples
    record = {
        "table": {"free": SITES, "pia_dim": 4},
        "sites": [f"layers.{i}" for i in range(SITES)],
    }
    return Table("made up", record, difficulty < accuracy[:, None], {"text": 0.03, "at_end": 0.0})


@pytest.fixture
def judge(table: Any) -> Any:
    """One division of the samples."""
    module = sys.modules[type(table).__module__]
    return module.Judge.divide(table, seed=0, validation=400, selection=400)


def test_every_sample_has_one_part(table: Any, judge: Any) -> None:
    assert [len(part) for part in judge.parts] == [400, 400, 1000]
    assert sorted(np.concatenate(judge.parts)) == list(range(1800))
    np.testing.assert_allclose(judge.test[3], table.right[3, judge.parts[2]].mean())


def test_the_area_is_that_of_the_steps(judge: Any) -> None:
    front = judge.front(np.arange(1, 2**SITES), judge.test[1:])
    points = sorted((float(judge.latency[i]), float(judge.test[i])) for i in front)
    steps = sum(
        (right[0] - left[0]) * left[1] for left, right in pairwise([*points, (1.0, 0.0)])
    )  # each point's accuracy counts up to the next slower, more accurate one
    assert judge.hypervolume(front) == pytest.approx(steps)


def test_finals_keep_one_set_of_each_size_when_these_are_clearly_best(table: Any, judge: Any) -> None:
    """Places for as many as there are sizes: the best of each size has no equal by a wide margin."""
    tried = np.arange(1, 2**SITES)
    best = [2**size - 1 for size in range(1, SITES + 1)]  # the cheapest sites go first
    assert set(best) <= set(judge.finals(tried, table.space(), count=20, places=12).tolist())
    few = judge.finals(tried, table.space(), count=20, places=SITES)
    assert len(few) == SITES
    # Two of a size may be within the noise; what is handed over is worth as much as the best ones.
    assert judge.hypervolume(few) > 0.995 * judge.hypervolume(np.array(best))


def test_all_are_finalists_where_there_is_room(table: Any, judge: Any) -> None:
    tried = np.array([1, 3, 7])
    assert judge.finals(tried, table.space(), count=20, places=12).tolist() == [1, 3, 7]


def test_every_tower_has_its_own_price(table: Any) -> None:
    towers = ["text", "text", "vision", "text", "vision"]
    record = {**table.record, "towers": towers}
    price = {"text": 0.03, "vision": 0.01, "at_end": 0.0}
    other = type(table)("made up", record, table.right, price)
    expected = [
        1 - sum(price[tower] for bit, tower in enumerate(towers) if number >> bit & 1) for number in range(2**SITES)
    ]
    np.testing.assert_allclose(other.latency, expected)
    assert len(set(other.latency.tolist())) == 4 * 3  # sets with equal counts have the very same latency
    assert [site.tower for site in other.space().sites] == towers


def test_ffns_behind_the_last_attention_are_spared(table: Any) -> None:
    other = type(table)("made up", table.record, table.right, {"text": 0.03, "at_end": 0.02})
    cases = {0b00000: 0, 0b00001: 1, 0b10000: 2, 0b11000: 3, 0b01000: 1, 0b11111: 5}  # the last one is the highest bit
    for number, spared in cases.items():
        assert other.latency[number] == pytest.approx(1 - 0.03 * number.bit_count() - 0.02 * spared)
    assert other.space().ends == ((4, 3, 2, 1, 0),)
