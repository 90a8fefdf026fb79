"""The search space: skip configurations as parameters of an Optuna trial, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution

from eas_search.architectures import AttentionSite
from eas_search.exceptions import ConfigError
from eas_search.setting_groups import SpaceSettings
from eas_search.skip_config import SkipConfig


@dataclass(frozen=True)
class SearchSpace:
    """Which sites can be skipped, and the choices for what replaces them.

    Every parameter is an integer (a mask bit, or the position of a choice), because Gaussian processes accept no
    categories and TPE treats both alike.

    Attributes:
        sites: searchable sites.
        choices: ranks and placements.
        student: what all configurations have in common.
        fixed_k: how many sites every configuration skips; None: any number from 1.
    """

    sites: tuple[AttentionSite, ...]
    choices: SpaceSettings
    student: SkipConfig
    fixed_k: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError when there are too few sites for `fixed_k`."""
        if self.fixed_k is not None and self.fixed_k > len(self.sites):
            raise ConfigError(
                f"fixed_k is {self.fixed_k}; expected at most {len(self.sites)}, the number of searchable sites: skip "
                "fewer, or search more towers"
            )

    @property
    def sizes(self) -> range:
        """How many sites a configuration may skip."""
        return range(1, len(self.sites) + 1) if self.fixed_k is None else range(self.fixed_k, self.fixed_k + 1)

    @property
    def size(self) -> int:
        """Number of configurations that skip something."""
        choices = len(self.choices.pia_dims) * len(self.choices.placements)
        return choices * sum(math.comb(len(self.sites), size) for size in self.sizes)

    def every(self) -> Iterator[SkipConfig]:
        """All of them, those that skip little first."""
        dims, placements = range(len(self.choices.pia_dims)), range(len(self.choices.placements))
        indexes = [site.index for site in self.sites]
        for size in self.sizes:
            for skip in combinations(indexes, size):
                for dim, placement in product(dims, placements):
                    yield self.config(skip, dim, placement)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's description of the space."""
        space: dict[str, BaseDistribution] = {self._bit(site): IntDistribution(0, 1) for site in self.sites}
        space["pia_dim_choice"] = IntDistribution(0, len(self.choices.pia_dims) - 1)
        space["placement_choice"] = IntDistribution(0, len(self.choices.placements) - 1)
        return space

    def to_params(self, config: SkipConfig) -> dict[str, int]:
        """The parameters of a configuration of this space."""
        skipped = set(config.skip)
        params = {self._bit(site): int(site.index in skipped) for site in self.sites}
        params["pia_dim_choice"] = self.choices.pia_dims.index(config.pia_dim)
        params["placement_choice"] = self.choices.placements.index(config.placement)
        return params

    def to_config(self, params: Mapping[str, Any]) -> SkipConfig:
        """The configuration of a trial's parameters."""
        return self.config(
            [site.index for site in self.sites if params[self._bit(site)]],
            int(params["pia_dim_choice"]),
            int(params["placement_choice"]),
        )

    def config(self, skip: Sequence[int], pia_dim: int = -1, placement: int = 0) -> SkipConfig:
        """The configuration that skips these site indexes, with the choices at these positions.

        Without a skipped site the choices have no effect and are set to the first ones, so that equal models are equal
        configurations.
        """
        if not skip:
            pia_dim = placement = 0
        return self.student.model_copy(
            update={
                "skip": tuple(sorted(skip)),
                "pia_dim": self.choices.pia_dims[pia_dim],
                "placement": self.choices.placements[placement],
            }
        )

    @staticmethod
    def _bit(site: AttentionSite) -> str:
        return f"skip_{site.index:02d}"
