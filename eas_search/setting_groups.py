"""Groups of settings: what a search is told about its space, its students, its samples, its caches and its supernet."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from eas_search.bandit import VARIANTS, BanditConfig
from eas_search.skip_config import Placement, Pooling, SkipConfig, Tower
from eas_search.training import FineTuneConfig


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpaceSettings(_Group):
    """The search space.

    Attributes:
        towers: whose attention sites may be skipped.
        pia_dims: ranks to choose from.
        placements: placements to choose from.
    """

    towers: tuple[Tower, ...] = ("text",)
    pia_dims: tuple[int, ...] = (4, 8, 16)
    placements: tuple[Placement, ...] = ("parallel", "ffn")

    @field_validator("towers", "pia_dims", "placements")
    @classmethod
    def _some(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and (not values or len(set(values)) != len(values)):
            raise ValueError(f"{list(values)} must name at least one choice, each once")
        return values


class SpaceWishes(SpaceSettings):
    """What a search may say about its space; None leaves it to the model.

    Attributes:
        towers: None means `fusion` where two streams look at each other, else `text`, or the only other tower of a
            model that has no text.
        placements: None means `parallel` and `ffn`, or `residual` where a block cannot have these.
    """

    towers: tuple[Tower, ...] | None = None  # type: ignore[assignment]
    placements: tuple[Placement, ...] | None = None  # type: ignore[assignment]


class StudentWishes(SkipConfig):
    """What a search may say about its students.

    Attributes:
        pooling: None means what the task needs, see `tasks.Task.pooling`.
    """

    pooling: Pooling | None = None  # type: ignore[assignment]


class SampleSettings(_Group):
    """How many samples of each split are used. None means all of them.

    Attributes:
        train: fine-tuning.
        validation: what the search looks at: trials, redundancy.
        selection: what decides between the trials that the search found good, and which finalist is exported; the part
            of the task's validation split behind the search's own, which is divided where it is too small for both.
        test: held out: reported, never used for a choice.
        calibration: of the training samples, for closed-form starts.
    """

    train: int | None = Field(default=4000, ge=1)
    validation: int | None = Field(default=400, ge=1)
    selection: int | None = Field(default=400, ge=1)
    test: int | None = Field(default=1000, ge=1)
    calibration: int = Field(default=512, ge=1)


class CacheSettings(_Group):
    """What a search may keep instead of computing it again, in bytes; 0 keeps nothing.

    Attributes:
        features: image features, where no student changes the vision side; in the memory of every worker process.
        prefixes: residual streams behind layers that recur, where samples are scored; in the same place.
        adapters: of trials, which the race before the finals goes on with; on disk, in the output folder.
    """

    features: int = Field(default=2**30, ge=0)
    prefixes: int = Field(default=2**30, ge=0)
    adapters: int = Field(default=2**31, ge=0)


class SupernetSettings(_Group):
    """Joint training of all PIAs under changing skip sets, with the EAS bandit watching.

    Attributes:
        training: steps and rates of the joint training.
        draws: the skip set of each forward pass: `bandit` (of any size, at random in the warm-up and by the bandit's
            policy behind it, as published), `random` (of any size), or `sandwich` (a third of each step's samples with
            nothing skipped, a third with all, a third at random).
        nested: whether each forward pass uses a random one of the ranks to choose from, so that every slice is
            trained; else always the largest.
        refit: calibration samples with which the PIAs of a student are fitted again, site after site, when the
            supernet is not trained (0 steps); 0: they stay as they were fitted on the intact model.
        bandit: rules of the bandit: `lavin`, `meter`, `llava`, or a mapping, see `BanditConfig`.
        bandit_updates: updates of the redundancy scores, spread evenly over the training behind the warm-up; None: one
            every `bandit.every` steps, as published.
        bandit_batch: validation samples on which the candidates of an update, and the one-shot metrics, are scored.
    """

    training: FineTuneConfig = FineTuneConfig(steps=80, learning_rate=2e-3)
    draws: Literal["bandit", "random", "sandwich"] = "bandit"
    nested: bool = False
    refit: int = Field(default=0, ge=0)
    bandit: BanditConfig = VARIANTS["lavin"]
    bandit_updates: int | None = Field(default=40, ge=1)
    bandit_batch: int = Field(default=64, ge=1)

    @field_validator("bandit", mode="before")
    @classmethod
    def _variant(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in VARIANTS:
            raise ValueError(f"{value!r} is unknown; expected one of {', '.join(VARIANTS)}, or a mapping")
        return VARIANTS[value] if isinstance(value, str) else value
