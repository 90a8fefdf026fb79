"""Early stopping of trials: literal scores, and what must never happen to a front."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eas_search.rungs import (
    Rival,
    Scored,
    kept_attentions,
    pack,
    rung_ends,
    score_in_rungs,
    strongest_rival,
    unpack,
    with_latency,
)
from eas_search.skip_config import SkipConfig


def result(accuracy: float, latency: float = 1.0, scores: str = "x") -> Any:
    return SimpleNamespace(accuracy=accuracy, latency=latency, scores=scores)


def rival(scores: Any, latency: float = 0.5) -> Rival:
    return Rival(float(np.mean(scores)), pack(scores), latency)


@pytest.mark.parametrize(
    ("total", "fractions", "ends"),
    [
        (400, (0.25, 0.5), [100, 200, 400]),
        (400, (0.5, 0.25, 0.5), [100, 200, 400]),
        (399, (0.25,), [100, 399]),
        (150, (0.25, 0.5), [75, 150]),  # 38 samples would be too few
        (32, (0.25, 0.5), [32]),
        (400, (), [400]),
    ],
)
def test_rungs_are_parts_of_the_samples_but_not_too_few(total: int, fractions: Any, ends: list[int]) -> None:
    assert rung_ends(total, fractions) == ends


@pytest.mark.parametrize(
    "scores",
    [
        [],
        [1],
        [0, 0, 0],
        [1, 0, 0, 1, 1, 0, 1, 0, 1],
        np.arange(1000) % 3 == 0,
    ],
)
def test_right_or_wrong_comes_back_exactly(scores: Any) -> None:
    assert unpack(pack(scores)).tolist() == [float(score) for score in scores]


@pytest.mark.parametrize("scale", [1.0, 0.03, 1e-3])
def test_other_scores_come_back_within_a_two_thousandth_and_take_two_bytes_at_most(scale: float) -> None:
    """Also small ones, as likelihoods are: a fixed step would swallow what tells two of them apart."""
    scores = scale * (0.5 + np.random.default_rng(0).random(4000) / 2)
    text = pack(scores)
    assert np.abs(unpack(text) / scores - 1).max() <= 1 / 2000
    assert len(text) < 2 * 4000 * 5 / 4 + 50  # five characters for four bytes
    assert len(pack(scores > 0.75 * scale)) < 4000 / 8 * 5 / 4 + 50
    assert pack([0.5, float("nan")]) == ""


def run(scores: Any, against: Rival | None, ends: list[int]) -> tuple[Scored, int]:
    """The outcome and how many samples it took."""
    asked = [0]

    def score(start: int, end: int) -> Any:
        assert start == asked[0]  # every sample once, in order
        asked[0] = end
        return scores[start:end]

    return score_in_rungs(score, ends, against), asked[0]


def test_a_trial_that_loses_beyond_the_interval_is_stopped_at_the_first_rung_that_shows_it() -> None:
    # Per hundred samples the rival is right where the trial is wrong on 5, 12, … and never the other way round.
    ours, theirs = np.zeros(400), np.zeros(400)
    theirs[:4] = 1  # four of four is chance (McNemar: p = 0.125)
    theirs[100:112] = 1
    outcome, asked = run(ours, rival(theirs), [100, 200, 400])
    assert asked == outcome.stopped_at == 200
    assert outcome.scores == ""
    # The rival has 16 of 400 right. The trial is 16 in 200 worse on those seen: below 0, and 0 is the least there is.
    assert outcome.accuracy == 0.0
    better = np.concatenate([np.ones(200), np.zeros(200)])
    outcome, asked = run(np.where(np.arange(400) < 20, 0, better), rival(better), [100, 200, 400])
    assert (asked, outcome.stopped_at) == (100, 100)
    assert outcome.accuracy == pytest.approx(0.5 - 20 / 100)


@pytest.mark.parametrize("lead", [0, 2, 4])
def test_a_trial_that_is_not_surely_worse_is_scored_to_the_end(lead: int) -> None:
    ours = np.ones(400)
    ours[:lead] = 0
    outcome, asked = run(ours, rival(np.ones(400)), [100, 200, 400])
    assert (asked, outcome.stopped_at) == (400, None)
    assert outcome.accuracy == 1 - lead / 400
    assert unpack(outcome.scores).tolist() == ours.tolist()


def test_without_a_rival_nothing_is_stopped_and_the_last_samples_decide_nothing() -> None:
    assert run(np.zeros(400), None, [100, 200, 400]) == (Scored(0.0, pack(np.zeros(400)), None), 400)
    late = np.concatenate([np.ones(200), np.zeros(200)])  # all of its mistakes come behind the last rung
    outcome, _ = run(late, rival(np.ones(400)), [100, 200, 400])
    assert outcome.stopped_at is None
    assert outcome.accuracy == 0.5


def test_a_stopped_trial_never_looks_as_good_as_its_rival() -> None:
    chance = np.random.default_rng(1)
    stopped = 0
    for _ in range(300):
        theirs = chance.random(400) < chance.random()
        ours = np.where(chance.random(400) < 0.7, theirs, chance.random(400) < 0.5)
        against = rival(theirs)
        outcome, _ = run(ours, against, [100, 200, 400])
        if outcome.stopped_at is not None:
            stopped += 1
            assert 0 <= outcome.accuracy < against.accuracy
    assert stopped > 50


@pytest.mark.parametrize("seed", range(3))
def test_trials_as_good_as_their_rival_are_hardly_ever_stopped(seed: int) -> None:
    """The interval's upper 2.5 %, shared out among two rungs, and four standard errors of 1,000 draws."""
    chance = np.random.default_rng(seed)
    lost = 0
    for _ in range(1000):
        hard = chance.random(400)  # how hard a sample is, the same for both
        theirs, ours = (hard < 0.5 + 0.2 * chance.standard_normal(400) for _ in range(2))
        full = Rival(0.5, pack(theirs), 1.0)
        lost += run(ours, full, [100, 200, 400])[0].stopped_at is not None
    assert lost / 1000 < 0.025 + 0.02


SITES = [SimpleNamespace(index=i, tower="text", kind="self", width=64) for i in range(4)]
SITES += [SimpleNamespace(index=i, tower="vision", kind="self", width=32) for i in (4, 5)]


def skipping(*skip: int, pia_dim: int = 4) -> SkipConfig:
    return SkipConfig(skip=skip, pia_dim=pia_dim)


def test_cost_is_what_is_kept_per_tower() -> None:
    cost = kept_attentions(SITES)  # type: ignore[arg-type]
    assert cost(skipping()) == (4.0, 2.0)
    assert cost(skipping(0, 3, 5)) == (2.0, 1.0)
    assert cost(skipping(1, 2, 4, pia_dim=16)) == (2.0, 1.0)


def test_the_rival_is_the_most_accurate_that_costs_no_more_in_any_tower() -> None:
    cost = kept_attentions(SITES)  # type: ignore[arg-type]
    known = [
        (skipping(0), result(0.9, 0.95)),
        (skipping(0, 1), result(0.7, 0.80)),
        (skipping(1, 2), result(0.8, 0.84)),
        (skipping(2, 3), result(0.99, 0.82, scores="")),  # stopped: nothing to compare with
        (skipping(0, 4), result(0.85, 0.90)),
        (skipping(0, 1, 2), result(0.6, 0.70)),
    ]
    assert strongest_rival(known, skipping(0, 3), cost) == Rival(0.8, "x", 0.84)  # 0.82 is the median of 0.80 and 0.84
    assert strongest_rival(known, skipping(3), cost) == Rival(0.9, "x", 0.95)
    assert strongest_rival(known, skipping(4), cost) == Rival(0.85, "x", 0.9)  # none like it: as its rival
    assert strongest_rival(known, skipping(0, 1, 3, 4), cost) is None
    assert strongest_rival([], skipping(0), cost) is None
    slow = [(skipping(0, 1), result(0.7, 0.80)), (skipping(1, 2), result(0.5, 0.9)), (skipping(1, 3), result(0.6, 0.9))]
    assert strongest_rival(slow, skipping(0, 3), cost) == Rival(0.7, "x", 0.9)


def test_where_latency_is_predicted_a_faster_placement_has_no_slower_rival() -> None:
    """By more than a trial can tell: `ffn` is 8 % faster here, rank 2 by 0.4 %."""
    predicted = {"parallel": 0.9, "ffn": 0.82}
    cost = with_latency(kept_attentions(SITES), lambda c: predicted[c.placement] + 0.002 * c.pia_dim)  # type: ignore[arg-type]
    slow, fast = skipping(0), skipping(0).model_copy(update={"placement": "ffn"})
    known = [(slow, result(0.9, 0.908))]
    assert strongest_rival(known, fast, cost) is None
    assert strongest_rival(known, skipping(1, pia_dim=2), cost) == Rival(0.9, "x", 0.908)
    assert strongest_rival([(fast, result(0.8, 0.828))], slow, cost) == Rival(0.8, "x", 0.828)
    assert cost(slow)[:2] == kept_attentions(SITES)(slow)  # type: ignore[arg-type]
