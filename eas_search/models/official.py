"""Reading checkpoints of published code: files that `torch.save` wrote, restricted to tensors and plain values."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from eas_search.exceptions import ConfigError


def read_torch(path: str | Path) -> Any:
    """The content of a `.pth`, `.pt` or `.ckpt` file, mapped into memory where the format allows; nothing in it is run.

    Raises:
        ConfigError: the file cannot be read, is a TorchScript archive, or holds anything but tensors and plain values.
    """
    path = Path(path)
    _refuse_torchscript(path)
    try:
        # Training scripts keep their options next to the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except Exception as error:  # a damaged file raises what its unpickler happens to raise
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"checkpoint {str(path)!r} is refused: {reason}; expected a file of tensors and plain values: save its "
            "state dict anew where you trust it"
        ) from error


def _refuse_torchscript(path: Path) -> None:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        inside = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise ConfigError(
            f"checkpoint {str(path)!r} is a TorchScript archive, which holds code; expected a state dict: save "
            "torch.jit.load(file).state_dict() where you trust it"
        )
