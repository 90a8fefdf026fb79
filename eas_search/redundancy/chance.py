"""Chance: the floor that every metric must leave behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eas_search.supernet import Supernet


def random_scores(supernet: Supernet, batches: Sequence[dict[str, Tensor]], seed: int = 0) -> list[float]:
    """A random permutation of 0, 1/n, …, (n−1)/n from `seed`."""
    n = len(supernet.sites)
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) / n).tolist()
