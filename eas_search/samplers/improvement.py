"""By how much a configuration is expected to enlarge the front of accuracy and skipped sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eas_search.latency.terms import last_sites
from eas_search.samplers.surrogate import sigmoid
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig

Array = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(8)


class Front:
    """The most accurate configurations by how much they skip.

    Sites of different towers save different amounts of time, so that the number of skipped sites is counted for every
    tower; a configuration that skips at least as many in each takes the place of another. One at the end of a stack,
    with no attention behind it, counts twice: it spares its FFN most tokens of a prompt (see `asked`), which are worth
    as much as an attention within a factor of two.

    Attributes:
        members: the front.
        levels: by numbers of skipped sites, at least (a, b, …) of the towers, the best accuracy; 0 where there is none.
    """

    def __init__(self, space: SearchSpace, configs: Sequence[SkipConfig], accuracies: Array) -> None:
        self.towers = list(dict.fromkeys(site.tower for site in space.sites))
        self.tower = {site.index: self.towers.index(site.tower) for site in space.sites}
        self.ends, most = space.ends, [*self.tower.values(), *(self.tower[i] for end in space.ends for i in end)]
        self.levels = np.zeros([1 + most.count(i) for i in range(len(self.towers))])
        owner = np.full(self.levels.shape, -1)
        for i, (load, accuracy) in enumerate(zip(self.loads(configs), accuracies, strict=True)):
            below = tuple(slice(0, count + 1) for count in load)
            better = accuracy > self.levels[below]
            self.levels[below][better] = accuracy
            owner[below][better] = i
        self.members = [configs[i] for i in np.unique(owner[owner >= 0])]

    def loads(self, configs: Sequence[SkipConfig]) -> NDArray[np.int64]:
        """How many sites of each tower are skipped, [n, towers]; those at its end twice."""
        found = np.zeros((len(configs), len(self.towers)), dtype=np.int64)
        for row, config in enumerate(configs):
            for index in (*config.skip, *last_sites(config, self.ends)):
                found[row, self.tower[int(index)]] += 1
        return found

    def expected_gain(self, configs: Sequence[SkipConfig], mean: Array, deviation: Array) -> Array:
        """Expected hypervolume that each configuration adds, [n]; the unit is accuracy times sites.

        The true accuracy is the sigmoid of a normal variable with this mean and deviation; the integral over it is a
        Gauss-Hermite sum.
        """
        accuracy = sigmoid(mean[:, None] + deviation[:, None] * NODES)  # [n, nodes]
        gains = np.zeros(len(configs))
        for row, load in enumerate(self.loads(configs)):
            # Skipping nothing saves nothing: the cell of zero sites has no area.
            levels = self.levels[tuple(slice(0, count + 1) for count in load)].ravel()[1:]
            gains[row] = WEIGHTS @ np.maximum(accuracy[row, :, None] - levels, 0.0).sum(axis=1)
        return gains / WEIGHTS.sum()
