"""The EAS bandit on trials: the candidates of an update are trials, judged by their accuracy after fine-tuning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from optuna.trial import FrozenTrial, TrialState

from eas_search.bandit import BanditConfig, EasBandit
from eas_search.samplers.base import Proposer
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig


class EasBanditSampler(Proposer):
    """Rounds of K skip sets drawn from the policy, then the top k; all of a round skip equally many sites.

    The scores are no state: they are computed anew from the study's completed trials, whoever proposed them, so that
    they survive interruptions and are the same for parallel workers. The reward R is the accuracy of a trial where the
    supernet's bandit takes exp(−loss): both lie in [0, 1]. As every trial is fine-tuned by itself there is no warm-up.

    Args:
        space: the search space; with `fixed_k` all sets have that size, else each round draws one.
        seed: see `Proposer`.
        config: rules of the bandit; None: LaVIN's.
    """

    def __init__(self, space: SearchSpace, seed: int, config: BanditConfig | None = None) -> None:
        super().__init__(space, seed)
        self.config = config or BanditConfig()

    def bandit(self, trials: Sequence[FrozenTrial]) -> EasBandit:
        """The bandit after these trials: each K completed ones of equal size, in their order, are an update."""
        position = {site.index: i for i, site in enumerate(self.space.sites)}
        bandit = EasBandit(len(position), self.config)
        waiting: dict[int, list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        for trial in sorted(trials, key=lambda one: one.number):
            if trial.state != TrialState.COMPLETE:
                continue
            chosen = tuple(position[int(index)] for index in self.space.to_config(trial.params).skip)
            arms = waiting[len(chosen)]
            arms.append((chosen, float(trial.values[0])))
            if chosen and len(arms) == self.config.candidates:
                bandit.reward(*zip(*arms, strict=True))
                arms.clear()
        return bandit

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """See `Proposer`: a draw from the policy, or the top k at the end of a round."""
        bandit, seen, sizes = self.bandit(others), self.known(others), self.space.sizes
        number, place = divmod(len(others), self.config.candidates + 1)
        # The sets of a round differ in nothing else, so that its rewards are about the sets.
        shared = np.random.default_rng([self.seed, number, 1])
        size = int(shared.integers(sizes.start, sizes.stop))
        dim = int(shared.integers(len(self.space.choices.pia_dims)))
        placement = int(shared.integers(len(self.space.choices.placements)))

        def config(chosen: Sequence[int]) -> SkipConfig:
            return self.space.config([self.space.sites[i].index for i in chosen], dim, placement)

        best = config(bandit.top(size))
        if place == self.config.candidates and best not in seen:
            return best, "bandit: top k"
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        for _ in range(200):
            drawn = config(bandit.draw(size, generator, count=1)[0])
            if drawn not in seen:
                break
        return drawn, "bandit: draw"
