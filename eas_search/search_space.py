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
        ends: the sites at the ends of stacks, where skipping saves more, see `SiteClasses.ends`.
    """

    sites: tuple[AttentionSite, ...]
    choices: SpaceSettings
    student: SkipConfig
    fixed_k: int | None = None
    ends: tuple[tuple[int, ...], ...] = ()

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
        return len(self._dresses()) * sum(math.comb(len(self.sites), size) for size in self.sizes)

    def every(self) -> Iterator[SkipConfig]:
        """All of them, those that skip little first."""
        indexes = [site.index for site in self.sites]
        for size in self.sizes:
            for skip in combinations(indexes, size):
                for dim, placement in self._dresses():
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
        """The configuration of a trial's parameters; several parameters may give the same one, see `config`."""
        return self.config(
            [site.index for site in self.sites if params[self._bit(site)]],
            int(params["pia_dim_choice"]),
            int(params["placement_choice"]),
        )

    def config(self, skip: Sequence[int], pia_dim: int = -1, placement: int = 0) -> SkipConfig:
        """The configuration that skips these site indexes, with the choices at these positions.

        A choice without effect is set to the first one, so that equal models are equal configurations: all of them
        without a skipped site, and the placement of rank 0, plain deletion, which puts nothing anywhere.
        """
        if not skip:
            pia_dim = placement = 0
        elif self.choices.pia_dims[pia_dim] == 0:
            placement = 0
        return self.student.model_copy(
            update={
                "skip": tuple(sorted(skip)),
                "pia_dim": self.choices.pia_dims[pia_dim],
                "placement": self.choices.placements[placement],
            }
        )

    def _dresses(self) -> list[tuple[int, int]]:
        """Positions (rank, placement) of the choices that differ where a site is skipped."""
        dims, placements = self.choices.pia_dims, range(len(self.choices.placements))
        return [(i, j) for i, j in product(range(len(dims)), placements) if dims[i] or j == 0]

    @staticmethod
    def _bit(site: AttentionSite) -> str:
        return f"skip_{site.index:02d}"
