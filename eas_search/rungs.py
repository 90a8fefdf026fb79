"""Early stopping of trials for several objectives: accuracy on growing parts of the samples, cost known in advance.

Successive halving (Jamieson & Talwalkar, AISTATS 2016) drops a fixed share at every rung. With several objectives there
is no order to take the worst share of; as in a race (Maron & Moore, NeurIPS 1993) a trial is dropped when it has surely
lost instead: a finished trial that costs no more is more accurate on the very same samples, by more than chance.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eas_search.architectures import AttentionSite
from eas_search.front_statistics import CONFIDENCE, paired_difference
from eas_search.skip_config import SkipConfig

RESOLUTION = 0.02  # of a latency ratio: as much as a trial that measures it is off (studies/bench_predictor)
FEWEST = 50  # samples of a rung: fewer save little and show little
Cost = Callable[[SkipConfig], tuple[float, ...]]


class Result(Protocol):
    """What is known of an evaluated configuration: its objectives, and the packed scores of all its samples, if any."""

    @property
    def accuracy(self) -> float: ...
    @property
    def latency(self) -> float: ...
    @property
    def scores(self) -> str: ...


@dataclass(frozen=True)
class Rival:
    """The finished trial that another one has to beat.

    Attributes:
        accuracy: on all samples.
        scores: of all samples, packed.
        latency: what the other one can expect for itself.
    """

    accuracy: float
    scores: str
    latency: float


@dataclass(frozen=True)
class Scored:
    """How a trial came off.

    Attributes:
        accuracy: mean score of all samples, or its estimate when the trial was stopped.
        scores: of all samples, packed; empty when it was stopped.
        stopped_at: samples scored when it was stopped, else None.
    """

    accuracy: float
    scores: str
    stopped_at: int | None


def rung_ends(total: int, fractions: Iterable[float]) -> list[int]:
    """Samples after which a trial may be stopped (`fractions` of `total`, none below `FEWEST`), and `total` itself."""
    sizes = {math.ceil(total * part) for part in fractions}
    return [*sorted(size for size in sizes if FEWEST <= size < total), total]


def score_in_rungs(score: Callable[[int, int], ArrayLike], ends: Sequence[int], rival: Rival | None) -> Scored:
    """Score more and more samples until all are scored, or until the rival has won beyond the paired interval.

    The confidence is shared out among the rungs (Bonferroni), so that all of them together err as often as one would.
    The estimate for a stopped trial is the rival's accuracy, corrected by the difference so far. It is always below the
    rival's: no trial enters the front by being stopped on samples that are easy for both.

    Args:
        score: (start, end) to the scores of these samples.
        ends: from `rung_ends`.
        rival: None when no finished trial costs as little: then nothing can be lost.
    """
    theirs = None if rival is None else unpack(rival.scores)
    seen = np.empty(0)
    for start, end in pairwise([0, *ends]):
        seen = np.concatenate([seen, np.asarray(score(start, end), dtype=np.float64)])
        if rival is None or theirs is None or end == ends[-1]:
            continue
        lead, low, _ = paired_difference(theirs[:end], seen, 1 - (1 - CONFIDENCE) / (len(ends) - 1))
        if low > 0:
            return Scored(max(0.0, rival.accuracy - float(lead)), "", end)
    return Scored(float(seen.mean()), pack(seen), None)


def strongest_rival(known: Iterable[tuple[SkipConfig, Result]], config: SkipConfig, cost: Cost) -> Rival | None:
    """The most accurate of the finished trials that cost at most as much as `config`, in every respect.

    One, chosen before anything is scored: the best of many on few samples would be the luckiest. Of equals the first.
    """
    mine = cost(config)
    finished = [(cost(other), result) for other, result in known if result.scores]
    cheap = [result for other, result in finished if all(a <= b for a, b in zip(other, mine, strict=True))]
    if not cheap:
        return None
    best = max(cheap, key=lambda result: result.accuracy)
    # What has lost is not timed. It is as fast as those with as many attentions, and not faster than its rival.
    alike = [result.latency for other, result in finished if other == mine]
    return Rival(best.accuracy, best.scores, max(best.latency, median(alike) if alike else 0.0))


def kept_attentions(sites: Sequence[AttentionSite]) -> Cost:
    """Cost as the numbers of attentions kept, by tower, kind and width: latency and KV cache follow it.

    Ranks and placements count as nothing: what they cost is only known where latency is predicted, see `with_latency`.
    """
    groups = {site.index: (site.tower, site.kind, site.width) for site in sites}
    order = sorted(set(groups.values()))

    @cache
    def cost(skip: tuple[int | str, ...]) -> tuple[float, ...]:
        kept = Counter(group for index, group in groups.items() if index not in skip)
        return tuple(float(kept[group]) for group in order)

    return lambda config: cost(config.skip)


def with_latency(cost: Cost, latency: Callable[[SkipConfig], float]) -> Cost:
    """Costs and a predicted latency, in steps of `RESOLUTION`: in a narrow model a placement has its price."""
    return cache(lambda config: (*cost(config), float(round(latency(config) / RESOLUTION))))


def pack(scores: ArrayLike) -> str:
    """Scores [N] from 0 to 1 as text: a bit per sample where all are 0 or 1, else a float16; nothing if one is NaN."""
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        return ""
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    raw = np.packbits(values.astype(bool)) if binary else values.astype("<f2")
    return f"{'bits' if binary else 'halves'}:{len(values)}:{base64.b85encode(zlib.compress(raw.tobytes())).decode()}"


def unpack(text: str) -> NDArray[np.float64]:
    """Inverse of `pack`; scores other than 0 and 1 come back within 1 / 2,000 of themselves."""
    kind, count, body = text.split(":", 2)
    raw = zlib.decompress(base64.b85decode(body))
    if kind == "bits":
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=int(count)).astype(np.float64)
    return np.frombuffer(raw, dtype="<f2").astype(np.float64)
