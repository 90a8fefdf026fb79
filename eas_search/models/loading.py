"""Loading a pretrained model and its processor: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.models.demo import DEMO, demo_path


def model_location(name: str) -> str:
    """Where `from_pretrained` finds the model called `name`.

    Raises:
        ConfigError: `name` looks like a path but is no model folder.
    """
    if name == DEMO:
        return str(demo_path())
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder {name!r} has no config.json; expected a Hugging Face model folder")
        return name
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_local:
        raise ConfigError(
            f"model {name!r} is not a folder; expected '{DEMO}', a hub id like 'owner/name' or an existing model folder"
        )
    return name


def load_model(name: str, device: str = "auto", dtype: str = "float32") -> tuple[nn.Module, Any]:
    """(model in eval mode, processor) of `name`; code that comes with a checkpoint is never run.

    Raises:
        ConfigError: the model or its processor cannot be found or read.
        UnsupportedModelError: its class is not part of `transformers`.
    """
    import transformers

    location = model_location(name)
    transformers.utils.logging.disable_progress_bar()  # the search has its own display
    try:
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
        cls = architecture_class(config, name)
        model = cls.from_pretrained(location, dtype=getattr(torch, dtype))
        processor = load_processor(location)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"model {name!r} cannot be loaded: {reason}; expected '{DEMO}', a hub id or a complete model folder"
        ) from error
    return model.to(resolve_device(device)).eval(), processor


def architecture_class(config: Any, name: str) -> Any:
    """The `transformers` class that a configuration names as its architecture."""
    import transformers

    architectures = getattr(config, "architectures", None) or []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    if cls is None:
        raise UnsupportedModelError(
            f"model {name!r} names architecture {architectures[:1]}; expected a model class of transformers "
            f"{transformers.__version__}: set 'architectures' in its config.json"
        )
    return cls


def load_processor(location: str) -> Any:
    """The processor of a folder or hub id."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return transformers.AutoProcessor.from_pretrained(location, trust_remote_code=False)


def resolve_device(device: str) -> torch.device:
    """`auto` means the first accelerator, else the CPU.

    Raises:
        ConfigError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} is not available here; expected 'cpu', 'cuda', 'mps' or 'auto'") from error
    return resolved
