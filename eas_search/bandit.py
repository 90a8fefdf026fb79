"""The EAS bandit (arXiv 2403.15226, section on redundancy evaluation): skip sets are arms, the loss is the reward.

Here are its scores, its policy and the schedules of the three published systems; what the arms are judged by is
somebody else's: the supernet's loss (`redundancy.bandit`) or the accuracy of trials (`samplers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eas_search.exceptions import ConfigError


class BanditConfig(BaseModel):
    """A variant of the published search.

    Attributes:
        policy: `softmax` (p = softmax(sharpness · r), LaVIN) or `sigmoid` (p = sigmoid(r), METER and LLaVA).
        candidates: skip sets drawn per update, K.
        learning_rate: η.
        sharpness: factor inside the softmax.
        every: training steps between two updates.
        warmup: share of the training that passes before the first update.
        ramp: whether the size of the drawn skip sets grows from 1 to k during the warm-up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["softmax", "sigmoid"] = "softmax"
    candidates: int = Field(default=3, ge=2)
    learning_rate: float = Field(default=2.0, gt=0)
    sharpness: float = Field(default=10.0, gt=0)
    every: int = Field(default=10, ge=1)
    warmup: float = Field(default=0.5, ge=0, lt=1)
    ramp: bool = False

    def updates_due(self, done: int, steps: int) -> int:
        """Updates that belong before step `done` (from 0) of `steps`: one `every` steps, none in the warm-up."""
        return max(0, done - math.ceil(self.warmup * steps)) // self.every

    def size_at(self, share: float, size: int) -> int:
        """Size of the skip sets after `share` of the training, when they end with `size` sites."""
        if not self.ramp or share >= self.warmup:
            return size
        return max(1, min(size, 1 + int(share / self.warmup * size)))


# The published settings: LaVIN on ScienceQA (warm-up 5 of 10 epochs), METER on VQAv2 (1 of 10), LLaVA on SLAKE (15 of
# 40; k ramps up meanwhile).
VARIANTS: dict[str, BanditConfig] = {
    "lavin": BanditConfig(),
    "meter": BanditConfig(policy="sigmoid", candidates=3, learning_rate=1.0, every=10, warmup=0.1),
    "llava": BanditConfig(policy="sigmoid", candidates=5, learning_rate=1.0, every=3, warmup=0.375, ramp=True),
}


FLATTEN_AFTER = 100  # draws of a set that was drawn before


class EasBandit:
    """Scores r (float32, one per site, all 0 at first) and the policy that draws skip sets from them."""

    def __init__(self, sites: int, config: BanditConfig | None = None) -> None:
        self.config = config or BanditConfig()
        self.scores = torch.zeros(sites)

    def policy(self) -> Tensor:
        """p, one value per site; sums to one only for the softmax policy."""
        if self.config.policy == "softmax":
            return torch.softmax(self.config.sharpness * self.scores, dim=0)
        return torch.sigmoid(self.scores)

    def can_draw(self, size: int, count: int | None = None) -> bool:
        """Whether there are `count` (default K) distinct skip sets of `size` sites."""
        n = len(self.scores)
        return 1 <= size <= n and math.comb(n, size) >= (self.config.candidates if count is None else count)

    def draw(self, size: int, generator: torch.Generator, count: int | None = None) -> list[tuple[int, ...]]:
        """`count` distinct skip sets (default K) of `size` sites each, without replacement from the policy.

        Raises:
            ConfigError: there are not that many distinct sets.
        """
        count = self.config.candidates if count is None else count
        if not self.can_draw(size, count):
            raise ConfigError(
                f"{count} distinct skip sets of {size} of {len(self.scores)} sites do not exist; choose another size"
            )
        sets: list[tuple[int, ...]] = []
        weights, known = self.policy().clamp_min(torch.finfo(torch.float32).tiny), 0
        while len(sets) < count:
            drawn = torch.multinomial(weights, size, replacement=False, generator=generator)
            candidate = tuple(sorted(drawn.tolist()))
            if candidate not in sets:
                sets.append(candidate)
                continue
            known += 1
            if known % FLATTEN_AFTER == 0:
                # A policy that is sure of itself would draw the same set for ever.
                weights = weights.sqrt()
        return sets

    def update(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """`reward` with R_j = exp(−loss_j). A loss that is not finite counts as reward 0."""
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64)).nan_to_num(nan=0.0, posinf=0.0)
        self.reward(sets, rewards.tolist())

    def reward(self, sets: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """r_i += η (R_j − R̄) p_i (1 − p_i) for every site i of every set S_j; p is that of before the update."""
        values = torch.tensor(rewards, dtype=torch.float64)
        p = self.policy()
        slope = p * (1 - p) * self.config.learning_rate
        for chosen, advantage in zip(sets, values - values.mean(), strict=True):
            index = torch.tensor(list(chosen))
            self.scores[index] += float(advantage) * slope[index]

    def top(self, size: int) -> tuple[int, ...]:
        """The `size` most redundant sites, in their order; of equals the first."""
        order = sorted(range(len(self.scores)), key=lambda i: (-float(self.scores[i]), i))
        return tuple(sorted(order[:size]))
