"""Where a model's weights go and in which form: device, precision, several devices, four bits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.models.options import LoadOptions

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def placement_arguments(options: LoadOptions, unquantised: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained`.

    Args:
        options: as the user gave them.
        unquantised: names of modules that stay as they are because they are trained; None leaves it to the library.

    Raises:
        ConfigError: a device map that is none, or four bits where they cannot be had.
    """
    dtype = getattr(torch, options.dtype)
    arguments: dict[str, Any] = {"dtype": dtype}
    if options.device_map is not None:
        arguments["device_map"] = parse_device_map(options.device_map)
    if options.quantization is not None:
        check_four_bit()
        import transformers

        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=None if unquantised is None else list(unquantised),
        )
        arguments.setdefault("device_map", {"": str(resolve_device(options.device))})
    return arguments


def check_placement(options: LoadOptions) -> None:
    """Say what is wrong with the options before anything is loaded; raises `ConfigError`."""
    placement_arguments(options)
    resolve_device(options.device)


def parse_device_map(text: str) -> str | dict[str, Any]:
    """A strategy of accelerate, or the JSON object that says where each module goes.

    Raises:
        ConfigError: neither.
    """
    if text in STRATEGIES:
        return text
    try:
        places = json.loads(text)
    except json.JSONDecodeError:
        places = None
    if not isinstance(places, dict) or not all(type(place) in (int, str) for place in places.values()):
        raise ConfigError(
            f"device_map is {text!r}; expected one of {', '.join(STRATEGIES)}, or a JSON object from module names to "
            'devices, e.g. \'{"model.embed_tokens": 0, "model.layers": 1, "": 0}\''
        )
    return places


def check_four_bit() -> None:
    """Say what is missing for quantization to four bits.

    Raises:
        ConfigError: bitsandbytes or a CUDA device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization '4bit' needs bitsandbytes, which is not installed; expected the extra '4bit': "
            "pip install 'eas-search[4bit]', or leave --quantization out"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "quantization '4bit' needs a CUDA device and there is none here; leave --quantization out, or halve the "
            "memory with --dtype bfloat16"
        )


def settle(model: Any, name: str, options: LoadOptions) -> nn.Module:
    """The loaded model on its device, in eval mode, with activation checkpointing where asked for.

    Raises:
        ConfigError: accelerate put weights on the CPU or the disk because the devices are too small.
        UnsupportedModelError: the model cannot recompute activations.
    """
    if options.device_map is None and options.quantization is None:
        model.to(resolve_device(options.device))
    elif away := [key for key, tensor in model.named_parameters() if tensor.is_meta]:
        raise ConfigError(
            f"model {name!r} does not fit the devices: {len(away)} weights would stay outside, e.g. {away[0]!r}; "
            "expected all of them on devices: try --dtype bfloat16, --quantization 4bit, or more devices"
        )
    if options.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot recompute its activations; leave --gradient-checkpointing out"
            ) from error
    return model.eval()


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
