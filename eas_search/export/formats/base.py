"""What an export format is: a plan for a configuration, files, and a way to load them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from eas_search.export.forms import Form, Inputs

Kind = Literal["exact", "approximate", "impossible"]


@dataclass(frozen=True)
class Verdict:
    """Whether a student can be written in a format, and why (not)."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Writing:
    """What a format may need while it writes.

    Attributes:
        student: unmerged.
        merged: the same, merged.
        folder: where to.
        prompts: a small batch, for formats that trace the model.
        base_name: how the base model is called, if that is known.
    """

    student: nn.Module
    merged: nn.Module
    folder: Path
    prompts: Mapping[str, Tensor]
    base_name: str | None = None


class Format(ABC):
    """One export format.

    Attributes:
        name: as on the command line.
        summary: for whom it is, one line.
        usage: Python that loads it, for the card.
        library: what loads it, for the card.
        generates: whether what is loaded generates and keeps a KV cache.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    usage: ClassVar[str]
    library: ClassVar[str] = "eas_search"
    generates: ClassVar[bool] = True

    @abstractmethod
    def plan(self, student: Any) -> Verdict:
        """Whether this student fits; an unmerged one, which may be on the meta device."""

    @abstractmethod
    def write(self, job: Writing) -> dict[str, Any]:
        """Write the files; returns what `eas_config.json` should say beside the usual."""

    @abstractmethod
    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """What was written, to be called with the model's inputs; the manifest has been checked."""

    def cannot_be_asked(self, content: Mapping[str, Any], form: Form, inputs: Inputs) -> str | None:
        """Why what is loaded cannot answer in a form; None when it can."""
        return None if self.generates or form.cache == "off" else "prefill only: no KV cache"
