"""A recorded table as a search problem: what a trial costs nothing to look up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from eas_search.report.front import hypervolume, non_dominated
from eas_search.search_space import SearchSpace
from eas_search.settings import SpaceSettings
from eas_search.skip_config import SkipConfig


@dataclass(frozen=True)
class Table:
    """Which samples every skip set answers; a set's number has bit i for the i-th site.

    Attributes:
        name: in the study's configuration.
        record: how it was made, with the redundancy metrics' scores and what they cost.
        right: bool [2^L, samples], validation and test samples together.
    """

    name: str
    record: dict[str, Any]
    right: NDArray[np.bool_]

    @classmethod
    def load(cls, record: Path) -> Table:
        """From the record of `build.py`; the bits lie beside it."""
        content = json.loads(record.read_text(encoding="utf-8"))
        packed, counts = load_file(record.with_suffix(".safetensors")), content["samples"]
        bits = [np.unpackbits(packed[split], axis=1, count=counts[split]) for split in counts]
        return cls(content["table"]["name"], content, np.concatenate(bits, axis=1).astype(bool))

    @property
    def free(self) -> int:
        """Number of sites."""
        return int(self.record["table"]["free"])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many sites every set skips, [2^L]."""
        return np.array([number.bit_count() for number in range(len(self.right))])

    @property
    def latency(self) -> NDArray[np.float64]:
        """Of every set relative to the original model, [2^L]: linear in the number of skipped sites."""
        return 1.0 - float(self.record["table"]["latency_per_site"]) * self.sizes

    def space(self) -> SearchSpace:
        """The skip sets as a search space with one rank and one placement."""
        sites: Any = tuple(
            SimpleNamespace(index=i, name=name, tower="text")
            for i, name in enumerate(self.record["sites"][-self.free :])
        )
        dims = (int(self.record["table"]["pia_dim"]),)
        return SearchSpace(sites, SpaceSettings(pia_dims=dims, placements=("parallel",)), SkipConfig(pia_dim=dims[0]))

    def rankings(self) -> dict[str, list[float]]:
        """Scores of the sites by metric."""
        return {name: one["scores"][-self.free :] for name, one in self.record["rankings"].items()}

    def price(self, metrics: tuple[str, ...], samples: int) -> int:
        """What these metrics cost, in trials of that many validation samples, rounded up."""
        return -(-sum(self.record["rankings"][name]["samples"] for name in metrics) // samples)


@dataclass(frozen=True)
class Judge:
    """Accuracies of all sets under one division of the samples into validation and test, [2^L] each."""

    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    latency: NDArray[np.float64]

    @classmethod
    def divide(cls, table: Table, seed: int, validation: int) -> Judge:
        """Another division for every seed: the noise of validation is part of what is compared."""
        order = np.random.default_rng([7, seed]).permutation(table.right.shape[1])
        parts = (order[:validation], order[validation:])
        return cls(*(table.right[:, part].mean(axis=1) for part in parts), table.latency)

    def front(self, numbers: NDArray[np.int64], by: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """Those of these sets that are on the front by validation (or by `by`, one value per set)."""
        score = self.validation[numbers] if by is None else by
        return numbers[non_dominated(score, self.latency[numbers])]

    def hypervolume(self, front: NDArray[np.int64], floor: float = 0.0) -> float:
        """Of the test accuracies of these sets, relative to accuracy `floor` and latency 1."""
        return hypervolume(self.test[front], self.latency[front], (floor, 1.0))
