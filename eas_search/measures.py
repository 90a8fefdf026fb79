"""What a model costs and how sure an accuracy is: plain figures for one model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import binomtest, t
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eas_search.models.calling import last_logits, without_cache


def accuracy_interval(scores: Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of [N] sample scores from 0 to 1.

    Wilson's interval of a proportion (Wilson, JASA 1927) where answers are right or wrong (bool, or all 0 and 1), else
    Student's t interval of the mean, cut to the range of a score; one sample alone says nothing.
    """
    count = len(scores)
    if scores.dtype == torch.bool or bool(((scores == 0) | (scores == 1)).all()):
        right = int(scores.sum())
        interval = binomtest(right, count).proportion_ci(confidence, method="wilson")
        return right / count, float(interval.low), float(interval.high)
    values = scores.double()
    mean = values.mean().item()
    if count == 1:
        return mean, 0.0, 1.0
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * values.std().item() / math.sqrt(count)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


@torch.no_grad()
def kv_bytes_per_token(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that the KV cache holds per token and sample after a prefill of `inputs`, measured; 0 without a cache."""
    return per_token(sum(kv_bytes_by_slot(prefill(model, inputs))), inputs)


@torch.no_grad()
def prefill_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Floating-point operations of one prefill of `inputs`, as counted by torch (matrix products and attention)."""
    with FlopCounterMode(display=False) as counter:
        prefill(model, inputs)
    return int(counter.get_total_flops())


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def prefill(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The model's output for `inputs`, with a KV cache where it has one, and as in generation the last logits alone."""
    return model(**inputs, **dict.fromkeys(without_cache(model), True), **last_logits(model))


def kv_bytes_by_slot(output: Any) -> list[int]:
    """Bytes in every slot of the KV cache that a prefill returned; empty without a cache."""
    cache = getattr(output, "past_key_values", None)
    pairs = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", ()))
    return [sum(tensor.nbytes for tensor in pair if tensor is not None) for pair in pairs]


def per_token(held: int, inputs: Mapping[str, Tensor]) -> int:
    """`held` bytes, per token of `inputs`."""
    return round(held / (inputs["input_ids"].numel() if "input_ids" in inputs else 1))
