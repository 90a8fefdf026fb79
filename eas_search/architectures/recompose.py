"""What a live block computes, decided on numbers: the form of its FFN, and whether its declared parts recompose it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eas_search.architectures.calls import CallForm, call_form
from eas_search.architectures.norms import affine_form
from eas_search.architectures.patterns import ACTIVATIONS, FFN_FORMS, BlockPattern, FfnForm
from eas_search.architectures.precision import in_float32
from eas_search.exceptions import UnsupportedModelError

Residual = Literal["sequential", "parallel"]


def input_width(layer: Any) -> int:
    """Width of what a linear layer reads, also for Conv1D, which stores its weight transposed."""
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def output_width(layer: Any) -> int:
    """Width of what a linear layer writes."""
    return int(layer.out_features if hasattr(layer, "out_features") else layer.weight.shape[1])


def ffn_of(block: nn.Module, name: str) -> nn.Module:
    """The module that holds the FFN's projections."""
    return block if name == "." else block.get_submodule(name)


def find_ffn(holder: nn.Module, own: bool) -> FfnForm:
    """The declared form of an FFN.

    Args:
        holder: the FFN module, or the block itself.
        own: whether `holder` is an FFN of its own, whose output then decides.

    Raises:
        UnsupportedModelError: its parts or its function are not those of any form.
    """
    name = type(holder).__name__
    for declared in FFN_FORMS:
        layers = [getattr(holder, part, None) for part in (*declared.first, declared.out)]
        activation = next((part for part in ACTIVATIONS if callable(getattr(holder, part, None))), "")
        if not activation or not all(_is_linear(layer) for layer in layers):
            continue
        form = replace(declared, activation=activation)
        if not own or layers[0].weight.device.type == "meta":  # type: ignore[union-attr]
            return form
        with torch.no_grad(), in_float32(holder):
            v = _noise(3, input_width(layers[0]), like=layers[0].weight)  # type: ignore[union-attr]
            try:
                wanted = CallForm.unpack(holder(v))
            except TypeError as error:
                raise UnsupportedModelError(f"{name} does not run on its input alone ({error})") from error
            difference = _relative(run_ffn(holder, form, v), wanted)
        if not difference <= _tolerance(v):
            raise UnsupportedModelError(
                f"{name} is not {'down(act(gate(v)) · up(v))' if form.gated else 'fc2(act(fc1(v)))'} "
                f"(differs by {difference:.2g})"
            )
        return form
    if any(not parameter.is_floating_point() for parameter in holder.parameters()):
        raise UnsupportedModelError(f"{name} is quantised, so that folding into it would not be exact")
    raise UnsupportedModelError(f"{name} is not a plain FFN of a declared form")


def _is_linear(layer: Any) -> bool:
    """Whether a layer is a plain product with a matrix of floating-point numbers (quantised ones are not)."""
    weight = getattr(layer, "weight", None)
    floating = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    return floating and isinstance(layer, nn.Linear | Conv1D)


def run_ffn(holder: Any, form: FfnForm, v: Tensor) -> Tensor:
    """The FFN recomposed from its parts, v [..., d] → [..., d]."""
    hidden = [getattr(holder, name)(v) for name in form.first]
    if form.fused:
        hidden = list(hidden[0].chunk(2, dim=-1))
    value = getattr(holder, form.activation)(hidden[0])
    result: Tensor = getattr(holder, form.out)(value * hidden[1] if len(hidden) == 2 else value)
    return result


def recompose(block: Any, pattern: BlockPattern, width: int) -> tuple[Residual, FfnForm]:
    """Run the block with its attention replaced by a constant and see which declared form gives the same.

    Raises:
        UnsupportedModelError: none of them.
    """
    norm2 = getattr(block, pattern.norm2)
    affine_form(norm2, width), affine_form(getattr(block, pattern.norm1), width)
    form = find_ffn(ffn_of(block, pattern.ffn), own=pattern.ffn != ".")
    if next(block.parameters()).device.type == "meta":
        return ("parallel" if pattern.norm1 == pattern.norm2 else "sequential"), form
    name = type(block).__name__
    ffn = _ffn_function(block, pattern, form)
    post = [
        getattr(block, name) if name else lambda value: value for name in (pattern.post_attention, pattern.post_ffn)
    ]
    with torch.no_grad(), evaluating(block), in_float32(block):
        weight = next(block.parameters())
        x, c = _noise(1, 3, width, like=weight), _noise(1, 3, width, like=weight, seed=1)
        try:
            whole = call_form(type(block))
            extra = _required(block, whole)
            attention = block.get_submodule(pattern.attention)
            form_of = call_form(type(attention))
            with replaced_forward(attention, lambda *args, **kwargs: form_of.pack(c, args, kwargs)):
                y = CallForm.unpack(block(x, **extra))
        except Exception as error:
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            raise UnsupportedModelError(f"{name} does not run on its declared parts alone ({reason})") from error
        a = post[0](c)
        differences = {
            "sequential": _relative(x + a + post[1](ffn(norm2(x + a))), y),
            "parallel": _relative(x + a + post[1](ffn(norm2(x))), y),
        }
    best = min(differences, key=lambda key: differences[key])
    if not differences[best] <= _tolerance(x):
        raise UnsupportedModelError(
            f"{name} is not its norms, attention and FFN with plain residuals (recomposed it differs by "
            f"{differences[best]:.2g})"
        )
    if best == "sequential":
        return "sequential", form
    return "parallel", form


def _ffn_function(block: Any, pattern: BlockPattern, form: FfnForm) -> Callable[[Tensor], Tensor]:
    if pattern.ffn == ".":
        return lambda v: run_ffn(block, form, v)
    return lambda v: CallForm.unpack(getattr(block, pattern.ffn)(v))


def _required(block: nn.Module, form: CallForm) -> dict[str, Any]:
    """None for every further argument that has no default: only the attention would read it."""
    parameters = inspect.signature(block.forward).parameters
    return {
        name: None
        for name in form.parameters[1:]
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While active, `module` computes `forward`."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """While active, `module` and its parts are in eval mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _noise(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def _relative(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return (got - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())


def _tolerance(x: Tensor) -> float:
    """Some roundings of x's dtype through a norm and an FFN: 1e-5 in float32, see `in_float32`."""
    return 100 * torch.finfo(x.dtype).eps if x.dtype != torch.float64 else 1e-5
