"""One trial: a skip configuration → (accuracy, latency) and what is recorded with them.

`evaluate` is a pure function of (workbench, supernet, configuration): the seed of its fine-tuning comes from the
study's seed and the configuration, so the same configuration gives the same accuracy in whatever order and process.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from eas_search.latency import measure_latency
from eas_search.measures import kv_bytes_per_token, parameter_count, prefill_flops
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune, sample_scores
from eas_search.workbench import Workbench


@dataclass(frozen=True)
class TrialResult:
    """Figures of one trial.

    Attributes:
        accuracy: mean score of the validation samples by the task's metric, 0 to 1.
        latency: prefill time of the merged model relative to the original model in the same run.
        latency_low, latency_high: 95 % interval of that ratio.
        redundancy: mean redundancy score of the skipped sites (0 when nothing is skipped).
        kv_bytes: KV-cache bytes per token and sample, measured.
        parameters: of the merged model.
        flops: of one prefill of the timed batch.
        seconds: wall-clock of the trial.
        device: where it ran.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def trial_seed(seed: int, config: SkipConfig) -> int:
    """The seed of a configuration's fine-tuning: the same wherever and whenever it is evaluated."""
    return zlib.crc32(f"{seed}:{config.model_dump_json()}".encode())


def make_student(bench: Workbench, supernet: Supernet, config: SkipConfig, training: FineTuneConfig) -> nn.Module:
    """The fine-tuned student of a configuration: inherits from the supernet, then trains its own adapters."""
    student = apply_skips(bench.model, config)
    supernet.inherit(student)
    fine_tune(student, bench.splits["train"], training, trial_seed(bench.settings.seed, config), guard=bench.guard)
    return student.eval()


def mean_redundancy(bench: Workbench, scores: Sequence[float], config: SkipConfig) -> float:
    """Mean score of the skipped sites; `scores` are in the order of the searchable sites."""
    skipped = [score for site, score in zip(bench.sites, scores, strict=True) if site.index in set(config.skip)]
    return sum(skipped) / len(skipped) if skipped else 0.0


def evaluate(bench: Workbench, supernet: Supernet, scores: Sequence[float], config: SkipConfig) -> TrialResult:
    """Inherit → fine-tune → validation accuracy → merge → latency against the original model.

    Raises:
        EasSearchError: the configuration does not fit the model.
    """
    begin = time.perf_counter()
    student = make_student(bench, supernet, config, bench.settings.trial)
    scores_of_samples = sample_scores(student, bench.splits["validation"], guard=bench.guard)
    merged, inputs = merge(student).eval(), bench.latency_inputs()
    with bench.quiet.exclusive():
        report = measure_latency(merged, inputs, baseline=bench.model, config=bench.settings.trial_latency)
    ratio = report.prefill.ratio
    return TrialResult(
        accuracy=scores_of_samples.double().mean().item(),
        latency=ratio.estimate,
        latency_low=ratio.low,
        latency_high=ratio.high,
        redundancy=mean_redundancy(bench, scores, config),
        kv_bytes=kv_bytes_per_token(merged, inputs),
        parameters=parameter_count(merged),
        flops=prefill_flops(merged, inputs),
        seconds=time.perf_counter() - begin,
        device=str(next(merged.parameters()).device),
    )


def set_threads(jobs: int) -> None:
    """Share the cores among the workers of one search; timings still use what a worker has."""
    if jobs > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
