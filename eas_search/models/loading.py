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
    if (Path(location) / "eas_config.json").is_file():
        raise ConfigError(f"model {name!r} is an export of eas_search; expected an original model: name its base model")
    transformers.utils.logging.disable_progress_bar()  # the search has its own display
    config = load_config(location, name)
    cls = architecture_class(config, name)
    try:
        model, report = cls.from_pretrained(location, dtype=getattr(torch, dtype), output_loading_info=True)
        processor = load_processor(location)
    except Exception as error:  # libraries raise many kinds for damaged files
        raise _unusable(name, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model {name!r} lacks {len(missing)} of its weights, e.g. {missing[0]!r}; expected a complete checkpoint: "
            "download or save it again"
        )
    return model.to(resolve_device(device)).eval(), processor


def load_config(location: str, name: str) -> Any:
    """The configuration of the model called `name`; code that comes with it is never run.

    Raises:
        ConfigError: it cannot be found or read.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # a value of the wrong type raises what the class of the model happens to raise
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__} {reason}"
    return ConfigError(
        f"model {name!r} cannot be loaded: {reason}; expected '{DEMO}', a hub id or a complete model folder"
    )


def architecture_class(config: Any, name: str) -> Any:
    """The `transformers` class that a configuration names as its architecture.

    Raises:
        UnsupportedModelError: it names none, or something that is no model.
    """
    import transformers

    architectures = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"model {name!r} names architecture {architectures[0]!r}; expected a model class of transformers "
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
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} is not available here; expected 'cpu', 'cuda', 'mps' or 'auto'"
        ) from error
    return resolved
