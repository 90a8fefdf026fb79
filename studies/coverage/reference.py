"""What skipping must compute, done to the intact model from outside: zeroed projections and substituted outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def without(model: nn.Module, projections: list[str]) -> nn.Module:
    """A deep copy in which these output projections give exactly zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in projections:
            module = twin.get_submodule(name)
            module.weight.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    return twin


def running_mean(values: Tensor) -> Tensor:
    """Mean of the tokens up to each one, over the next to last dimension."""
    count = torch.arange(1, values.shape[-2] + 1, dtype=values.dtype).unsqueeze(-1)
    return values.cumsum(dim=-2) / count


def literal_delta(adapter: Mapping[str, Tensor], x: Tensor, pooling: str, other: Tensor | None = None) -> Tensor:
    """Δ of design §3 for the normalised tokens x [B, n, d]; scale 1, τ = 10, two groups, a router without input.

        s = mean(A x̂ + a),  z = ½ (C x̂ + c + s),  Δ = Σ_k softmax(e / τ)_k (B_k z + b_k)

    All tokens are real. The mean is over all of them, or over those up to each one (`prefix`); over the `other`
    stream's in cross-attention.
    """
    shape = x.shape
    if x.dim() > 3:  # tokens on a grid
        x = x.flatten(1, -2)
    z = x @ adapter["down.weight"].T + adapter["down.bias"]
    if pooling != "none":
        pooled = (x if other is None else other) @ adapter["pool.weight"].T + adapter["pool.bias"]
        mean = running_mean(pooled) if pooling == "prefix" and other is None else pooled.mean(dim=-2, keepdim=True)
        z = z + mean
    z = z / 2
    router = torch.exp(adapter["router_bias"] / 10)
    router = router / router.sum()
    delta = torch.zeros_like(x[..., :1])
    for k in range(2):
        weight, bias = adapter[f"ups.{k}.weight"], adapter[f"ups.{k}.bias"]
        rank, rows = z.shape[-1] // 2, weight.shape[0] // 2
        parts = [z[..., g * rank : (g + 1) * rank] @ weight[g * rows : (g + 1) * rows].T for g in range(2)]
        delta = delta + router[k] * (torch.cat(parts, dim=-1) + bias)
    return delta.reshape(shape)


def taken_apart(norm: nn.Module, width: int) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """(normalise, gain, shift) of a LayerNorm or RMSNorm by asking it: shifted inputs, then two points per channel."""
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(7))
    eps = next(e for name in ("variance_epsilon", "eps", "epsilon", "norm_eps") if (e := getattr(norm, name, None)))
    with torch.no_grad():
        centred = torch.allclose(norm(x), norm(x + 3.0), atol=1e-3)

        def normalise(v: Tensor) -> Tensor:
            v = v - v.mean(dim=-1, keepdim=True) if centred else v
            return v / torch.sqrt((v * v).mean(dim=-1, keepdim=True) + eps)

        u, y = normalise(x), norm(x)
        mean_u, mean_y = u.mean(dim=0), y.mean(dim=0)
        gain = ((u - mean_u) * (y - mean_y)).sum(dim=0) / ((u - mean_u) ** 2).sum(dim=0)
        return normalise, gain, mean_y - gain * mean_u


def _before(hook: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hook(module, args, kwargs, None)


def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]], run: Callable[[], Any]) -> Any:
    """`run()` with forward hooks on the named modules; one that returns a tensor replaces the output.

    Keys are module paths; `PATH#before` runs the hook before the module, `PATH#second` is a second hook of a module.
    """
    handles = []
    for key, hook in hooks.items():
        path, _, when = key.partition("#")
        module = model.get_submodule(path)
        if when == "before":
            before = partial(_before, hook)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()
