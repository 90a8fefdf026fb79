"""How to call a model whose forward may or may not know a KV cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def without_cache(model: Any) -> dict[str, bool]:
    """Arguments that keep a forward pass from building a KV cache: `use_cache=False` where the model knows it.

    A multimodal model takes it among its further keyword arguments and hands it to its text tower, whose configuration
    has it; an encoder such as ViT has no such thing, and its forward may refuse it.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.name == "use_cache" for parameter in parameters):
        return {"use_cache": False}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return {"use_cache": False} if takes_more and hasattr(text, "use_cache") else {}


def step_positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Position of a token on a KV cache, as an argument; nothing where the model finds it itself.

    Qwen-VL models count an image as fewer positions than tokens and keep the difference of their prefill as
    `rope_deltas`. Given one token and the mask of all, their forward pass would give positions to all.

    Args:
        model: after its prefill.
        mask: padding mask [B, n] of all tokens, of which the last one is new.
    """
    deltas = getattr(getattr(model, "base_model", model), "rope_deltas", None)
    if deltas is None:
        return {}
    return {"position_ids": (mask.sum(dim=1, keepdim=True) - 1 + deltas.to(mask.device)).expand(3, -1, -1)}
