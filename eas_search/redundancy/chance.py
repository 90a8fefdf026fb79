"""Chance: the floor that every metric must leave behind."""

from __future__ import annotations

import torch

from eas_search.redundancy.passes import Passes


def random_scores(passes: Passes, seed: int = 0) -> list[float]:
    """A random permutation of 0, 1/n, …, (n−1)/n from `seed`."""
    n = len(passes.supernet.sites)
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) / n).tolist()
