"""Hooks on a student and on its stacks of blocks: they settle the `TokenContext` of every forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as memoise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from eas_search.architectures.surroundings import TOKENS
from eas_search.asked import Asked, asked_of, first_alone, places
from eas_search.cache import prepare_cache
from eas_search.context import TokenContext, remember_passes
from eas_search.exceptions import ConfigError
from eas_search.masks import question_mask, seen_tokens, visible_tokens


@memoise
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a class's arguments; every pass asks for them."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Nearly all calls name them all, and a signature takes long to bind."""
    if not args:
        return dict(kwargs)
    call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {**call.pop("kwargs", {}), **call}


@dataclass
class NotePrompt:
    """Forward pre-hook of the whole model: takes the prompt mask from `prompt_mask` or `labels`.

    The attention mask that it notes is about the tokens of this stack: a vision tower's patches, or the audio beside a
    text, may by chance be as many as the text's tokens, and so may a decoder's tokens be as many as the encoder's.
    """

    context: TokenContext
    tower: str = "text"

    @torch.compiler.disable  # it would not see that every thread has a pass of its own
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note the mask; `prompt_mask` [B, n] is removed because no model of `transformers` knows it."""
        given, context, now = kwargs.pop("prompt_mask", None), self.context, self.context.now
        names = _parameters(type(module).forward)
        named = _by_name(module, args, kwargs)
        labels = named.get("labels")
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
        shape = ids.shape if ids is not None else None if embeds is None else embeds.shape[:2]
        if given is None and labels is not None and labels.dim() == 2:
            # Labels of classes and of a decoder's own tokens say nothing about these tokens.
            given = question_mask(labels) if shape is None or shape == labels.shape else None
        now.begin(entered=False)
        now.prompt_mask, now.width = given, None if shape is None else shape[1]
        now.wish = asked_of(module, named) if context.causal and not context.whole else None
        behind_encoder = context.causal and "decoder_attention_mask" in names
        mask = named.get("decoder_attention_mask" if behind_encoder else "attention_mask")
        others = self.tower == "vision" or (self.tower == "audio" and "input_ids" in names)
        now.given_mask = mask if not others and isinstance(mask, Tensor) and mask.dim() == 2 else None
        if module.training and not context.layers:
            remember_passes(module, (context,))
        return args, kwargs


@dataclass
class ForgetWish:
    """Forward hook of the whole model: what it was asked for is not what its stack is asked for alone, later."""

    context: TokenContext

    @torch.compiler.disable  # it would not see that every thread has a pass of its own
    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        """Called with the model's output, or behind an error before its stack was entered."""
        self.context.now.wish = None


@dataclass
class EnterStack:
    """Forward pre-hook of the stack: settles the mask of the pass and prepares its cache.

    `cross` is the context of the stack's cross-attentions, which pool over the encoder's tokens; `blocks` is the name
    of the stack's list of blocks.
    """

    context: TokenContext
    cross: TokenContext | None = None
    blocks: str = "layers"

    @torch.compiler.disable  # it would not see that every thread has a pass of its own
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take the call's arguments by name, so that positional calls work too."""
        named, now = _by_name(module, args, kwargs), self.context.now
        tokens = next((named[name] for name in TOKENS if named.get(name) is not None), None)
        given, wish = now.given_mask, now.wish
        now.begin(entered=True)
        if tokens is not None and tokens.dim() <= 3:
            now.shape = tuple(tokens.shape[:2])
            now.mask = self._mask(tokens, named, given)
            now.asked = None if wish is None else self._asked(module, tokens, wish)
        now.prompt_mask = now.width = now.wish = None
        if self.cross is not None:
            mask = named.get("encoder_attention_mask")
            self.cross.now.begin(entered=True)
            self.cross.now.mask = None if mask is None else seen_tokens(mask)
        if module.training:
            remember_passes(module, (self.context,) if self.cross is None else (self.context, self.cross))
        if "past_key_values" in _parameters(type(module).forward) and hasattr(module, "config"):
            named["past_key_values"] = self._cache(module, named)
        return (), named

    def _mask(self, tokens: Tensor, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
        """[B, n] bool, the tokens that may enter a mean; None: all, or nobody knows (then `refusal` says why)."""
        (rows, n), now, cache = tokens.shape[:2], self.context.now, named.get("past_key_values")
        own = named.get("attention_mask")
        if own is None and given is not None and given.shape[1] == n:
            own = given
        mask = visible_tokens(own, n, cache)
        if self.context.pooling != "prompt" or (now.prompt_mask is None and now.prompt_length is None):
            return mask
        # What a model puts among the tokens that it is called with, such as an image's, is part of the prompt.
        added = 0 if now.width is None else max(0, n - now.width)
        prompts = []
        if now.prompt_mask is not None:
            prompt = now.prompt_mask.to(tokens.device).bool()
            prompts.append(torch.cat([prompt.new_ones(len(prompt), added), prompt], dim=1) if added else prompt)
        length = now.prompt_length
        if length is not None:
            length += added
            if length > n and cache is not None and cache.get_seq_length() == 0:
                raise ConfigError(
                    f"pooling 'prompt' needs the prompt of {length} tokens in one piece, got {n} first; "
                    "expected generation without prefill_chunk_size, or pooling 'prefix'"
                )
            if length < n:
                prompts.append(torch.arange(n, device=tokens.device).expand(rows, -1) < length)
        for prompt in prompts:
            odd = next(
                (one for one in (prompt, mask) if one is not None and one.shape not in ((rows, n), (1, n))), None
            )
            if odd is not None:
                now.refusal = f"its pass is over tokens of shape {(rows, n)}, one of its masks over {tuple(odd.shape)}"
                return None
            mask = prompt if mask is None else mask & prompt
        return mask

    def _asked(self, module: nn.Module, tokens: Tensor, wish: int | Tensor) -> Asked | None:
        index = places(wish, (tokens.shape[0], tokens.shape[1]), tokens.device)
        return None if index is None else Asked(index, first_alone(module.get_submodule(self.blocks)))

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
        context.now.cache = own
        return cache


@dataclass
class LeaveStack:
    """Forward hook of the stack: lets go of the cache, which belongs to the caller."""

    context: TokenContext
    cross: TokenContext | None = None

    @torch.compiler.disable  # it would not see that every thread has a pass of its own
    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        """Called with the stack's output."""
        self.context.now.cache, self.context.now.entered, self.context.now.asked = None, False, None
        if self.cross is not None:
            self.cross.now.entered = False
