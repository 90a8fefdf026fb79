"""Samplers: how the next skip configuration is proposed. One per file, all of them `Proposer`s.

None looks at measured latencies unless it is Optuna's, so that the same seed gives the same proposals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from eas_search.bandit import BanditConfig
from eas_search.exceptions import ConfigError
from eas_search.names import Sampler
from eas_search.samplers.base import Proposer
from eas_search.samplers.brute import BruteSampler
from eas_search.samplers.eas_bandit import EasBanditSampler
from eas_search.samplers.front import FrontSampler, Rankings, by_metric
from eas_search.samplers.library import LibrarySampler
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig

# What Optuna brings, from a seed.
LIBRARY: dict[Sampler, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=10),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=10),
    # The default population of 50 would make a short study its own random first generation.
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}

__all__ = [
    "LIBRARY",
    "BruteSampler",
    "EasBanditSampler",
    "FrontSampler",
    "LibrarySampler",
    "Proposer",
    "check_budget",
    "make_sampler",
    "ranking_prefixes",
]


def ranking_prefixes(space: SearchSpace, redundancy: Rankings, count: int) -> list[SkipConfig]:
    """At most `count` distinct skip sets that are prefixes of a ranking, most redundant first, spread over all sizes.

    Of several rankings the first one comes first, then the others fill up what is left. Where the number of skipped
    sites is fixed each ranking has one prefix: the top k.
    """
    allowed = space.sizes
    found: dict[SkipConfig, None] = {}
    for scores in by_metric(redundancy).values():
        order = sorted(range(len(space.sites)), key=lambda i: (-scores[i], i))
        ends = np.linspace(allowed.start, allowed.stop - 1, min(count, len(allowed)))
        for size in np.unique(ends.round().astype(int)):
            found.setdefault(space.config([space.sites[i].index for i in order[:size]]))
    return list(found)[:count]


def make_sampler(
    name: Sampler,
    space: SearchSpace,
    redundancy: Rankings,
    seed: int,
    done: int,
    bandit: BanditConfig | None = None,
) -> Proposer:
    """The sampler called `name`.

    Args:
        name: one of `names.SAMPLERS`.
        space: the search space.
        redundancy: scores of its sites, by metric where there are several.
        seed: of the study.
        done: trials so far. Optuna's samplers keep no state in the storage; a resumed study must not repeat its draws.
        bandit: rules of `bandit`; None: LaVIN's.
    """
    if name == "eas":
        return FrontSampler(space, redundancy, seed)
    if name == "bandit":
        return EasBanditSampler(space, seed, bandit)
    if name == "brute":
        return BruteSampler(space, seed)
    own = int(np.random.SeedSequence([seed, done]).generate_state(1)[0])
    return LibrarySampler(space, seed, LIBRARY[name](own))


def check_budget(name: Sampler, space: SearchSpace, budget: int) -> None:
    """Refuse an exhaustive search that the budget cannot finish.

    Raises:
        ConfigError: `brute`, and the space holds more configurations than the budget.
    """
    if name == "brute" and space.size > budget:
        raise ConfigError(
            f"sampler 'brute' would have to try all {space.size:,} configurations of {len(space.sites)} sites, but the "
            f"budget is {budget}; expected a budget that large, or a smaller space: set fixed_k, or fewer "
            "space.pia_dims and space.placements"
        )
