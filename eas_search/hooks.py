"""Hooks on a student and on its stacks of blocks: they settle the `TokenContext` of every forward pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from eas_search.architectures.surroundings import TOKENS
from eas_search.cache import prepare_cache
from eas_search.context import TokenContext, remember_passes
from eas_search.exceptions import ConfigError
from eas_search.masks import question_mask, seen_tokens, visible_tokens


@dataclass
class NotePrompt:
    """Forward pre-hook of the whole model: takes the prompt mask from `prompt_mask` or `labels`.

    `masked` says whether the model's attention mask is about the tokens of this stack; a vision tower's patches may by
    chance be as many as the text's tokens.
    """

    context: TokenContext
    masked: bool = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note the mask; `prompt_mask` [B, n] is removed because no model of `transformers` knows it."""
        given, labels = kwargs.pop("prompt_mask", None), kwargs.get("labels")
        tokens = kwargs.get("input_ids")
        if given is None and labels is not None and labels.dim() == 2:
            # Labels of classes and of a decoder's own tokens say nothing about these tokens.
            given = question_mask(labels) if tokens is None or tokens.shape == labels.shape else None
        self.context.prompt_mask = given
        mask = kwargs.get("attention_mask")
        self.context.given_mask = mask if self.masked and isinstance(mask, Tensor) and mask.dim() == 2 else None
        return args, kwargs


@dataclass
class EnterStack:
    """Forward pre-hook of the stack: settles the mask of the pass and prepares its cache.

    `cross` is the context of the stack's cross-attentions, which pool over the encoder's tokens.
    """

    context: TokenContext
    cross: TokenContext | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Bind the call's arguments by name, so that positional calls work too."""
        signature = inspect.signature(module.forward)
        call = signature.bind(*args, **kwargs).arguments
        named = {**call.pop("kwargs", {}), **call}
        context = self.context
        tokens = next((named[name] for name in TOKENS if named.get(name) is not None), None)
        context.mask, context.shape, context.scratch, context.entered = None, None, {}, True
        if tokens is not None and tokens.dim() <= 3:
            context.shape = tuple(tokens.shape[:2])
            context.mask = self._mask(tokens, named)
        context.prompt_mask = context.given_mask = None
        if self.cross is not None:
            mask = named.get("encoder_attention_mask")
            self.cross.mask = None if mask is None else seen_tokens(mask)
            self.cross.scratch, self.cross.entered = {}, True
        if module.training:
            remember_passes(module, (context,) if self.cross is None else (context, self.cross))
        if "past_key_values" in signature.parameters and hasattr(module, "config"):
            named["past_key_values"] = self._cache(module, named)
        return (), named

    def _mask(self, tokens: Tensor, named: dict[str, Any]) -> Tensor | None:
        n = tokens.shape[1]
        context = self.context
        given = named.get("attention_mask")
        if given is None and context.given_mask is not None and context.given_mask.shape[1] == n:
            given = context.given_mask
        mask = visible_tokens(given, n, named.get("past_key_values"))
        if context.pooling != "prompt":
            return mask
        if context.prompt_mask is not None:
            prompt = context.prompt_mask.to(tokens.device).bool()
            mask = prompt if mask is None else mask & prompt
        cache = named.get("past_key_values")
        first = cache is not None and cache.get_seq_length() == 0
        if first and context.prompt_length is not None and context.prompt_length > n:
            raise ConfigError(
                f"pooling 'prompt' needs the prompt of {context.prompt_length} tokens in one piece, got {n} first; "
                "expected generation without prefill_chunk_size, or pooling 'prefix'"
            )
        if context.prompt_length is not None and context.prompt_length < n:
            prompt = torch.arange(n, device=tokens.device).expand(tokens.shape[0], -1) < context.prompt_length
            mask = prompt if mask is None else mask & prompt
        return mask

    def _cache(self, module: nn.Module, named: dict[str, Any]) -> Cache | None:
        cache, wanted = named.get("past_key_values"), named.get("use_cache")
        config: Any = module.config
        if cache is None:
            wanted = getattr(config, "use_cache", False) if wanted is None else wanted
            if not wanted or (module.training and getattr(module, "gradient_checkpointing", False)):
                return None
            cache = DynamicCache(config=config)
            if named.get("encoder_hidden_states") is not None:
                cache = EncoderDecoderCache(cache, DynamicCache(config=config))
        context = self.context
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        prepare_cache(
            own,
            context.layers,
            context.skipped,
            context.stateful,
            context.pooling != "prefix",
            context.owner,
        )
        context.cache = own
        return cache


@dataclass
class LeaveStack:
    """Forward hook of the stack: lets go of the cache, which belongs to the caller."""

    context: TokenContext
    cross: TokenContext | None = None

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        """Called with the stack's output."""
        self.context.cache, self.context.entered = None, False
        if self.cross is not None:
            self.cross.entered = False
