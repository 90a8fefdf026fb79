"""`SearchSettings`: everything that decides what a search does, from flags or a YAML study file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from eas_search.exceptions import ConfigError
from eas_search.latency import LatencyConfig
from eas_search.models.options import LoadOptions, LoadSettings
from eas_search.names import COSTS, LatencySource, MixedPrecision, Objective, Ranking, Sampler
from eas_search.plugins import settled
from eas_search.setting_groups import (
    CacheSettings,
    SampleSettings,
    SpaceSettings,
    SpaceWishes,
    StudentWishes,
    SupernetSettings,
)
from eas_search.skip_config import SkipConfig, one_line
from eas_search.study_file import read_study_file
from eas_search.training import FineTuneConfig

# How trials are trained and judged, as a number: another one where those of an older study could not be compared.
PROTOCOL = 5
# Settings that a run may change when it resumes a study.
MAY_CHANGE = ("budget", "jobs", "time_limit", "prefer", "caches")
FINE_TUNES = ("baseline", "trial", "final")


class SearchSettings(LoadSettings):
    """A search. How the model is loaded is part of it, see `LoadSettings`.

    Attributes:
        model: `demo`, a hub id, or a folder in the Hugging Face layout.
        task: name of a registered task.
        data: its file, folder or hub id, if it needs any.
        task_options: what else the task wants to know, see `Options` of the task.
        budget: total number of completed trials.
        seed: decides samples, proposals and fine-tuning; below 2³², which every library takes.
        jobs: worker processes.
        sampler: how skip configurations are proposed.
        ranking: the redundancy metric whose prefixes are the first trials; `eas` goes on with those of the others.
        fixed_k: how many sites every configuration skips, as in the paper's protocol; None: any number.
        time_limit: seconds after which no further trial starts.
        objectives: what is optimised: accuracy, then one or more of latency, kv_bytes, parameters and flops.
        prefer: how `best.json` is chosen: `knee`, or `accuracy=F` for the fastest with at least F × the baseline's; by
            the first cost among the objectives.
        student: what all students have in common (adapter_dim, router, pooling, …); its skip set stays empty.
        baseline, trial, final: fine-tuning of the adapter-only baseline, of a trial, and of the finalists.
        candidates: how many trials race on the selection samples for the finalists' places.
        rungs: parts of the validation samples after which a trial is stopped that has surely lost; empty: never.
        finalists: how many trials of the front are re-trained and re-measured.
        final_seeds: trainings of every finalist. The first is the one that is judged and handed over; what further ones
            reach is reported beside it, and says how much of an accuracy is chance of the training.
        mixed_precision: `bf16` computes matrix products in bfloat16 where students are trained and where a score only
            serves the search; `auto` does where the processor can. What is reported, timed and exported never is.
        latency_batch: prompts per timed batch.
        latency: of a trial: `predicted` from a few measured configurations, or `measured` in every trial. Finalists are
            always measured.
        fit_latency: how thoroughly what the prediction is fitted to is measured.
        fit_passes: how often at most, on a machine on which one pass leaves the prediction unsure.
        trial_latency, final_latency: how thoroughly latency is measured.
    """

    model: str = "demo"
    task: str = "digits-vqa"
    data: Path | None = None
    task_options: dict[str, Any] = Field(default_factory=dict)
    budget: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    jobs: int = Field(default=1, ge=1)
    sampler: Sampler = "eas"
    ranking: Ranking = "bandit"
    fixed_k: int | None = Field(default=None, ge=1)
    time_limit: float | None = Field(default=None, gt=0)
    objectives: tuple[Objective, ...] = ("accuracy", "latency")
    prefer: str = "knee"
    space: SpaceWishes = SpaceWishes()
    samples: SampleSettings = SampleSettings()
    caches: CacheSettings = CacheSettings()
    student: StudentWishes = StudentWishes(adapter_dim=8)
    baseline: FineTuneConfig = FineTuneConfig(steps=120, learning_rate=1e-2)
    supernet: SupernetSettings = SupernetSettings()
    trial: FineTuneConfig = FineTuneConfig(steps=4, learning_rate=3e-3)
    final: FineTuneConfig = FineTuneConfig(steps=50, learning_rate=5e-3)
    candidates: int = Field(default=16, ge=1)
    rungs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5)
    finalists: int = Field(default=8, ge=1)
    final_seeds: int = Field(default=1, ge=1)
    mixed_precision: MixedPrecision = "auto"
    latency_batch: int = Field(default=8, ge=1)
    latency: LatencySource = "predicted"
    fit_passes: int = Field(default=4, ge=1)
    fit_latency: LatencyConfig = LatencyConfig.fast(rounds=5, blocks=1, warmup=0, time_limit_s=20.0)
    trial_latency: LatencyConfig = LatencyConfig.fast()
    final_latency: LatencyConfig = LatencyConfig()
    _trust_remote_code: bool = PrivateAttr(default=False)
    _plugins: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, /, **values: Any) -> None:
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
        _refuse_idle_bandit(self.supernet)

    @field_validator("objectives")
    @classmethod
    def _accuracy_and_costs(cls, names: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(names) < 2 or names[0] != "accuracy" or len(set(names)) < len(names):
            raise ValueError(f"expected accuracy first, then at least one of {', '.join(COSTS)}, each once")
        return names

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

    @field_validator("space", "student", mode="before")
    @classmethod
    def _wishes(cls, value: Any) -> Any:
        """A whole space or skip configuration is a wish, too."""
        return value.model_dump(exclude_unset=True) if isinstance(value, SpaceSettings | SkipConfig) else value

    @field_validator("student")
    @classmethod
    def _nothing_skipped_yet(cls, student: StudentWishes) -> StudentWishes:
        if student.skip:
            raise ValueError("student.skip must stay empty: the search fills it")
        return student

    @classmethod
    def from_file(cls, path: Path, overrides: dict[str, Any]) -> SearchSettings:
        """Settings from a YAML study file; `overrides` (flags) win over it.

        Raises:
            ConfigError: the file cannot be read, is not a YAML mapping, or holds an unusable value.
        """
        values = read_study_file(path)
        for name, given in overrides.items():
            both = isinstance(given, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **given} if both else given
        return cls(**values)

    @property
    def loading(self) -> LoadOptions:
        """How the model is loaded."""
        values = {name: getattr(self, name) for name in LoadSettings.model_fields}
        return LoadOptions(**values, trust_remote_code=self._trust_remote_code)

    def trusting_remote_code(self) -> SearchSettings:
        """These settings with leave to run code that comes with the checkpoint.

        Only a flag may ask for it: it is no field, so that no file can, and it is neither stored nor part of the
        fingerprint.
        """
        trusting = self.model_copy()
        trusting._trust_remote_code = True
        return trusting

    @property
    def plugins(self) -> tuple[str, ...]:
        """Files and modules that every process of the search imports first."""
        return self._plugins

    def with_plugins(self, plugins: Iterable[str]) -> SearchSettings:
        """These settings with plugins for the worker processes; as with `trusting_remote_code`, only a flag may ask."""
        extended = self.model_copy()
        extended._plugins = tuple(map(settled, plugins))
        return extended

    def fine_tuned_for(self, steps: int) -> SearchSettings:
        """These settings with `steps` steps in every fine-tune; 0 searches without training, from closed-form starts.

        Raises:
            ConfigError: a negative number.
        """
        if steps < 0:
            raise ConfigError(f"--fine-tune-steps is {steps}; expected 0 (no training) or more")
        update = {name: getattr(self, name).model_copy(update={"steps": steps}) for name in FINE_TUNES}
        training = self.supernet.training.model_copy(update={"steps": steps})
        supernet = self.supernet.model_copy(update={"training": training})
        _refuse_idle_bandit(supernet)
        return self.model_copy(update={**update, "supernet": supernet})

    def fingerprint(self) -> str:
        """Digest of what must not change between the runs of one study.

        The budget, the number of workers, the time limit and the final choice may.
        """
        fixed = self.model_dump(mode="json", exclude=set(MAY_CHANGE)) | {"protocol": PROTOCOL}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]

    def first_difference(self, before: Mapping[str, Any]) -> str:
        """The first setting that is another one than in `before` (JSON form) although it must not change, in words."""
        for key, value in self.model_dump(mode="json").items():
            if key not in MAY_CHANGE and before.get(key) != value:
                return f"{key}: {before.get(key)} then, {value} now"
        return "another version of eas_search"


def _refuse_idle_bandit(supernet: SupernetSettings) -> None:
    """Raises ConfigError when the bandit's own schedule leaves it without an update."""
    steps = supernet.training.steps
    if supernet.bandit_updates is None and supernet.bandit.updates_due(steps, steps) == 0:
        raise ConfigError(
            f"search settings: supernet.bandit_updates is null, but {steps} training steps leave the bandit no update "
            f"(warm-up {supernet.bandit.warmup:g}, then every {supernet.bandit.every} steps); expected more steps, or "
            "a number of updates"
        )


def _unknown_key(error: ValidationError) -> str | None:
    """One line about the first setting that does not exist, with the nearest one that does."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return None
    *groups, key = map(str, first["loc"])
    owner: Any = SearchSettings
    for name in groups:
        owner = owner.model_fields[name].annotation
    if key == "trust_remote_code":
        return (
            "search settings: trust_remote_code cannot be set in a file; expected the flag --trust-remote-code: read "
            "the code that comes with the model, then add it to the command"
        )
    known = list(owner.model_fields)
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return f"search settings: {'.'.join([*groups, key])} is not a setting; {hint}"
