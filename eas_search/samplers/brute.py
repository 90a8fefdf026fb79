"""Every configuration once, for spaces that a budget can finish."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from eas_search.samplers.base import Proposer
from eas_search.skip_config import SkipConfig


class BruteSampler(Proposer):
    """In the order of `SearchSpace.every`, whatever was tried before left out."""

    def propose(self, others: Sequence[FrozenTrial], rng: np.random.Generator) -> tuple[SkipConfig, str]:
        """See `Proposer`; the last configuration again when all are known."""
        seen, config = self.known(others), self.space.config(())
        for config in self.space.every():
            if config not in seen:
                break
        return config, "brute"
