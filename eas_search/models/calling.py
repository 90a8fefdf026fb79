"""How to call a model whose forward may or may not know an option, whatever it is wrapped in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ANYTHING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unwrapped(model: Any) -> Any:
    """The model that a wrapper hands its arguments to; `model` itself where it is none.

    `torch.compile`, PEFT and data parallelism put a model behind a forward that names nothing and takes everything, and
    what the model knows is then asked of the module inside.
    """
    while True:
        inside = list(model.children())
        if hasattr(model, "get_base_model"):  # PEFT's: some have named arguments, or prompts beside the model
            model = model.get_base_model()
        elif len(inside) == 1 and all(p.kind in _ANYTHING for p in _parameters(model).values()):
            model = inside[0]
        else:
            return model


def without_cache(model: Any) -> dict[str, bool]:
    """Arguments that keep a forward pass from building a KV cache: `use_cache=False` where the model knows it.

    A multimodal model takes it among its further keyword arguments and hands it to its text tower, whose configuration
    has it; an encoder such as ViT has no such thing, and its forward may refuse it.
    """
    model = unwrapped(model)
    parameters = _parameters(model)
    if "use_cache" in parameters:
        return {"use_cache": False}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if takes_more and hasattr(text, "use_cache") else {}


def last_logits(model: Any) -> dict[str, int]:
    """Arguments with which a forward pass computes the last position's logits alone, where the model knows them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _parameters(unwrapped(model)) else {}


def step_positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Position of a token on a KV cache, as an argument; nothing where the model finds it itself.

    Qwen-VL models count an image as fewer positions than tokens and keep the difference of their prefill as
    `rope_deltas`. Given one token and the mask of all, their forward pass would give positions to all.

    Args:
        model: after its prefill.
        mask: padding mask [B, n] of all tokens, of which the last one is new.
    """
    model = unwrapped(model)
    deltas = getattr(getattr(model, "base_model", model), "rope_deltas", None)
    if deltas is None:
        return {}
    return {"position_ids": (mask.sum(dim=1, keepdim=True) - 1 + deltas.to(mask.device)).expand(3, -1, -1)}


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
