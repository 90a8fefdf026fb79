"""`SkipConfig`: one point of the search space, and the file format in which it is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from eas_search.exceptions import ConfigError

Placement = Literal["ffn", "residual", "parallel"]
Pooling = Literal["prompt", "prefix", "all", "none"]
Router = Literal["static", "routed"]
IdentityPath = Literal["noop", "paper"]
Adapter = Literal["light", "lora"]
Tower = Literal["text", "vision", "audio", "fusion"]
TOWERS: tuple[Tower, ...] = get_args(Tower)


class SkipConfig(BaseModel):
    """Which attentions are skipped and what stands in for them.

    Attributes:
        skip: attention sites whose attention is not computed, as indexes into `attention_sites(model)` or site names.
        pia_dim: rank r of the PIA at every skipped site; 0 puts nothing in the attention's place (plain deletion).
        placement: where the PIA writes: `ffn` (into the FFN's input), `residual` (into the residual stream) or
            `parallel` (both, one PIA each).
        pooling: tokens over which the pooled term and the router take their mean. `prompt`: prompt tokens, the answer
            never enters; `prefix`: the tokens up to each one; `all`: every token (encoders); `none`: no pooled term.
            Vision sites of a multimodal model always pool over `all` unless this is `none`.
        router: `static` (two constant expert weights, folds into plain weights) or `routed` (per sample).
        router_spares_first: whether the mean that a routed router reads leaves out the first token of every row, as
            LaVIN's do (its modality token, and CLIP's class token); the pooled term includes it.
        adapter_dim: rank of the adapters of every *kept* attention; 0 means none.
        adapter: what these are: `light` (light adapters in front of the attention) or `lora` (PEFT's LoRA on the query
            and value projections of the text tower).
        adapter_towers: towers whose kept attentions get adapters; None: `text`, and for light adapters any other tower
            of which some site is skipped.
        identity: what reaches the FFN beside the PIA: `noop` (norm without its affine part, so that a zero PIA equals
            deleting the attention) or `paper` (the normalised input with it, arXiv 2403.15226).
        groups: number of groups of the up-projections; divides `pia_dim`, `adapter_dim` and the model's width.
        scale: factor in front of what a PIA adds.
        temperature: temperature of the router's softmax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    skip: tuple[int | str, ...] = ()
    pia_dim: int = 32
    placement: Placement = "parallel"
    pooling: Pooling = "prompt"
    router: Router = "static"
    router_spares_first: bool = False
    adapter_dim: int = 0
    adapter: Adapter = "light"
    adapter_towers: tuple[Tower, ...] | None = None
    identity: IdentityPath = "noop"
    groups: int = 2
    scale: float = 1.0
    temperature: float = 10.0

    def __init__(self, /, **values: object) -> None:
        """Validate; an unusable value raises `ConfigError` in one line instead of pydantic's report."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(one_line(error, "skip configuration")) from error

    @field_validator("skip")
    @classmethod
    def _no_duplicates(cls, skip: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if len(set(skip)) != len(skip):
            raise ValueError(f"{list(skip)} names a site twice; name each site once")
        return tuple(sorted(skip)) if all(isinstance(site, int) for site in skip) else skip

    @model_validator(mode="after")
    def _ranks_fit_groups(self) -> SkipConfig:
        for name, value, low in (
            ("groups", self.groups, 1),
            ("pia_dim", self.pia_dim, 0),
            ("adapter_dim", self.adapter_dim, 0),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}, expected {low} or more")
            if value % self.groups:
                raise ValueError(f"{name} is {value}, expected a multiple of groups = {self.groups}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0")
        return self

    @property
    def digest(self) -> str:
        """A short name for the configuration, usable in file names."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SkipConfig:
        """Read a configuration written by `save`; raises `ConfigError` when the file is not one."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"skip configuration {str(path)!r} cannot be read: {reason}; check the path") from error
        except ValidationError as error:
            raise ConfigError(one_line(error, f"skip configuration {str(path)!r}")) from error


def one_line(error: ValidationError, what: str) -> str:
    """The first problem of a pydantic report as one line: which field, which value, what was expected."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or what
    value = "" if isinstance(first.get("input"), dict) else f" = {first.get('input')!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{what}: {where}{value}: {first['msg'].removeprefix('Value error, ')}{more}"
