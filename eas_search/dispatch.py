"""Changing the class of a module that accelerate may have placed on a device of its own (`device_map`)."""

from __future__ import annotations

from typing import Any

from torch import nn


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Make `module` an instance of `to` in place.

    A hook of accelerate, which brings the input to the module's device, has the forward of the old class in its hands:
    it is taken off and put on again.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        module.__class__ = to
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    module.__dict__.pop("forward", None)  # the old class's, which would hide the new one's
    module.__class__ = to
    add_hook_to_module(module, hook)
