"""The EAS bandit (arXiv 2403.15226, section on redundancy evaluation): skip sets are arms, the loss is the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eas_search.exceptions import ConfigError
from eas_search.supernet import Supernet
from eas_search.training import mean_loss


@dataclass(frozen=True)
class BanditConfig:
    """A variant of the published search.

    Attributes:
        policy: `softmax` (p = softmax(sharpness · r), LaVIN) or `sigmoid` (p = sigmoid(r), METER and LLaVA).
        candidates: skip sets drawn per update, K.
        learning_rate: η.
        sharpness: factor inside the softmax.
    """

    policy: Literal["softmax", "sigmoid"] = "softmax"
    candidates: int = 3
    learning_rate: float = 2.0
    sharpness: float = 10.0


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

    def draw(self, size: int, generator: torch.Generator, count: int | None = None) -> list[tuple[int, ...]]:
        """`count` distinct skip sets (default K) of `size` sites each, without replacement from the policy.

        Raises:
            ConfigError: there are not that many distinct sets.
        """
        count = self.config.candidates if count is None else count
        n = len(self.scores)
        if not 1 <= size <= n or torch.exp(_log_choose(n, size)).round() < count:
            raise ConfigError(f"{count} distinct skip sets of {size} of {n} sites do not exist; choose another size")
        sets: list[tuple[int, ...]] = []
        while len(sets) < count:
            drawn = torch.multinomial(self.policy(), size, replacement=False, generator=generator)
            candidate = tuple(sorted(drawn.tolist()))
            if candidate not in sets:
                sets.append(candidate)
        return sets

    def update(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """r_i += η (R_j − R̄) p_i (1 − p_i) for every site i of every set S_j, with R_j = exp(−loss_j).

        p is that of before the update. A loss that is not finite counts as reward 0.
        """
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64)).nan_to_num(nan=0.0, posinf=0.0)
        p = self.policy()
        slope = p * (1 - p) * self.config.learning_rate
        for chosen, advantage in zip(sets, rewards - rewards.mean(), strict=True):
            index = torch.tensor(list(chosen))
            self.scores[index] += float(advantage) * slope[index]


def _log_choose(n: int, k: int) -> Tensor:
    return (
        torch.lgamma(torch.tensor(n + 1.0))
        - torch.lgamma(torch.tensor(k + 1.0))
        - torch.lgamma(torch.tensor(n - k + 1.0))
    )


def bandit_step(
    bandit: EasBandit, supernet: Supernet, batch: dict[str, Tensor], size: int, generator: torch.Generator
) -> None:
    """One update: draw candidates, score each on the same batch in eval mode, reward."""
    sets = bandit.draw(size, generator)
    losses = []
    for chosen in sets:
        supernet.set_skips(supernet.sites[i].index for i in chosen)
        losses.append(mean_loss(supernet.model, batch))
    bandit.update(sets, losses)


def bandit_scores(
    supernet: Supernet, batches: Sequence[dict[str, Tensor]], updates: int = 60, seed: int = 0
) -> list[float]:
    """Scores of the supernet's sites after `updates` updates on the batches in turn, half of the sites skipped."""
    bandit, generator = EasBandit(len(supernet.sites)), torch.Generator().manual_seed(seed)
    size = max(1, len(supernet.sites) // 2)
    if len(supernet.sites) < 3:
        raise ConfigError(f"the bandit needs 3 sites or more, got {len(supernet.sites)}; use 'leave_one_out'")
    for step in range(updates):
        bandit_step(bandit, supernet, batches[step % len(batches)], size, generator)
    supernet.set_skips(())
    return bandit.scores.tolist()
