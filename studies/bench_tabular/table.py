"""A recorded table as a search problem: what a trial costs nothing to look up."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from eas_search.racing import Candidates, race, round_ends, shrink, winners
from eas_search.report.front import hypervolume, non_dominated
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.skip_config import SkipConfig

SAME_PASSES = {"kl": "leave_one_out"}  # metrics that look at the forward passes of another one


@dataclass(frozen=True)
class Table:
    """Which samples every skip set answers; a set's number has bit i for the i-th site.

    Attributes:
        name: in the study's configuration.
        record: how it was made, with the redundancy metrics' scores and what they cost.
        right: bool [2^L, samples], the samples of all splits together.
        saved: share of the original model's prefill that a skipped site saves, by tower, and at `at_end` each FFN that
            is spared all tokens but the last (see `eas_search.latency.terms`).
    """

    name: str
    record: dict[str, Any]
    right: NDArray[np.bool_]
    saved: dict[str, float]

    @classmethod
    def load(cls, record: Path, saved: dict[str, dict[str, float]]) -> Table:
        """From the record of `build.py`, beside which the bits lie, and what is saved, by table."""
        content = json.loads(record.read_text(encoding="utf-8"))
        packed, counts = load_file(record.with_suffix(".safetensors")), content["samples"]
        bits = [np.unpackbits(packed[split], axis=1, count=counts[split]) for split in counts]
        name = content["table"]["name"]
        return cls(name, content, np.concatenate(bits, axis=1).astype(bool), saved[name])

    @property
    def free(self) -> int:
        """Number of sites."""
        return int(self.record["table"]["free"])

    @property
    def towers(self) -> list[str]:
        """Of every site."""
        return list(self.record.get("towers", ["text"] * len(self.record["sites"])))[-self.free :]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Of every set relative to the original model, [2^L]: linear in the numbers of skipped sites, spared FFNs."""
        bits = np.arange(len(self.right))[:, None] >> np.arange(self.free) & 1
        latency = np.ones(len(self.right))
        for tower in dict.fromkeys(self.towers):
            count = bits[:, [other == tower for other in self.towers]].sum(axis=1)
            latency = latency - count * self.saved[tower]
        (end,) = self.ends
        behind = np.cumprod(bits[:, list(end)], axis=1).sum(axis=1)  # skipped from the last one on
        spared = np.minimum(len(end), behind + 1) * bits[:, list(end)].any(axis=1)
        return latency - spared * self.saved["at_end"]

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """The text sites from the last one backwards, see `eas_search.latency.terms`."""
        return (tuple(i for i in reversed(range(self.free)) if self.towers[i] == "text"),)

    def space(self) -> SearchSpace:
        """The skip sets as a search space with one rank and one placement."""
        sites: Any = tuple(
            SimpleNamespace(index=i, name=name, tower=tower)
            for i, (name, tower) in enumerate(zip(self.record["sites"][-self.free :], self.towers, strict=True))
        )
        dims = (int(self.record["table"]["pia_dim"]),)
        choices = SpaceSettings(pia_dims=dims, placements=("parallel",))
        student = SkipConfig(pia_dim=dims[0], pooling="none")
        return SearchSpace(sites, choices, student, ends=self.ends)

    def rankings(self) -> dict[str, list[float]]:
        """Scores of the sites by metric."""
        return {name: one["scores"][-self.free :] for name, one in self.record["rankings"].items()}

    def price(self, metrics: tuple[str, ...], samples: int) -> int:
        """What these metrics cost, in trials of that many validation samples, rounded up."""
        made = {SAME_PASSES.get(name, name) for name in metrics}
        return -(-sum(self.record["rankings"][name]["samples"] for name in made) // samples)


def number_of(skip: Iterable[int | str]) -> int:
    """The row of a skip set."""
    return sum(1 << int(index) for index in skip)


def config_of(space: SearchSpace, number: int) -> SkipConfig:
    """Inverse of `number_of`, with the space's one rank and placement."""
    return space.config([i for i in range(len(space.sites)) if number >> i & 1])


@dataclass(frozen=True)
class Judge:
    """One division of the samples into validation, selection and test; accuracies of all sets, [2^L] each."""

    right: NDArray[np.bool_]
    parts: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    latency: NDArray[np.float64]
    validation: NDArray[np.float64]
    test: NDArray[np.float64]

    @classmethod
    def divide(cls, table: Table, seed: int, validation: int, selection: int) -> Judge:
        """Another division for every seed: the noise of validation is part of what is compared."""
        order = np.random.default_rng([7, seed]).permutation(table.right.shape[1])
        first, second, third = np.split(order, [validation, validation + selection])
        accuracies = (table.right[:, part].mean(axis=1) for part in (first, third))
        return cls(table.right, (first, second, third), table.latency, *accuracies)

    def front(self, numbers: NDArray[np.int64], by: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """Those of these sets that are on the front by validation (or by `by`, one value per set)."""
        score = self.validation[numbers] if by is None else by
        return numbers[non_dominated(score, self.latency[numbers])]

    def finals(self, numbers: NDArray[np.int64], space: SearchSpace, count: int, places: int) -> NDArray[np.int64]:
        """The finalists among these sets: shrinkage, shortlist and race of a search, see `eas_search.racing`."""
        validation, selection, _ = self.parts
        configs = [config_of(space, number) for number in numbers.tolist()]
        seen = np.full(len(numbers), len(validation))
        costs = self.latency[numbers][:, None]
        field = Candidates(configs, *shrink(space, configs, self.validation[numbers], seen), costs)
        short = field.most_promising(field.accuracy, field.variance, max(count, places))
        if len(short) <= places:
            return numbers[short]
        field = field.at(short)

        def score(row: int, start: int, end: int) -> NDArray[np.bool_]:
            return self.right[numbers[short[row]], selection[start:end]]

        raced = race(score, field.costs, places, round_ends(len(selection)))
        return numbers[[short[row] for row in winners(field, raced, places)]]

    def hypervolume(self, front: NDArray[np.int64], floor: float = 0.0) -> float:
        """Of the test accuracies of these sets, relative to accuracy `floor` and latency 1."""
        return hypervolume(self.test[front], self.latency[front], (floor, 1.0))
