"""How well a metric foretold the trials: Kendall's tau by hand, on tables small enough to count pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from eas_search.study.quality import metric_quality


def table(*rows: tuple[tuple[int, ...], float], **changes: Any) -> pd.DataFrame:
    frame = pd.DataFrame(
        [
            {"state": "COMPLETE", "skip": skip, "pia_dim": 4, "placement": "ffn", "accuracy": accuracy}
            for skip, accuracy in rows
        ]
    )
    return frame.assign(**changes)


SCORES = {"good": [0.0, 1.0, 2.0, 3.0], "bad": [3.0, 2.0, 1.0, 0.0], "flat": [1.0] * 4}


def test_pairs_of_equal_size_are_counted_and_others_are_not() -> None:
    # Size 1: sites 5, 6, 7, 9 in the order of their accuracy but for one swap: 5 of 6 pairs agree, tau = (5 − 1) / 6.
    # Size 2: means .5 and 2.5, the better one has the higher accuracy: tau = 1 with one pair. Skipping two is always
    # worse than skipping one, which must not matter.
    trials = table(((5,), 0.6), ((6,), 0.8), ((7,), 0.7), ((9,), 0.9), ((5, 6), 0.1), ((7, 9), 0.2))
    quality = metric_quality(trials, [5, 6, 7, 9], SCORES)
    assert quality["good"] == {"kendall_tau": pytest.approx((6 * 4 / 6 + 1 * 1) / 7), "pairs": 7}
    assert quality["bad"]["kendall_tau"] == pytest.approx(-quality["good"]["kendall_tau"])
    assert quality["flat"] == {"kendall_tau": None, "pairs": 0}


def test_ties_in_accuracy_follow_tau_b() -> None:
    # Three trials, two of equal accuracy: 2 concordant of 3 pairs, tau-b = 2 / sqrt(2 · 3).
    quality = metric_quality(table(((0,), 0.5), ((1,), 0.5), ((2,), 0.9)), [0, 1, 2, 3], SCORES)
    assert quality["good"]["kendall_tau"] == pytest.approx(2 / 6**0.5)


@pytest.mark.parametrize(
    "trials",
    [
        table(((0,), 0.5)),
        table(((0,), 0.5), ((1, 2), 0.4)),
        table(((0,), 0.5), ((1,), 0.5)),
        table(((), 0.5), ((), 0.6)),
        table(((0,), 0.5), ((0,), 0.6)),
        table(((0,), 0.5), ((1,), 0.6), state="FAIL"),
    ],
    ids=["one", "other sizes", "equal accuracies", "nothing skipped", "one configuration twice", "failed"],
)
def test_without_a_comparison_there_is_no_figure(trials: pd.DataFrame) -> None:
    assert metric_quality(trials, [0, 1, 2, 3], SCORES)["good"] == {"kendall_tau": None, "pairs": 0}
