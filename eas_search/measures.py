"""What a model costs and how sure an accuracy is: plain figures for one model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def accuracy_interval(correct: Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """(accuracy, low, high): Wilson's interval of a proportion (Wilson, JASA 1927) for [N] bool answers."""
    count, right = len(correct), int(correct.sum())
    interval = binomtest(right, count).proportion_ci(confidence, method="wilson")
    return right / count, float(interval.low), float(interval.high)


@torch.no_grad()
def kv_bytes_per_token(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that the KV cache holds per token and sample after a prefill of `inputs`, measured; 0 without a cache."""
    output = model(**inputs, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return 0
    held = sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
    tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 1
    return round(held / tokens)


@torch.no_grad()
def prefill_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Floating-point operations of one prefill of `inputs`, as counted by torch (matrix products and attention)."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False)
    return int(counter.get_total_flops())


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
