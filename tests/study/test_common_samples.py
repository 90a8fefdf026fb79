"""Students of one study are trained on the same samples in the same order, whatever they skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from eas_search.objective import make_student, order_seed
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.stages import empty_supernet
from eas_search.workbench import Workbench


class Watched:
    """A split that remembers which batches were taken from it."""

    def __init__(self, split: Any) -> None:
        self.split, self.taken = split, list[list[list[int]]]()

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, *arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.split.batches(*arguments):
            self.taken.append(batch["input_ids"].tolist())
            yield batch


@pytest.fixture(scope="module")
def bench(make_settings: Callable[..., SearchSettings]) -> Workbench:
    return Workbench.open(make_settings())


def shown(bench: Workbench, config: SkipConfig, repeat: int = 0, seed: int = 0) -> list[list[list[int]]]:
    """The tokens of all batches that a student is trained on, in order."""
    watched = Watched(bench.splits["train"])
    settings = bench.settings.model_copy(update={"seed": seed})
    watching = replace(bench, settings=settings, splits={**bench.splits, "train": watched})
    make_student(watching, empty_supernet(bench), config, settings.trial, repeat)
    return watched.taken


def test_configurations_see_the_same_samples_and_repeats_and_studies_do_not(bench: Workbench) -> None:
    one, other = (bench.space.config([site.index for site in sites]) for sites in (bench.sites[:1], bench.sites[1:]))
    first = shown(bench, one)
    assert list(map(len, first)) == [bench.settings.trial.batch_size] * bench.settings.trial.steps
    assert shown(bench, other) == first
    assert shown(bench, one, repeat=1) == shown(bench, other, repeat=1) != first
    assert shown(bench, one, seed=1) != first


def test_no_repeat_of_a_study_is_another_ones() -> None:
    seeds = {order_seed(seed, repeat) for seed in range(50) for repeat in range(20)}
    assert len(seeds) == 1000
