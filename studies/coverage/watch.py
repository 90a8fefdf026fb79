"""What a forward pass runs and returns, seen from outside: knows nothing of the code under test."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Hybrid caches and rope deltas are state, not an answer.
STATE = re.compile(
    r"past_key_values|cache|rope_deltas|loss|attentions|^(encoder_|decoder_|image_)?hidden_states$|mems|^state$"
)
INPUT_SIDE = re.compile(r"^((q|k|v|qkv|query|key|value|kv|in|pos|gate)(_[ab])?(_proj|_lin)?|c_attn|to_[qkv]|[wW]qkv)$")


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any], **more: Any) -> dict[str, Tensor]:
    """Floating-point results of a forward pass by name, from the same random state each time."""
    torch.manual_seed(0)
    result: Any = model(**inputs, **more)
    found = dict(_tensors(result, ""))
    if not found:
        raise ValueError("the forward pass returns no tensor to compare")
    return found


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors of a result and of results inside it, without state."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path or "0", value.detach()
        return
    items = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, tuple | list) else ()
    for name, item in items:
        if not STATE.search(str(name)):
            yield from _tensors(item, f"{path}.{name}" if path else str(name))


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Largest difference over all results, relative to the largest entry of each where that is above 1."""
    worst = 0.0
    for name, one in first.items():
        other = second[name]
        if one.shape != other.shape:
            raise ValueError(f"{name} has shape {list(other.shape)}, expected {list(one.shape)}")
        both = torch.isfinite(one) | torch.isfinite(other)  # masked logits may be -inf in both
        if not both.any():
            continue
        finite = one[torch.isfinite(one)]
        size = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        gap = (one - other)[both].abs().max().item() / size
        worst = gap if math.isnan(gap) else max(worst, gap)
    return worst


@contextmanager
def real_double() -> Iterator[None]:
    """While active, `transformers` does not cast double tensors down to float32, as its norms do on their way."""
    to, to_float = Tensor.to, Tensor.float

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    Tensor.to = keep  # type: ignore[method-assign, assignment]
    Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else to_float(self, *a, **k)  # type: ignore
    try:
        yield
    finally:
        Tensor.to, Tensor.float = to, to_float  # type: ignore[method-assign]


def is_projection(module: nn.Module) -> bool:
    """A leaf with a weight matrix that acts on features: Linear, Conv1D of GPT-2, and their kin."""
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    return isinstance(weight, Tensor) and weight.dim() == 2 and ("Linear" in kind or kind == "Conv1D")


@contextmanager
def recording(model: nn.Module) -> Iterator[list[str]]:
    """Names of the projections and attention modules in the order in which they finish."""
    order: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if is_projection(module):
            handles.append(module.register_forward_hook(lambda *_, name=name: order.append(name)))
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def projections_run(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the projections that a forward pass runs, in order, with repetitions."""
    with recording(model) as order:
        outputs(model, inputs)
    return order


def reached(model: nn.Module, inputs: Mapping[str, Any], names: list[str]) -> dict[str, int]:
    """How often each of the named modules is called in a forward pass."""
    counts = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(model.get_submodule(name).register_forward_pre_hook(count))
    try:
        outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def output_projection(order: list[str], attention: str) -> str:
    """The projection that makes the attention's output: the last one run inside, or the next one after it.

    Some classes (BERT's) keep the output projection beside the module that attends.
    """
    inside = [
        i
        for i, name in enumerate(order)
        if name.startswith(attention + ".") and not re.search(r"bias|position", name.removeprefix(attention))
    ]
    if not inside:
        raise ValueError(f"no projection runs inside {attention}")
    last = order[inside[-1]]
    if not INPUT_SIDE.match(last.rpartition(".")[2]):
        return last
    following = next((name for name in order[inside[-1] :] if not name.startswith(attention + ".")), "")
    parent = attention.rpartition(".")[0]
    if not following.startswith(parent + "."):
        raise ValueError(f"no output projection found for {attention}")
    return following
