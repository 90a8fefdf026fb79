"""What all samplers share: parameters of the whole configuration at once, and nothing that was tried before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig


class Proposer(BaseSampler):
    """A sampler of skip configurations. Subclasses say in `propose` what comes next.

    A configuration of the study is never proposed again while there are others.

    Attributes:
        space: the search space.
        seed: together with the number of proposals so far it determines a proposal.
        origins: how the configuration of a trial, by number, came about.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self.seed = space, seed
        self.origins: dict[int, str] = {}
        self._values = itemgetter(*space.distributions())
        self._configs: dict[tuple[Any, ...], SkipConfig] = {}
        self._known: tuple[Sequence[FrozenTrial], set[SkipConfig]] = ([], set())

    @abstractmethod
    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """The next configuration and how it came about.

        Args:
            others: the trials of the study, also those under way.
            rng: the only source of chance.
        """

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
        wish, origin = self.ask(study, trial, others, rng)
        config = unseen(self.space, wish, self.known(others), rng)
        self.origins[trial.number] = origin if config == wish else f"{origin}, changed"
        return dict(self.space.to_params(config))

    def ask(
        self, study: Study, trial: FrozenTrial, others: Sequence[FrozenTrial], rng: np.random.Generator
    ) -> tuple[SkipConfig, str]:
        """`propose`, for samplers that need no more than the trials."""
        return self.propose(others, rng)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: the space is fixed."""
        raise AssertionError(f"parameter {param_name!r} is not part of the search space")

    def known(self, trials: Sequence[FrozenTrial]) -> set[SkipConfig]:
        """The configurations of these trials. Who proposes and who checks the proposal ask for the same ones."""
        if self._known[0] is not trials:
            self._known = (trials, {self.config_of(trial) for trial in trials if trial.params})
        return self._known[1]

    def config_of(self, trial: FrozenTrial) -> SkipConfig:
        """Its configuration; equal parameters are turned into one only once."""
        key = self._values(trial.params)
        if key not in self._configs:
            self._configs[key] = self.space.to_config(trial.params)
        return self._configs[key]


def unseen(space: SearchSpace, wish: SkipConfig, seen: Collection[SkipConfig], rng: np.random.Generator) -> SkipConfig:
    """`wish` if it is new and skips an allowed number of sites; else one near it; `wish` itself when all are seen."""
    config = _resized(space, wish, rng)
    for attempt in range(100):
        if config not in seen:
            return config
        config = _changed(space, wish, 1 + attempt // 20, rng)
    return next((one for one in space.every() if one not in seen), wish)


def _resized(space: SearchSpace, config: SkipConfig, rng: np.random.Generator) -> SkipConfig:
    """With random sites left out or added until their number is allowed."""
    skip = {int(index) for index in config.skip}
    while len(skip) > space.sizes[-1]:
        skip.discard(int(rng.choice(sorted(skip))))
    while len(skip) < space.sizes[0]:
        skip.add(int(rng.choice([site.index for site in space.sites if site.index not in skip])))
    return config if len(skip) == len(config.skip) else config.model_copy(update={"skip": tuple(sorted(skip))})


def _changed(space: SearchSpace, config: SkipConfig, count: int, rng: np.random.Generator) -> SkipConfig:
    """With `count` sites turned over, and sometimes with other choices."""
    flipped = rng.choice([site.index for site in space.sites], size=min(count, len(space.sites)), replace=False)
    skip = {int(index) for index in config.skip} ^ {int(index) for index in flipped}
    dims, placements = space.choices.pia_dims, space.choices.placements
    dim, placement = dims.index(config.pia_dim), placements.index(config.placement)
    if rng.random() < 0.5:
        dim, placement = int(rng.integers(len(dims))), int(rng.integers(len(placements)))
    return _resized(space, space.config(sorted(skip), dim, placement), rng)
