"""The default: variations of the current front, chosen by what they promise to add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from eas_search.samplers.base import Proposer
from eas_search.samplers.improvement import Front
from eas_search.samplers.surrogate import Encoder, Surrogate, Variances, likeliest, logit, ranks
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig

MOST_TRIALS, MOST_FITTED = 300, 128  # trials that the surrogate is fitted to, and that choose its variances
Rankings = Sequence[float] | Mapping[str, Sequence[float]]
POOL = 300  # variations among which the most promising is taken


def by_metric(redundancy: Rankings) -> dict[str, Sequence[float]]:
    """Scores by metric; those of a single one have no name."""
    return dict(redundancy) if isinstance(redundancy, Mapping) else {"": redundancy}


class FrontSampler(Proposer):
    """Swaps, grows, shrinks or re-dresses configurations of the current front, and draws some new ones.

    A few hundred such variations are made; a surrogate fitted to the trials so far says by how much each is expected to
    enlarge the front's hypervolume, and the best one is proposed. The front is that of the surrogate, too: a trial that
    was merely lucky gets no children. How many sites are skipped, and how many of them with no attention behind,
    stands for the latency.

    Args:
        space: the search space.
        redundancy: score of every site of the space, higher is more redundant; by metric where there are several.
            Which sites are added and removed first follows the mean rank; the surrogate learns which metric to believe.
        seed: together with the number of proposals so far it determines a proposal.
    """

    moves = ("swap", "grow", "shrink", "dress", "draw")
    odds = (0.35, 0.2, 0.15, 0.2, 0.1)

    def __init__(self, space: SearchSpace, redundancy: Rankings, seed: int) -> None:
        super().__init__(space, seed)
        scores = list(by_metric(redundancy).values())
        self.encoder = Encoder(space, scores)
        # Ranks, not values: the scores' unit depends on the metric.
        mean_rank = np.mean([ranks(np.asarray(one, dtype=float)) for one in scores], axis=0)
        self.pull = np.exp(2.0 * (1.0 - ranks(-mean_rank)))
        self.variances: dict[tuple[int, ...], Variances] = {}
        self.threads = ThreadpoolController()

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """The most promising of many variations, and the move that led to it."""
        # Matrices of a few hundred rows: with several threads most of the time goes into waiting for each other.
        with self.threads.limit(limits=1, user_api="blas"):
            return self._propose(others, rng)

    def _propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        done = [trial for trial in others if trial.state == TrialState.COMPLETE]
        if len(done) < 2:
            return self._draw(rng), "draw"
        waiting = [self.config_of(trial) for trial in others if trial.params and not trial.state.is_finished()]
        surrogate, front = self._learn(self._best(done), waiting, self._variances(done))
        pool = self._pool(front.members, self.known(others), rng)
        if not pool:
            return self._draw(rng), "draw"
        configs = list(pool)
        best = configs[int(np.argmax(front.expected_gain(configs, *surrogate.predict(configs))))]
        return best, pool[best] if pool[best] == "draw" else f"front: {pool[best]}"

    def _best(self, done: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The trials that fall least short of the best one that skips as many sites, so that a fit never takes long."""
        if len(done) <= MOST_TRIALS:
            return done
        sizes = np.array([len(self.config_of(trial).skip) for trial in done])
        accuracies = np.array([trial.values[0] for trial in done])
        best = np.full(sizes.max() + 1, -np.inf)
        np.maximum.at(best, sizes, accuracies)
        return [done[i] for i in np.sort(np.argsort(best[sizes] - accuracies, kind="stable")[:MOST_TRIALS])]

    def _learn(
        self, done: Sequence[FrozenTrial], waiting: Sequence[SkipConfig], variances: Variances
    ) -> tuple[Surrogate, Front]:
        """The surrogate, and the front of what it makes of the trials."""
        configs, accuracies = [self.config_of(trial) for trial in done], [float(trial.values[0]) for trial in done]
        surrogate = Surrogate(self.encoder, configs, accuracies, variances)
        if waiting:
            # Parallel workers: what is under way counts as if it had come out as expected.
            expected = surrogate.accuracy(waiting).tolist()
            configs, accuracies = [*configs, *waiting], [*accuracies, *expected]
            surrogate = Surrogate(self.encoder, configs, accuracies, variances)
        return surrogate, Front(self.space, configs, surrogate.accuracy(configs))

    def _variances(self, done: Sequence[FrozenTrial]) -> Variances:
        """The likeliest ones given the first trials: seven eighths of many, so that they are chosen now and then."""
        step = 1 << max(0, len(done).bit_length() - 4)
        first = done[: min(MOST_FITTED, len(done) // step * step)]
        numbers = tuple(trial.number for trial in first)
        if numbers not in self.variances:
            features = self.encoder([self.config_of(trial) for trial in first])
            self.variances[numbers] = likeliest(features, logit(np.array([trial.values[0] for trial in first])))
        return self.variances[numbers]

    def _pool(
        self, parents: Sequence[SkipConfig], seen: set[SkipConfig], rng: np.random.Generator
    ) -> dict[SkipConfig, str]:
        """New configurations and the moves that made them; in a small space fewer than `POOL`."""
        pool: dict[SkipConfig, str] = {}
        for move in rng.choice(self.moves, p=self.odds, size=POOL).tolist():
            parent = parents[int(rng.integers(len(parents)))]
            config = self._apply(move, parent, rng)
            if config is not None and config not in seen:
                pool.setdefault(config, move)
        return pool

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
            joiner = self._pick(self.encoder.column.keys() - skip, self.pull, rng)
            if joiner is None:
                return None
            skip.add(joiner)
        return self.space.config(sorted(skip), dim, placement) if len(skip) in self.space.sizes else None

    def _pick(self, among: set[int], pull: np.ndarray, rng: np.random.Generator) -> int | None:
        if not among:
            return None
        positions = sorted(self.encoder.column[index] for index in among)
        heaps = pull[positions].cumsum()  # `rng.choice` checks more than it draws
        return self.space.sites[positions[int(heaps.searchsorted(rng.random() * heaps[-1], side="right"))]].index

    def _draw(self, rng: np.random.Generator) -> SkipConfig:
        n = len(self.space.sites)
        size = int(rng.integers(self.space.sizes.start, self.space.sizes.stop))
        chosen = rng.choice(n, size=size, replace=False, p=self.pull / self.pull.sum())
        dim = int(rng.integers(len(self.space.choices.pia_dims)))
        placement = int(rng.integers(len(self.space.choices.placements)))
        return self.space.config([self.space.sites[i].index for i in chosen], dim, placement)
