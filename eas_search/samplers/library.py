"""Optuna's own samplers, behind the same interface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from eas_search.samplers.base import Proposer
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig


class LibrarySampler(Proposer):
    """What `inner` proposes, changed where that is no configuration of the space or is known already.

    The study stores the changed parameters, so that is what `inner` learns from.
    """

    def __init__(self, space: SearchSpace, seed: int, inner: BaseSampler) -> None:
        super().__init__(space, seed)
        self.inner = inner

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """Never needed: see `ask`."""
        raise AssertionError("Optuna's samplers need the study")

    def ask(
        self, study: Study, trial: FrozenTrial, others: Sequence[FrozenTrial], rng: np.random.Generator
    ) -> tuple[SkipConfig, str]:
        """See `Proposer`."""
        every = self.space.distributions()
        # Optuna's samplers model no parameter that can have one value only.
        open_ones = {name: one for name, one in every.items() if not one.single()}
        relative = self.inner.infer_relative_search_space(study, trial) and open_ones
        params = self.inner.sample_relative(study, trial, relative)
        for name, distribution in every.items():
            if name not in params:
                params[name] = (
                    self.inner.sample_independent(study, trial, name, distribution)
                    if name in open_ones
                    else distribution.to_external_repr(0)
                )
        return self.space.to_config(params), type(self.inner).__name__

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Passed on."""
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Passed on."""
        self.inner.reseed_rng()
