"""Where a search keeps what it has finished, so that it resumes behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eas_search.exceptions import StorageError


class StageFolder:
    """Where finished stages are kept, so that a search resumes behind them. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep a stage: its tensors first, then the record that says it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.safetensors.tmp"
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary)
        os.replace(temporary, self.folder / f"{name}.safetensors")
        record = self.folder / f"{name}.json.tmp"
        record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(record, self.folder / f"{name}.json")

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """A kept stage, or None when it is not complete.

        Raises:
            StorageError: the files are there but damaged.
        """
        record = self.folder / f"{name}.json"
        if not record.is_file():
            return None
        try:
            return json.loads(record.read_text(encoding="utf-8")), load_file(self.folder / f"{name}.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(
                f"stage {name!r} in {str(self.folder)!r} is damaged ({type(error).__name__}); expected what an earlier "
                f"run wrote: move {name}.json away to compute it again, the trials are kept"
            ) from error

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a stage without tensors, as it is read back; made and kept where it is missing.

        Raises:
            StorageError: see `read`.
        """
        kept = self.read(name)
        if kept is None:
            self.write(name, make(), {})
            kept = self.read(name)
            assert kept is not None, "what was just written is complete"
        return kept[0]
