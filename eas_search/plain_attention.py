"""Attention step by step instead of fused, where that is faster: short texts in bfloat16 on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eas_search.models.calling import without_cache

# Up to so many tokens. Milliseconds fused and step by step on two cores with AVX-512 BF16 (torch 2.13), 4 heads of 32:
# 100 samples of 27 tokens scored 1.24, 0.47; 32 of them forward and backward 2.9, 0.7; 16 of 256 tokens 4.9, 5.3 and
# 20, 12. In float32 the fused one is never slower.
SHORT = 256


class _Lengths(TorchFunctionMode):
    """Notes how many tokens every fused attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found += [tensor.shape[-2] for tensor in args[:2]]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def all_short(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether all attentions of a model on such a batch are fused, and so short that a CPU is faster without."""
    if next(model.parameters()).device.type != "cpu":
        return False
    with _Lengths() as lengths:
        model(**batch, **without_cache(model))
    return 0 < max(lengths.found, default=0) <= SHORT


_LOCK = threading.Lock()
_USERS: list[Callable[..., Tensor]] = []  # the fused function, once for everyone inside `step_by_step`


@contextmanager
def step_by_step() -> Iterator[None]:
    """While anyone is inside, `torch.nn.functional.scaled_dot_product_attention` computes what its definition says."""
    with _LOCK:
        _USERS.append(_USERS[0] if _USERS else F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = plain
    try:
        yield
    finally:
        with _LOCK:
            fused = _USERS.pop()
            if not _USERS:
                F.scaled_dot_product_attention = fused


def plain(  # noqa: PLR0913, PLR0917  (torch's own signature)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query keyᵀ scale + mask) value, as torch documents it; dropout is left to torch.

    A query that may see nothing sees everything here, and nothing in torch's own: no model reads what comes of it.

    Args:
        query: [..., n, d].
        key: [..., m, d].
        value: [..., m, e].
        attn_mask: bool (True: may be seen) or additive, broadcast to [..., n, m].
        dropout_p: see torch.
        is_causal: whether token i sees the first i + 1 keys only.
        scale: None: d to the power of -1/2.
        enable_gqa: whether several heads of the queries share one of the keys and values.
    """
    if dropout_p:
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        return _USERS[0](query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)
    if enable_gqa:
        share = query.shape[-3] // key.shape[-3]
        key, value = (heads.repeat_interleave(share, dim=-3) for heads in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
