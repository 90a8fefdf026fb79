"""The default: explore around the current front, with the sites' redundancy as prior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from eas_search.samplers.base import Proposer
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig


class FrontSampler(Proposer):
    """Swap, grow, shrink or re-dress a configuration of the current front; now and then draw a new one.

    Args:
        space: the search space.
        redundancy: score of every site of the space; decides which sites are added and removed first.
        seed: together with the number of proposals so far it determines a proposal.
    """

    moves = ("swap", "grow", "shrink", "dress", "draw")
    odds = (0.35, 0.2, 0.15, 0.2, 0.1)

    def __init__(self, space: SearchSpace, redundancy: Sequence[float], seed: int) -> None:
        super().__init__(space, seed)
        ranks = np.argsort(np.argsort(np.asarray(redundancy)))
        # Ranks, not values: the scores' unit depends on the metric and its number of updates.
        self.pull = np.exp(2.0 * ranks / max(1, len(ranks) - 1))

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """The next configuration and the name of the move that led to it; new unless 200 attempts were all known."""
        seen = self.known(others)
        front = self._front(
            [(self.space.to_config(t.params), t.values[0]) for t in others if t.state == TrialState.COMPLETE]
        )
        for _ in range(200):
            move = str(rng.choice(self.moves, p=self.odds)) if front else "draw"
            parent = front[rng.integers(len(front))] if front else self.space.config(())
            config = self._apply(move, parent, rng)
            if config is not None and config not in seen:
                return config, move if move == "draw" else f"front: {move}"
        return self._draw(rng), "draw"

    @staticmethod
    def _front(known: Sequence[tuple[SkipConfig, float]]) -> list[SkipConfig]:
        """Per number of skipped sites the most accurate configuration, if nothing that skips more is as accurate."""
        best: dict[int, tuple[float, SkipConfig]] = {}
        for config, accuracy in known:
            size = len(config.skip)
            if size not in best or accuracy > best[size][0]:
                best[size] = (accuracy, config)
        front, highest = [], -np.inf
        for size in sorted(best, reverse=True):
            if best[size][0] > highest:
                highest = best[size][0]
                front.append(best[size][1])
        return front

    def _apply(self, move: str, parent: SkipConfig, rng: np.random.Generator) -> SkipConfig | None:
        if move == "draw":
            return self._draw(rng)
        skip = {int(index) for index in parent.skip}
        dims, placements = self.space.choices.pia_dims, self.space.choices.placements
        dim, placement = dims.index(parent.pia_dim), placements.index(parent.placement)
        if move == "dress":
            dim, placement = int(rng.integers(len(dims))), int(rng.integers(len(placements)))
            return self.space.config(sorted(skip), dim, placement) if skip else None
        if move in ("swap", "shrink"):
            leaver = self._pick(skip, 1 / self.pull, rng)
            if leaver is None:
                return None
            skip.discard(leaver)
        if move in ("swap", "grow"):
            joiner = self._pick({site.index for site in self.space.sites} - skip, self.pull, rng)
            if joiner is None:
                return None
            skip.add(joiner)
        return self.space.config(sorted(skip), dim, placement) if len(skip) in self.space.sizes else None

    def _pick(self, among: set[int], pull: np.ndarray, rng: np.random.Generator) -> int | None:
        positions = [i for i, site in enumerate(self.space.sites) if site.index in among]
        if not positions:
            return None
        weights = pull[positions] / pull[positions].sum()
        return self.space.sites[int(rng.choice(positions, p=weights))].index

    def _draw(self, rng: np.random.Generator) -> SkipConfig:
        n = len(self.space.sites)
        size = int(rng.integers(self.space.sizes.start, self.space.sizes.stop))
        chosen = rng.choice(n, size=size, replace=False, p=self.pull / self.pull.sum())
        dim = int(rng.integers(len(self.space.choices.pia_dims)))
        placement = int(rng.integers(len(self.space.choices.placements)))
        return self.space.config([self.space.sites[i].index for i in chosen], dim, placement)
