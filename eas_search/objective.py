"""One trial: a skip configuration → (accuracy, latency) and what is recorded with them.

`evaluate` is a pure function of (workbench, supernet, configuration, rival): the same configuration gives the same
accuracy in whatever order and process. Only whether it is stopped early depends on the trials before it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.conditions import device_of
from eas_search.latency import measure_latency
from eas_search.merging import merge
from eas_search.names import Objective
from eas_search.rungs import Cost, Rival, kept_attentions, rung_ends, score_in_rungs, with_latency
from eas_search.skip_config import SkipConfig
from eas_search.skipping import load_adapters
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune, sample_scores
from eas_search.workbench import Workbench


@dataclass(frozen=True)
class TrialResult:
    """Figures of one trial.

    Attributes:
        accuracy: mean score of the validation samples by the task's metric, 0 to 1.
        latency: prefill time of the merged model relative to the original model, predicted or from the same run.
        latency_low, latency_high: 95 % interval of that ratio.
        redundancy: mean redundancy score of the skipped sites (0 when nothing is skipped).
        kv_bytes: KV-cache bytes per token and sample, measured.
        parameters: of the merged model.
        flops: of one prefill of the timed batch.
        seconds: wall-clock of the trial.
        device: where it ran.
        scores: of the validation samples, packed; empty when the trial was stopped.
        stopped_at: validation samples scored when the trial was stopped, see `rungs`: then the accuracy is an estimate,
            and the latency that of similar trials unless it is predicted. None for all others.
    """

    accuracy: float
    latency: float
    latency_low: float
    latency_high: float
    redundancy: float
    kv_bytes: int
    parameters: int
    flops: int
    seconds: float
    device: str
    scores: str = ""
    stopped_at: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def values(self, objectives: Sequence[Objective]) -> list[float]:
        """The values of these objectives, as a study is told them."""
        return [float(getattr(self, name)) for name in objectives]


def order_seed(seed: int, repeat: int = 0) -> int:
    """Decides on which samples, in which order, the students of a study are trained: all of them on the same ones.

    What an order adds to every student thus falls out of all comparisons (common random numbers; measured in
    `studies/trial_noise`: two thirds of the variance that it adds to the difference of two similar trials).
    """
    return zlib.crc32(f"{seed}:{repeat}".encode())


def make_student(
    bench: Workbench, supernet: Supernet, config: SkipConfig, training: FineTuneConfig, repeat: int = 0
) -> nn.Module:
    """The fine-tuned student of a configuration: inherits from the supernet, then trains its own adapters.

    Every `repeat` trains on the samples in another order.
    """
    student, train, settings = bench.student(config), bench.splits["train"], bench.settings.supernet
    if settings.refit and settings.training.steps == 0 and config.skip and config.pia_dim:
        with bench.conditions.guard(), supernet.refitted(config, list(train.subset(settings.refit).batches(64))):
            supernet.inherit(student)
    else:
        supernet.inherit(student)
    seed, teacher = order_seed(bench.settings.seed, repeat), supernet.intact_logits
    fine_tune(student, train, training, seed, conditions=bench.conditions, teacher=teacher)
    return student.eval()


def trial_student(bench: Workbench, supernet: Supernet, config: SkipConfig) -> tuple[nn.Module, bool]:
    """(the student of a configuration as its trial has left it, whether it had to be trained again)."""
    kept = bench.kept.read(config)
    if kept is None:
        return make_student(bench, supernet, config, bench.settings.trial), True
    return kept_student(bench, config, kept), False


def kept_student(bench: Workbench, config: SkipConfig, adapters: Mapping[str, Tensor]) -> nn.Module:
    """The student of a configuration with adapters that were trained earlier.

    Raises:
        ConfigError: the adapters belong to another configuration.
    """
    student = bench.student(config)
    load_adapters(student, adapters)
    return student.eval()


def mean_redundancy(bench: Workbench, scores: Sequence[float], config: SkipConfig) -> float:
    """Mean score of the skipped sites; `scores` are in the order of the searchable sites."""
    skipped = [score for site, score in zip(bench.sites, scores, strict=True) if site.index in set(config.skip)]
    return sum(skipped) / len(skipped) if skipped else 0.0


def trial_latency(bench: Workbench, merged: Callable[[], nn.Module], config: SkipConfig) -> tuple[float, float, float]:
    """(ratio, low, high) of the merged model's prefill time, predicted or measured as the settings say."""
    if bench.settings.latency == "predicted":
        return bench.predicted_latency(config)
    with bench.quiet.exclusive():
        report = measure_latency(
            merged(), bench.latency_inputs(), baseline=bench.model, config=bench.settings.trial_latency
        )
    ratio = report.prefill.ratio
    return ratio.estimate, ratio.low, ratio.high


def foretold_cost(bench: Workbench) -> Cost:
    """What is known of a configuration's costs before its trial: attentions kept, and latency where it is predicted."""
    cost = kept_attentions(bench.sites)
    if bench.settings.latency == "measured":
        return cost
    return with_latency(cost, lambda config: bench.predicted_latency(config)[0])


def evaluate(
    bench: Workbench, supernet: Supernet, scores: Sequence[float], config: SkipConfig, rival: Rival | None = None
) -> TrialResult:
    """Inherit → fine-tune → validation accuracy → merge → latency against the original model.

    A `rival` that wins on a part of the samples spares the others and the timing.

    Raises:
        EasSearchError: the configuration does not fit the model.
    """
    begin = time.perf_counter()
    student = make_student(bench, supernet, config, bench.settings.trial)
    split = bench.splits["validation"]
    scored = score_in_rungs(
        lambda start, end: sample_scores(student, split.part(start, end), conditions=bench.conditions),
        rung_ends(len(split), bench.settings.rungs),
        rival,
    )
    if scored.stopped_at is None:  # others are never candidates
        bench.kept.keep(config, student)
    merged = cache(lambda: merge(student).eval())  # where latency and costs of its like are known nobody asks for it
    if rival is not None and scored.stopped_at is not None and bench.settings.latency == "measured":
        latency, latency_low, latency_high = rival.latency, math.nan, math.nan
    else:
        latency, latency_low, latency_high = trial_latency(bench, merged, config)
    return TrialResult(
        accuracy=scored.accuracy,
        scores=scored.scores,
        stopped_at=scored.stopped_at,
        latency=latency,
        latency_low=latency_low,
        latency_high=latency_high,
        redundancy=mean_redundancy(bench, scores, config),
        **bench.costs.costs(student, merged, bench.latency_inputs()),
        seconds=time.perf_counter() - begin,
        device=str(device_of(student)),
    )


def set_threads(jobs: int) -> None:
    """Share the cores among the workers of one search; timings still use what a worker has."""
    if jobs > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
