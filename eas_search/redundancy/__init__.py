"""Redundancy of attention sites: how dispensable each one is for a task. Higher is more redundant.

One metric per file; each takes a switchable model at work on batches, and returns one score per site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from eas_search.architectures import AttentionSite, attention_sites
from eas_search.bandit import VARIANTS, BanditConfig, EasBandit
from eas_search.exceptions import ConfigError
from eas_search.redundancy.bandit import bandit_scores
from eas_search.redundancy.block_influence import block_influence_scores
from eas_search.redundancy.chance import random_scores
from eas_search.redundancy.kl import kl_scores
from eas_search.redundancy.last_k import last_k_scores
from eas_search.redundancy.leave_one_out import leave_one_out_scores
from eas_search.redundancy.passes import Batches, Passes
from eas_search.redundancy.similarity import similarity_scores
from eas_search.redundancy.taylor import taylor_scores
from eas_search.skip_config import SkipConfig
from eas_search.supernet import Supernet

Metric = Callable[[Passes], list[float]]
ONE_SHOT_METHODS: dict[str, Metric] = {
    "leave_one_out": leave_one_out_scores,
    "kl": kl_scores,
    "similarity": similarity_scores,
    "block_influence": block_influence_scores,
    "taylor": taylor_scores,
    "last_k": last_k_scores,
    "random": random_scores,
}
METHODS: dict[str, Metric] = {
    "bandit": bandit_scores,
    **{f"bandit_{name}": partial(bandit_scores, config=config) for name, config in VARIANTS.items()},
    **ONE_SHOT_METHODS,
}

__all__ = ["METHODS", "ONE_SHOT_METHODS", "BanditConfig", "EasBandit", "Passes", "Supernet", "redundancy_scores"]


def redundancy_scores(
    model: nn.Module,
    batches: Batches,
    method: str = "bandit",
    sites: Sequence[AttentionSite] | None = None,
) -> dict[str, float]:
    """Score the attention sites of an original model on a task, with nothing standing in for a skipped attention.

    Args:
        model: an original model (not a student); untouched.
        batches: batches with labels, as in training.
        method: one of `METHODS`: `bandit` (EAS; `bandit_lavin`, `bandit_meter` and `bandit_llava` with the rules of
            these systems), `leave_one_out` (loss), `kl` (to the intact model's predictions), `similarity` (cosine of
            the sublayer's input and output), `block_influence` (of the block's), `taylor` (first order in the
            attention's output), `last_k` (depth) or `random`.
        sites: which sites; None: the text tower's, or all when there is no text tower.

    Returns:
        Score by site name; higher is more redundant. Scores of different methods have different units.

    Raises:
        ConfigError: an unknown method or no batch.
    """
    if method not in METHODS:
        raise ConfigError(f"redundancy method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if not batches:
        raise ConfigError("redundancy needs at least one batch; got none: check the task's validation split")
    if sites is None:
        every = attention_sites(model)
        sites = [site for site in every if site.tower == "text"] or every
    supernet = Supernet(model, sites, SkipConfig(pia_dim=0, pooling="none"))
    scores = METHODS[method](Passes(supernet, batches))
    return {site.name: score for site, score in zip(sites, scores, strict=True)}
