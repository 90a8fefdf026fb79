"""Stochastic depth on attention sublayers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def dropped_attention(layers: nn.ModuleList, highest: list[float]) -> Iterator[None]:
    """Stochastic depth on attention, per sample and without rescaling.

    The probability rises linearly with depth from 0 to `highest[0]`, which the caller may change on the way.
    """

    def hook_for(share: float) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            kept = torch.rand(len(output[0]), 1, 1) >= share * highest[0]
            return (output[0] * kept, *output[1:])

        return hook

    handles = [layer.self_attn.register_forward_hook(hook_for(i / (len(layers) - 1))) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
