"""What surrounds a block: its tower, its stack's tokens, whether it looks ahead, how its cache is made.

Some of it is only said in the source of the enclosing model's `forward`, and is read there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

TOKENS = ("input_ids", "inputs_embeds", "hidden_states", "embeddings", "inputs")
_MARKS = {
    "vision": re.compile(r"vision|visual|image|vit\b|Vision(?!Text)|VisionTransformer", re.ASCII),
    "audio": re.compile(r"audio|speech|Audio(?!Text)", re.ASCII),
}
_READS = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}


def takes_tokens(stack: nn.Module) -> bool:
    """Whether a stack's forward is given its tokens as [B, n] or [B, n, d] under a known name."""
    if isinstance(stack, nn.ModuleList | nn.ModuleDict):
        return False
    return bool(set(inspect.signature(stack.forward).parameters) & set(TOKENS))


def is_causal(attention: nn.Module, stack: nn.Module | None = None) -> bool:
    """Whether an attention only looks back.

    A module that takes a KV cache, in a stack that takes one, and does not say whether it belongs to a decoder is
    taken to be causal: the safe side, because pooling then never looks ahead.
    """
    if getattr(attention, "is_causal", None) is True:
        return True
    decoder = getattr(attention, "is_decoder", None)
    if isinstance(decoder, bool):
        return decoder
    caches = {"past_key_values", "past_key_value", "layer_past"}
    readers = [attention] if stack is None or isinstance(stack, nn.ModuleList) else [attention, stack]
    return all(caches & set(inspect.signature(reader.forward).parameters) for reader in readers)


def packs_rows(model: nn.Module, path: str) -> bool:
    """Whether the nearest enclosing pretrained model packs all its images into one row, by its source."""
    owner = _owner(model, path)
    return owner is not None and bool(re.search(r"cu_seqlens|block_attention_mask", _source(type(owner).forward)))


def _owner(model: nn.Module, path: str) -> Any:
    """The nearest enclosing pretrained model, or None."""
    names = path.split(".")
    chain = (model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1))
    return next((module for module in chain if getattr(module, "main_input_name", None) is not None), None)


@cache
def _source(forward: Callable[..., Any]) -> str:
    """The source of a class's `forward`; finding it again for every site of every student would be slow."""
    return inspect.getsource(inspect.unwrap(forward))


def makes_own_cache(stack: nn.Module) -> str:
    """The cache class that a stack makes for itself when it is not the library's general one, or ''."""
    made = set(re.findall(r"(\w*Cache)\(", _source(type(stack).forward)))
    return "" if not made or made & {"DynamicCache", "EncoderDecoderCache"} else sorted(made)[0]


def masked_ahead(model: nn.Module, path: str) -> bool:
    """Whether the nearest enclosing pretrained model masks what lies ahead, and nothing else, by its source."""
    if isinstance(getattr(model.get_submodule(path), "is_decoder", None), bool):
        return False
    owner = _owner(model, path)
    source = "" if owner is None else _source(type(owner).forward)
    return bool(re.search(r"create_causal_mask|is_causal=True", source)) and "bidirectional" not in source


def tower_of(model: nn.Module, path: str) -> str:
    """The tower of a block: what the nearest enclosing pretrained model reads first, or is called."""
    owner = _owner(model, path)
    if owner is None:
        return "text"
    if (reads := owner.main_input_name) in _READS:
        return _READS[reads]
    # A tower that does not say what it reads is told by its class; the whole model's class says nothing.
    called = "" if owner is model and "ForConditionalGeneration" in type(owner).__name__ else type(owner).__name__
    by_class = next((tower for tower, mark in _MARKS.items() if mark.search(called)), None)
    by_path = next((tower for tower, mark in _MARKS.items() if mark.search(path)), None)
    return by_class or by_path or "text"
