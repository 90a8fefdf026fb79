"""From trials to finalists: shrunken accuracies, then a race on samples that the search has not seen.

The best of many noisy figures is too good on average. So trials are ordered by shrunken accuracies, more of them than
there are finalists are scored on growing parts of the selection split, the same samples for all, and those that
another one dominates beyond the paired interval drop out (Maron and Moore, Hoeffding races, 1994; with intervals of
differences on the same samples as in Birattari et al., A racing algorithm for configuring metaheuristics, 2002).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from eas_search.front_statistics import CONFIDENCE, collapsed, dominance, mean_variance
from eas_search.objective import make_student
from eas_search.report.front import non_dominated
from eas_search.rungs import unpack
from eas_search.samplers.surrogate import Encoder, Surrogate, sigmoid
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig
from eas_search.stages import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import sample_scores
from eas_search.workbench import Workbench

FIRST = 100  # samples of the first round; every further one doubles them
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Trials that may become finalists.

    Attributes:
        configs: their skip configurations.
        accuracy, variance: [candidates], shrunken accuracies, and how unsure they are.
        costs: [3, candidates, costs], what is minimised, lower and upper ends of the intervals.
        validation: packed scores of the validation samples, see `rungs.pack`; empty where there are none.
    """

    configs: Sequence[SkipConfig]
    accuracy: FloatArray
    variance: FloatArray
    costs: FloatArray
    validation: Sequence[str]

    def at(self, rows: list[int]) -> Candidates:
        """Some of them."""
        chosen = [self.configs[row] for row in rows]
        validation = [self.validation[row] for row in rows]
        return Candidates(chosen, self.accuracy[rows], self.variance[rows], self.costs[:, rows], validation)


@dataclass(frozen=True)
class Choice:
    """Who becomes a finalist.

    Attributes:
        rows: positions of the finalists among the candidates.
        record: what the choice was made with: candidates, left (after the race), samples_scored.
    """

    rows: list[int]
    record: dict[str, int]


def select_finalists(accuracy: ArrayLike, costs: ArrayLike, count: int) -> list[int]:
    """Positions of at most `count` points: the front first, then the front of what is left, and so on.

    A front that is too long is thinned, see `thinned`. Arguments as for `non_dominated`.
    """
    acc, cost = np.asarray(accuracy, dtype=float), np.asarray(costs, dtype=float).reshape(len(np.asarray(accuracy)), -1)
    left = np.arange(len(acc))
    chosen: list[int] = []
    while len(chosen) < count and len(left):
        layer = left[non_dominated(acc[left], cost[left])]
        if not len(layer):
            break
        chosen += layer[thinned(acc[layer], cost[layer], count - len(chosen))].tolist()
        left = np.setdiff1d(left, layer)
    return sorted(chosen)


def thinned(accuracy: FloatArray, costs: FloatArray, count: int) -> list[int]:
    """Positions of `count` points of a front (all of them if there are no more).

    As in SMS-EMOA (Beume, Naujoks & Emmerich, EJOR 2007) the one that adds least to the hypervolume is left out, time
    and again; every objective is scaled to its range, so that no unit counts for more. The best of each objective is
    kept where there are more places than objectives.

    Args:
        accuracy: [points].
        costs: [points, costs].
        count: how many to keep.
    """
    points = np.column_stack([-accuracy, costs])
    ends = set(points.argmin(axis=0).tolist()) if count > points.shape[1] else set()
    scaled = (points - points.min(axis=0)) / (np.ptp(points, axis=0) + np.finfo(float).tiny)
    rows = list(range(len(points)))
    while len(rows) > count:
        added = moocore.hv_contributions(scaled[rows], ref=np.full(points.shape[1], 1.1))
        added[[place for place, row in enumerate(rows) if row in ends]] = np.inf
        rows.pop(int(added.argmin()))
    return rows


def round_ends(count: int, first: int = FIRST) -> list[int]:
    """After how many samples the rounds of a race on `count` samples end: `first`, doubled, up to all of them."""
    ends = [min(first, count)]
    while ends[-1] < count:
        ends.append(min(2 * ends[-1], count))
    return ends


def shrink(
    space: SearchSpace, configs: Sequence[SkipConfig], accuracy: FloatArray, seen: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Accuracies drawn towards what similar configurations reach, and their variances: the surrogate's posterior.

    Those that have collapsed stay as they are: they would bend the model for all others. In logits the posterior has
    mean m and deviation s; of the accuracy p = sigmoid(m) the deviation is s p (1 - p) (delta method).

    Args:
        space: the search space.
        configs: different ones.
        accuracy: [n], of each, on `seen` [n] samples.
    """
    variance = mean_variance(accuracy, seen)
    bulk = np.flatnonzero(~collapsed(accuracy, variance))
    ours = [configs[row] for row in bulk.tolist()]
    mean, deviation = Surrogate(Encoder(space, ()), ours, accuracy[bulk].tolist()).predict(ours)
    shrunken = accuracy.copy()
    shrunken[bulk] = sigmoid(mean)
    variance[bulk] = (deviation * shrunken[bulk] * (1 - shrunken[bulk])) ** 2
    return shrunken, variance


def undominated(scores: ArrayLike, costs: FloatArray, confidence: float) -> NDArray[np.intp]:
    """Positions of the points that no other one dominates beyond the interval; arguments as for `dominance`."""
    _, beyond = dominance(scores, costs, confidence)
    return np.flatnonzero(~beyond.any(axis=0))


def race(
    score: Callable[[int, int, int], ArrayLike], costs: FloatArray, places: int, ends: Sequence[int]
) -> dict[int, FloatArray]:
    """Score candidates on growing samples until no more than `places` are left or the samples are used up.

    After a round the candidates drop out that another one dominates beyond the interval. The confidence is shared out
    among the rounds (Bonferroni): 1 - 0.05 / rounds each.

    Args:
        score: (candidate, start, end) to the scores of these samples.
        costs: [3, candidates, costs], see `dominance`.
        places: how many are wanted.
        ends: of the rounds, in samples.

    Returns:
        The scores of those left, by candidate. They may be fewer than `places`.
    """
    confidence = 1 - (1 - CONFIDENCE) / len(ends)
    scores = {row: np.empty(0) for row in range(costs.shape[1])}
    for start, end in zip([0, *ends], ends, strict=False):
        if len(scores) <= places:
            break
        for row, known in scores.items():
            scores[row] = np.concatenate([known, np.asarray(score(row, start, end), dtype=np.float64)])
        rows = list(scores)
        left = undominated(np.stack([scores[row] for row in rows]), costs[:, rows], confidence)
        scores = {rows[place]: scores[rows[place]] for place in left}
    return scores


def shortlist(candidates: Candidates, count: int, places: int) -> list[int]:
    """Positions of the at most `count` candidates that race for `places`.

    Those that lose on the validation samples, which are scored already, do not start.
    """
    short = select_finalists(candidates.accuracy, candidates.costs[0], max(count, places))
    if all(len(candidates.validation[row]) for row in short) and len(short) > places:
        seen = np.stack([unpack(candidates.validation[row]) for row in short])
        short = [short[place] for place in undominated(seen, candidates.costs[:, short], CONFIDENCE)]
    return short


def winners(field: Candidates, left: Mapping[int, FloatArray], places: int) -> list[int]:
    """Positions in the field of the finalists among those that a race left, by `race`'s scores.

    They are ordered by the shrunken accuracy and the race's, weighted by their precisions: the race's samples are
    others.
    """
    rows = list(left)
    means = np.array([values.mean() for values in left.values()])
    weights = 1 / np.array([mean_variance(values.mean(), len(values)) for values in left.values()])
    prior = 1 / field.variance[rows]
    accuracy = (prior * field.accuracy[rows] + weights * means) / (prior + weights)
    return [rows[position] for position in select_finalists(accuracy, field.costs[0, rows], places)]


def choose_finalists(bench: Workbench, supernet: Supernet, folder: StageFolder, candidates: Candidates) -> Choice:
    """The finalists among all trials; an earlier choice among exactly these candidates is taken as it is.

    `settings.candidates` trials race, fine-tuned as in their trials, for `settings.finalists` places.
    """
    settings = bench.settings
    short = shortlist(candidates, settings.candidates, settings.finalists)
    if len(short) <= settings.finalists:
        return Choice(short, {"candidates": len(short), "left": len(short), "samples_scored": 0})
    field = candidates.at(short)
    names = [config.model_dump(mode="json") for config in field.configs]
    identity = json.dumps([names, field.accuracy.tolist(), field.costs.tolist(), settings.finalists])
    name = "race-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    kept = folder.read(name)
    if kept is None:
        folder.write(name, _held(bench, supernet, field), {})
        kept = folder.read(name)
        assert kept is not None
    rows = [short[row] for row in kept[0]["rows"]]
    return Choice(rows, {key: value for key, value in kept[0].items() if key != "rows"})


def _held(bench: Workbench, supernet: Supernet, field: Candidates) -> dict[str, Any]:
    """Hold the race: positions in the field that become finalists, and the figures of `Choice.record`."""
    settings, selection = bench.settings, bench.splits["selection"]
    students: dict[int, Any] = {}
    scored = 0

    def score(row: int, start: int, end: int) -> torch.Tensor:
        nonlocal scored
        if row not in students:  # a student shares the model's weights: keeping all of them costs little
            students[row] = make_student(bench, supernet, field.configs[row], settings.trial)
        scores = sample_scores(students[row], selection.part(start, end), guard=bench.guard)
        scored += len(scores)
        return scores

    left = race(score, field.costs, settings.finalists, round_ends(len(selection)))
    record = {"candidates": len(field.configs), "left": len(left), "samples_scored": scored}
    return {"rows": winners(field, left, settings.finalists), **record}
