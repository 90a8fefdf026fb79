"""From trials to finalists: shrunken accuracies, then a race on samples that the search has not seen.

The best of many noisy figures is too good on average. So trials are judged by shrunken accuracies, more of them than
there are finalists are scored on growing parts of the selection split, the same samples for all, and no more are spent
on those that another one dominates beyond the paired interval (Maron and Moore, Hoeffding races, 1994; with intervals
of differences on the same samples as in Birattari et al., A racing algorithm for configuring metaheuristics, 2002).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from eas_search.expected_front import most_promising
from eas_search.front_statistics import CONFIDENCE, collapsed, dominance, mean_difference, mean_variance
from eas_search.objective import trial_student
from eas_search.samplers.surrogate import Encoder, Surrogate, sigmoid
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import sample_scores
from eas_search.workbench import Workbench

CHANGE = 0.3  # see `Candidates.change`; of 16 finalists of two searches .25 and .42, sampling noise taken off
FIRST = 100  # samples of the first round; every further one doubles them
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Trials that may become finalists.

    Attributes:
        configs: their skip configurations.
        accuracy, variance: [candidates], shrunken accuracies, and how unsure they are.
        costs: [candidates, costs], what is minimised.
        change: standard deviation, in logits, of what the finals' fine-tuning will change for one and not for all.
    """

    configs: Sequence[SkipConfig]
    accuracy: FloatArray
    variance: FloatArray
    costs: FloatArray
    change: float = 0.0

    def most_promising(self, accuracy: FloatArray, variance: FloatArray, count: int) -> list[int]:
        """Positions of the `count` that promise most, given what is known of their accuracies as trials, [candidates].

        What a trial's few steps have not made of a configuration the finals' may: a poor one has far to go.
        """
        change = self.change * accuracy * (1 - accuracy)  # delta method, as in `shrink`
        return most_promising(accuracy, variance + change**2, self.costs, count)

    def at(self, rows: list[int]) -> Candidates:
        """Some of them."""
        chosen = [self.configs[row] for row in rows]
        return Candidates(chosen, self.accuracy[rows], self.variance[rows], self.costs[rows], self.change)


@dataclass(frozen=True)
class Choice:
    """Who becomes a finalist.

    Attributes:
        rows: positions of the finalists among the candidates.
        record: what the choice was made with: candidates, left (at the end of the race), samples_scored, and trained,
            how many had to be fine-tuned again.
    """

    rows: list[int]
    record: dict[str, int]


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
    share = np.broadcast_to(np.asarray(seen, dtype=np.float64), accuracy.shape)[bulk] / np.max(seen)
    mean, deviation = Surrogate(Encoder(space, ()), ours, accuracy[bulk].tolist(), share=share).predict(ours)
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

    After a round no more samples are spent on candidates that another one dominates beyond the interval. The confidence
    is shared out among the rounds (Bonferroni): 1 - 0.05 / rounds each.

    Args:
        score: (candidate, start, end) to the scores of these samples.
        costs: [candidates, costs], see `dominance`.
        places: how many are wanted.
        ends: of the rounds, in samples.

    Returns:
        The scores of every candidate, fewer of those that dropped out.
    """
    confidence = 1 - (1 - CONFIDENCE) / len(ends)
    scores = [np.empty(0) for _ in costs]
    running = np.arange(len(scores))
    for start, end in zip([0, *ends], ends, strict=False):
        if len(running) <= places:
            break
        for row in running.tolist():
            scores[row] = np.concatenate([scores[row], np.asarray(score(row, start, end), dtype=np.float64)])
        running = running[undominated(np.stack([scores[row] for row in running]), costs[running], confidence)]
    return dict(enumerate(scores))


def furthest(raced: Mapping[int, FloatArray]) -> list[int]:
    """The candidates that a race scored on the most samples."""
    most = max(map(len, raced.values()))
    return [row for row, values in raced.items() if len(values) == most]


def winners(field: Candidates, raced: Mapping[int, FloatArray], places: int) -> list[int]:
    """Positions of the finalists in the field: those that promise most, see `expected_front`.

    An accuracy is the shrunken one and the race's, weighted by their precisions: the race's samples are others. Those
    may be harder or easier on the whole, and not all candidates have been through all of them. So what the race tells
    is by how much a candidate differs from those that came furthest, on the samples that it shares with them.
    """
    accuracy, variance, ahead = field.accuracy.copy(), field.variance.copy(), furthest(raced)
    level, pace = accuracy[ahead].mean(), np.mean([raced[row] for row in ahead], axis=0)
    for row, values in raced.items():
        if len(values):
            lead, unsure = map(float, mean_difference(values, pace[: len(values)]))
            weight = variance[row] / (variance[row] + unsure)
            accuracy[row] += weight * (level + lead - accuracy[row])
            variance[row] *= 1 - weight
    return field.most_promising(accuracy, variance, places)


def choose_finalists(bench: Workbench, supernet: Supernet, folder: StageFolder, candidates: Candidates) -> Choice:
    """The finalists among all trials; an earlier choice among exactly these candidates is taken as it is.

    `settings.candidates` trials race, as their trials have left them, for `settings.finalists` places.
    """
    settings = bench.settings
    most = max(settings.candidates, settings.finalists)
    short = candidates.most_promising(candidates.accuracy, candidates.variance, most)
    if len(short) <= settings.finalists:
        return Choice(short, {"candidates": len(short), "left": len(short), "samples_scored": 0, "trained": 0})
    field = candidates.at(short)
    names = [config.model_dump(mode="json") for config in field.configs]
    identity = json.dumps([names, field.accuracy.tolist(), field.costs.tolist(), settings.finalists])
    name = "race-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    held = folder.once(name, lambda: _held(bench, supernet, field))
    rows = [short[row] for row in held["rows"]]
    return Choice(rows, {key: value for key, value in held.items() if key != "rows"})


def _held(bench: Workbench, supernet: Supernet, field: Candidates) -> dict[str, Any]:
    """Hold the race: positions in the field that become finalists, and the figures of `Choice.record`."""
    settings, selection = bench.settings, bench.splits["selection"]
    students: dict[int, Any] = {}
    scored = trained = 0

    def score(row: int, start: int, end: int) -> torch.Tensor:
        nonlocal scored, trained
        if row not in students:  # a student shares the model's weights: keeping all of them costs little
            students[row], again = trial_student(bench, supernet, field.configs[row])
            trained += again
        scores = sample_scores(students[row], selection.part(start, end), conditions=bench.conditions)
        scored += len(scores)
        return scores

    raced = race(score, field.costs, settings.finalists, round_ends(len(selection)))
    record = {"candidates": len(field.configs), "left": len(furthest(raced))}
    record |= {"samples_scored": scored, "trained": trained}
    return {"rows": winners(field, raced, settings.finalists), **record}
