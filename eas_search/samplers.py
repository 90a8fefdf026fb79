"""Samplers: how the next skip configuration is proposed.

The default explores around the current front with the sites' redundancy as prior. It looks only at accuracies and at
numbers of skipped sites, never at measured latencies, so that the same seed gives the same proposals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig


def ranking_prefixes(space: SearchSpace, redundancy: Sequence[float], count: int) -> list[SkipConfig]:
    """At most `count` skip sets that are prefixes of the ranking, most redundant first, spread over all sizes."""
    order = sorted(range(len(space.sites)), key=lambda i: (-redundancy[i], i))
    sizes = np.unique(np.linspace(1, len(order), min(count, len(order))).round().astype(int))
    return [space.config([space.sites[i].index for i in order[:size]]) for size in sizes]


class FrontSampler(BaseSampler):
    """Swap, grow, shrink or re-dress a configuration of the current front; now and then draw a new one.

    Args:
        space: the search space.
        redundancy: score of every site of the space; decides which sites are added and removed first.
        seed: together with the number of proposals so far it determines a proposal.
    """

    moves = ("swap", "grow", "shrink", "dress", "draw")
    odds = (0.35, 0.2, 0.15, 0.2, 0.1)

    def __init__(self, space: SearchSpace, redundancy: Sequence[float], seed: int) -> None:
        self.space, self.seed = space, seed
        ranks = np.argsort(np.argsort(np.asarray(redundancy)))
        # Ranks, not values: the scores' unit depends on the metric and its number of updates.
        self.pull = np.exp(2.0 * ranks / max(1, len(ranks) - 1))
        self.origins: dict[int, str] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters are proposed together."""
        return self.space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose; `origins[trial.number]` says how."""
        # Interrupted trials do not count: each is queued again, and the next proposal must be the one that would have
        # come without the interruption. One that failed by itself does count, or it would be proposed again and again.
        others = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.number != trial.number and (t.state != TrialState.FAIL or "error" in t.user_attrs)
        ]
        rng = np.random.default_rng([self.seed, len(others)])
        config, self.origins[trial.number] = self.propose(others, rng)
        return dict(self.space.to_params(config))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: the space is fixed."""
        raise AssertionError(f"parameter {param_name!r} is not part of the search space")

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """The next configuration and the name of the move that led to it; new unless 200 attempts were all known."""
        seen = {self.space.to_config(trial.params) for trial in others if trial.params}
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
        return self.space.config(sorted(skip), dim, placement) if skip else None

    def _pick(self, among: set[int], pull: np.ndarray, rng: np.random.Generator) -> int | None:
        positions = [i for i, site in enumerate(self.space.sites) if site.index in among]
        if not positions:
            return None
        weights = pull[positions] / pull[positions].sum()
        return self.space.sites[int(rng.choice(positions, p=weights))].index

    def _draw(self, rng: np.random.Generator) -> SkipConfig:
        n = len(self.space.sites)
        size = int(rng.integers(1, n + 1))
        chosen = rng.choice(n, size=size, replace=False, p=self.pull / self.pull.sum())
        dim = int(rng.integers(len(self.space.choices.pia_dims)))
        placement = int(rng.integers(len(self.space.choices.placements)))
        return self.space.config([self.space.sites[i].index for i in chosen], dim, placement)


def make_sampler(name: str, space: SearchSpace, redundancy: Sequence[float], seed: int, done: int) -> BaseSampler:
    """The sampler called `name`.

    Args:
        name: one of `settings.SAMPLERS`.
        space: the search space.
        redundancy: scores of its sites.
        seed: of the study.
        done: trials so far. Optuna's samplers keep no state in the storage; a resumed study must not repeat its draws.
    """
    if name == "eas":
        return FrontSampler(space, redundancy, seed)
    own = int(np.random.SeedSequence([seed, done]).generate_state(1)[0])
    makers: Mapping[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=own, multivariate=True, n_startup_trials=10),
        # The default population of 50 would make a short study its own random first generation.
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=own, population_size=10),
        "gp": lambda: optuna.samplers.GPSampler(seed=own, n_startup_trials=10),
        "random": lambda: optuna.samplers.RandomSampler(seed=own),
    }
    return makers[name]()
