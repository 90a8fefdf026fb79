"""Weights in half precision as float32, while numbers decide what a module computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """While active, parameters and buffers of `module` and its parts that are in half precision are float32.

    Roundings to eight bits would hide what tells one form from another: a residual that is scaled, a gain that is
    stored as gain - 1. The module itself takes part, not a copy, so that its hooks run and nothing else that it refers
    to is copied; afterwards it has the same tensors as before. It needs memory for the float32 values of one module.
    Where a tensor is of a class of its own, as quantised ones are, all stay as they are.
    """
    tables: list[dict[str, Any]] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    half = [
        (table, name, tensor)
        for table in tables
        for name, tensor in table.items()
        if tensor is not None and tensor.dtype in _HALF
    ]
    if any(type(tensor) not in (Tensor, nn.Parameter) for _, _, tensor in half):
        half = []
    try:
        for table, name, tensor in half:
            exact = tensor.detach().float()
            table[name] = nn.Parameter(exact, requires_grad=False) if isinstance(tensor, nn.Parameter) else exact
        yield
    finally:
        for table, name, tensor in half:
            table[name] = tensor
