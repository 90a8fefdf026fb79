"""The EAS bandit on a supernet: the candidates of an update are skip sets, judged by the loss on one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from eas_search.bandit import BanditConfig, EasBandit
from eas_search.exceptions import ConfigError
from eas_search.redundancy.passes import Passes
from eas_search.supernet import Supernet
from eas_search.training import mean_loss


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


def bandit_scores(passes: Passes, config: BanditConfig | None = None, updates: int = 60, seed: int = 0) -> list[float]:
    """Scores of the supernet's sites after `updates` updates on the batches in turn, half of the sites skipped.

    Without a training beside it there is no warm-up; a variant that ramps up its sizes does so in that share of the
    updates.
    """
    supernet, batches = passes.supernet, passes.batches
    bandit, generator = EasBandit(len(supernet.sites), config), torch.Generator().manual_seed(seed)
    half = max(1, len(supernet.sites) // 2)
    if not bandit.can_draw(half) or not bandit.can_draw(1):
        need = bandit.config.candidates
        raise ConfigError(f"the bandit needs {need} sites or more, got {len(supernet.sites)}; use 'leave_one_out'")
    for step in range(updates):
        size = bandit.config.size_at(step / updates, half)
        bandit_step(bandit, supernet, batches[step % len(batches)], size, generator)
    supernet.set_skips(())
    return bandit.scores.tolist()
