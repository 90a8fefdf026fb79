"""`SearchSettings`: everything that decides what a search does, from flags or a YAML study file."""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from eas_search.exceptions import ConfigError
from eas_search.latency import LatencyConfig
from eas_search.skip_config import Placement, SkipConfig, one_line
from eas_search.training import FineTuneConfig

# Settings that a run may change when it resumes a study.
MAY_CHANGE = ("budget", "jobs", "time_limit", "prefer")
SAMPLERS = ("eas", "tpe", "nsga2", "gp", "random")


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpaceSettings(_Group):
    """The search space.

    Attributes:
        towers: whose attention sites may be skipped.
        pia_dims: ranks to choose from.
        placements: placements to choose from.
    """

    towers: tuple[Literal["text", "vision"], ...] = ("text",)
    pia_dims: tuple[int, ...] = (4, 8, 16)
    placements: tuple[Placement, ...] = ("parallel", "ffn")

    @field_validator("towers", "pia_dims", "placements")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{list(values)} must name at least one choice, each once")
        return values


class SampleSettings(_Group):
    """How many samples of each split are used. None means all of them."""

    train: int | None = Field(default=4000, ge=1)
    validation: int | None = Field(default=400, ge=1)
    test: int | None = Field(default=1000, ge=1)
    calibration: int = Field(default=512, ge=1)


class SupernetSettings(_Group):
    """Joint training of all PIAs under random skip sets, with the EAS bandit watching.

    Attributes:
        training: steps and rates of the joint training.
        bandit_updates: updates of the redundancy scores, spread over the second half of the training.
        bandit_batch: validation samples on which the candidates of an update are scored.
    """

    training: FineTuneConfig = FineTuneConfig(steps=80, learning_rate=2e-3)
    bandit_updates: int = Field(default=40, ge=1)
    bandit_batch: int = Field(default=64, ge=1)


class SearchSettings(_Group):
    """A search.

    Attributes:
        model: `demo`, a hub id, or a folder in the Hugging Face layout.
        task: name of a registered task; data: its folder, if it needs one.
        budget: total number of completed trials.
        seed: decides samples, proposals and fine-tuning.
        jobs: worker processes.
        sampler: how skip configurations are proposed.
        device, dtype: where and in which precision the frozen model runs.
        time_limit: seconds after which no further trial starts.
        prefer: how `best.json` is chosen: `knee`, or `accuracy=F` for the fastest with at least F × the baseline's.
        student: what all students have in common (adapter_dim, router, pooling, …); its skip set stays empty.
        baseline, trial, final: fine-tuning of the adapter-only baseline, of a trial, and of the finalists.
        finalists: how many trials of the front are re-trained and re-measured.
        latency_batch: prompts per timed batch.
        trial_latency, final_latency: how thoroughly latency is measured.
    """

    model: str = "demo"
    task: str = "digits-vqa"
    data: Path | None = None
    budget: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0)
    jobs: int = Field(default=1, ge=1)
    sampler: Literal["eas", "tpe", "nsga2", "gp", "random"] = "eas"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    time_limit: float | None = Field(default=None, gt=0)
    prefer: str = "knee"
    space: SpaceSettings = SpaceSettings()
    samples: SampleSettings = SampleSettings()
    student: SkipConfig = SkipConfig(adapter_dim=8)
    baseline: FineTuneConfig = FineTuneConfig(steps=120, learning_rate=1e-2)
    supernet: SupernetSettings = SupernetSettings()
    trial: FineTuneConfig = FineTuneConfig(steps=8, learning_rate=3e-3)
    final: FineTuneConfig = FineTuneConfig(steps=60, learning_rate=5e-3)
    finalists: int = Field(default=12, ge=1)
    latency_batch: int = Field(default=8, ge=1)
    trial_latency: LatencyConfig = LatencyConfig.fast()
    final_latency: LatencyConfig = LatencyConfig()

    def __init__(self, **values: object) -> None:
        """Validate; an unusable value raises `ConfigError` in one line."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_unknown_key(error) or one_line(error, "search settings")) from error
        odd = [dim for dim in self.space.pia_dims if dim < 0 or dim % self.student.groups]
        if odd:
            raise ConfigError(
                f"search settings: space.pia_dims holds {odd[0]}; expected multiples of student.groups = "
                f"{self.student.groups}"
            )

    @field_validator("prefer")
    @classmethod
    def _known_preference(cls, value: str) -> str:
        name, _, number = value.partition("=")
        if value == "knee":
            return value
        try:
            usable = name == "accuracy" and 0 < float(number) <= 1
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("expected 'knee' or 'accuracy=F' with F between 0 and 1, e.g. accuracy=0.99")
        return value

    @field_validator("student")
    @classmethod
    def _nothing_skipped_yet(cls, student: SkipConfig) -> SkipConfig:
        if student.skip:
            raise ValueError("student.skip must stay empty: the search fills it")
        return student

    @classmethod
    def from_file(cls, path: Path, overrides: dict[str, Any]) -> SearchSettings:
        """Settings from a YAML study file; `overrides` (flags) win over it.

        Raises:
            ConfigError: the file cannot be read, is not a YAML mapping, or holds an unusable value.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"study file {str(path)!r} cannot be read ({reason}); check the path") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "not YAML"
            raise ConfigError(
                f"study file {str(path)!r} is malformed{where}: {problem}; expected YAML like 'budget: 50'"
            ) from error
        if content is not None and not isinstance(content, dict):
            raise ConfigError(
                f"study file {str(path)!r} holds a {type(content).__name__}; expected 'name: value' lines"
            )
        return cls(**{**{str(key): value for key, value in (content or {}).items()}, **overrides})

    def fingerprint(self) -> str:
        """Digest of what must not change between the runs of one study.

        The budget, the number of workers, the time limit and the final choice may.
        """
        fixed = self.model_dump(mode="json", exclude=set(MAY_CHANGE))
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _unknown_key(error: ValidationError) -> str | None:
    """One line about the first setting that does not exist, with the nearest one that does."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return None
    *groups, key = map(str, first["loc"])
    owner: Any = SearchSettings
    for name in groups:
        owner = owner.model_fields[name].annotation
    known = list(owner.model_fields)
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return f"search settings: {'.'.join([*groups, key])} is not a setting; {hint}"
