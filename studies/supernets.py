"""Shared by the studies of supernets: their settings, their start, skip sets, and intervals over seeds and sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel
from scipy.stats import t
from torch import Tensor

from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.stages import empty_supernet
from eas_search.supernet import Supernet
from eas_search.training import fine_tune, seeded
from eas_search.warm_start import calibrate
from eas_search.workbench import Workbench

Group = TypeVar("Group", bound=BaseModel)


def changed(group: Group, changes: dict[str, Any]) -> Group:
    """Settings with some of them changed; groups of settings are changed in part."""
    own = {name: getattr(group, name) for name in changes}
    inner = {n: changed(own[n], v) if isinstance(own[n], BaseModel) else v for n, v in changes.items()}
    return group.model_copy(update=inner)


def settings_of(config: dict[str, Any], seed: int) -> SearchSettings:
    """Settings of a search on the study's model, task and samples."""
    settings = SearchSettings(model=config["model"], task=config["task"], seed=seed, samples={"test": config["test"]})
    return changed(settings, config["settings"])


def start(bench: Workbench, supernet: Supernet) -> Supernet:
    """The start of a search's supernet: the adapter-only baseline's light adapters and closed-form PIAs beside them."""
    settings = bench.settings
    with seeded(settings.seed):
        adapted = apply_skips(bench.model, bench.space.student)
    fine_tune(adapted, bench.splits["train"], settings.baseline, settings.seed, conditions=bench.conditions)
    supernet.take_light_adapters(adapted)
    samples = bench.splits["train"].subset(settings.samples.calibration)
    supernet.warm_start(calibrate(supernet.model, bench.sites, samples.batches(64), supernet.config.identity))
    return supernet


def warm_start(bench: Workbench) -> dict[str, Tensor]:
    """Adapters of a search's supernet before its joint training."""
    return start(bench, empty_supernet(bench)).adapters()


def supernet_from(bench: Workbench, adapters: dict[str, Tensor]) -> Supernet:
    """A supernet of the bench's search with these adapters."""
    supernet = empty_supernet(bench)
    supernet.load_adapters(adapters)
    return supernet


def skip_configs(bench: Workbench, sizes: list[int], count: int) -> list[SkipConfig]:
    """`count` random skip sets of every size but without the first layer; ranks and placements take turns."""
    rng, choices = np.random.default_rng(bench.settings.seed), bench.space.choices
    dims = [place for place, dim in enumerate(choices.pia_dims) if dim > 0]
    configs = []
    for position in range(count):
        sites = 1 + rng.choice(len(bench.sites) - 1, size=sizes[position % len(sizes)], replace=False)
        skip = [bench.sites[site].index for site in sites]
        dim = dims[(position // len(sizes)) % len(dims)]
        configs.append(bench.space.config(skip, dim, (position // len(sizes)) % len(choices.placements)))
    return configs


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
    """(statistic, low, high): 95 % interval over seeds, by leaving out one at a time (jackknife) and Student's t.

    A seed's skip sets are its own, so that the seeds' spread holds that of the sets, too; drawing sets again within the
    seeds that a bootstrap draws would count it twice (Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).

    Args:
        values: [seeds, sets, …], two seeds at least.
        statistic: of an array of that shape.
    """
    seeds = len(values)
    without = np.array([statistic(np.delete(values, seed, axis=0)) for seed in range(seeds)])
    error = np.sqrt((seeds - 1) / seeds * ((without - without.mean()) ** 2).sum())
    found, reach = float(statistic(values)), float(t.ppf(0.975, seeds - 1) * error)
    return found, found - reach, found + reach
