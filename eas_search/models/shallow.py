"""A model of the real widths with few layers and random weights, made from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import UnsupportedModelError
from eas_search.models.twin import quiet, sub_configs


def period(model: nn.Module, blocks: Sequence[str], limit: int = 8) -> int:
    """The smallest number of layers, at least two, after which the blocks repeat themselves.

    Args:
        model: on whatever device.
        blocks: paths of the blocks of one stack.
        limit: largest number to accept.

    Raises:
        UnsupportedModelError: they do not repeat within the limit.
    """
    kinds = [_kind(model.get_submodule(path)) for path in blocks]
    for count in range(min(2, len(kinds)), min(limit, len(kinds)) + 1):
        if all(kind == kinds[i % count] for i, kind in enumerate(kinds)):
            return count
    raise UnsupportedModelError(f"its layers do not repeat within {limit}")


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks cost the same: their parts and sizes, and how far they see."""
    parts = tuple((name, type(part)) for name, part in block.named_modules())
    sizes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    windows = tuple(getattr(part, "sliding_window", None) for part in block.modules())
    return parts, sizes, windows, getattr(block, "layer_type", None), getattr(block, "attention_type", None)


def shallow_model(model: nn.Module, layers: int, depth: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of the class of `model` with `layers` of its main tower's `depth` layers and one of every other tower.

    Raises:
        UnsupportedModelError: its configuration does not say how many layers it has.
    """
    config: Any = copy.deepcopy(model.config)
    main = config.get_text_config(decoder=True)
    if getattr(main, "num_hidden_layers", None) != depth:
        raise UnsupportedModelError(f"num_hidden_layers of its configuration is not its number of layers, {depth}")
    for part in sub_configs(config):
        if type(getattr(part, "num_hidden_layers", None)) is int:
            _cut(part, layers if part is main else 1)
    kind: Any = type(model)
    with quiet(), torch.random.fork_rng(), device:
        torch.manual_seed(0)
        made: nn.Module = kind._from_config(config, dtype=dtype)
    return made.to(device).eval().requires_grad_(False)


def _cut(config: Any, layers: int) -> None:
    """Fewer layers; whatever the configuration lists per layer is cut to the same length."""
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and name != "architectures":
            setattr(config, name, type(value)(value[:layers]))
    config.num_hidden_layers = layers
