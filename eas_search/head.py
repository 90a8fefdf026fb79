"""The head of a model that must be trained with the adapters, because its checkpoint has none for the task.

`load_model` leaves the names of its parameters at `model.eas_trainable`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters to train beside the adapters."""
    return tuple(getattr(model, "eas_trainable", ()))


def own_head(student: nn.Module) -> None:
    """Give a student its own, trainable head, at least in float32 like its adapters; the original keeps its values."""
    for name in head_names(student):
        module, attribute = _place(student, name)
        values = getattr(module, attribute).detach()
        precise = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
        setattr(module, attribute, nn.Parameter(precise))
        if precise.dtype != values.dtype and not any(isinstance(hook, _Cast) for hook in _hooks(module)):
            module.register_forward_pre_hook(_Cast(precise.dtype))


def copy_head(source: nn.Module, target: nn.Module) -> None:
    """Give a student the trained head of another student of the same model."""
    with torch.no_grad():
        for name in head_names(target):
            theirs, mine = (getattr(*_place(tree, name)) for tree in (source, target))
            mine.copy_(theirs)


def settle_head(merged: nn.Module, dtype: torch.dtype) -> None:
    """Bring a trained head, frozen by now, to the precision of the rest, as an exported model has it."""
    for name in head_names(merged):
        module, attribute = _place(merged, name)
        setattr(module, attribute, nn.Parameter(getattr(module, attribute).detach().to(dtype), requires_grad=False))
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Cast):
                del module._forward_pre_hooks[key]


class _Cast:
    """Forward pre-hook: a module with float32 weights gets float32 input."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
