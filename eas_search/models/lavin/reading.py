"""Reading the files of LaVIN, LLaMA and CLIP: weights by name, and the options that stand beside them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eas_search.exceptions import ConfigError
from eas_search.models.official import read_torch


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and the options of the run that wrote it where it says so."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a `.pth` or `.pt` file; training scripts put them under `model` and their options under `args`.

    Raises:
        ConfigError: see `read_torch`, or there are no tensors by name.
    """
    content = read_torch(path)
    values = content.get("model", content) if isinstance(content, Mapping) else None
    tensors = {
        str(name).removeprefix("module."): tensor
        for name, tensor in (values.items() if isinstance(values, Mapping) else ())
        if isinstance(tensor, Tensor)
    }
    if not tensors:
        raise ConfigError(f"checkpoint {str(path)!r} holds no tensors by name; expected a state dict: check the path")
    options = content.get("args")
    return Checkpoint(tensors, dict(vars(options)) if isinstance(options, argparse.Namespace) else dict(options or {}))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, such as LLaMA's `params.json`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of names and values")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"file {str(path)!r} cannot be read: {reason}; expected a JSON object") from error
    return content
