"""Names that a user may choose from, in one place for settings, flags and code."""

from __future__ import annotations

from typing import Literal, get_args

Sampler = Literal["eas", "bandit", "tpe", "gp", "nsga2", "random", "brute"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

# Metrics that a search can rank its sites by; `bandit` watches the supernet's training, the others look once.
OneShot = Literal["leave_one_out", "kl", "similarity", "block_influence", "taylor", "last_k", "random"]
ONE_SHOT: tuple[OneShot, ...] = get_args(OneShot)
Ranking = Literal["bandit", OneShot]

# What a search optimises: accuracy is maximised, every cost is minimised.
Objective = Literal["accuracy", "latency", "kv_bytes", "parameters", "flops"]
COSTS: tuple[Objective, ...] = get_args(Objective)[1:]
LatencySource = Literal["predicted", "measured"]
MixedPrecision = Literal["auto", "no", "bf16"]  # as accelerate calls them
