"""What the blocks of one stack must know about the tokens of the current forward pass.

Blocks of `transformers` get a 4-D attention mask or none at all, never the labels. Hooks on the model and on the stack
of blocks note which tokens are real and which belong to the prompt, and prepare the KV cache.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from eas_search.cache import SiteStates, SkippedCacheLayer, prepare_cache
from eas_search.exceptions import ConfigError
from eas_search.pooling import PoolSession
from eas_search.skip_config import Pooling

IGNORED_LABEL = -100
_OWNERS = itertools.count()


@dataclass
class TokenContext:
    """Shared by all sites of one stack.

    Attributes:
        pooling: see `SkipConfig.pooling`.
        skipped: cache slots of the skipped sites.
        stateful: cache slots of kept sites whose routed light adapters keep a mean.
        mask: [B, n], 1 for tokens that may enter a mean in the current pass; None: all.
        scratch: see `PoolSession`; new in every pass.
        cache: KV cache of the current pass, if it uses one.
        prompt_mask: [B, n] as noted from `prompt_mask=` or `labels=`, until the stack is entered.
        prompt_length: tokens of the prompt while `generate` runs.
        owner: number of this context, by which a cache tells whose means it holds.
    """

    pooling: Pooling
    skipped: frozenset[int] = frozenset()
    stateful: frozenset[int] = frozenset()
    mask: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    cache: Cache | None = None
    prompt_mask: Tensor | None = None
    prompt_length: int | None = None
    owner: int = field(default_factory=lambda: next(_OWNERS))

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenContext:
        """The context of a copied or merged student, whose adapters are others."""
        twin = copy.copy(self)
        twin.owner = next(_OWNERS)
        return twin

    def session(self, layer: int) -> PoolSession:
        """The means of the site in cache slot `layer`."""
        states = None
        if self.cache is not None:
            slot = self.cache.layers[layer]
            states = slot.states if isinstance(slot, SiteStates) else None
        return PoolSession(self.pooling, self.mask, states, self.scratch)

    def advance(self, layer: int, tokens: int) -> None:
        """Count the tokens that a skipped site has let through."""
        if self.cache is not None:
            slot = self.cache.layers[layer]
            assert isinstance(slot, SkippedCacheLayer)
            slot.length += tokens

    @contextmanager
    def generating(self, prompt_length: int | None) -> Iterator[None]:
        """While active, only the first `prompt_length` tokens of a row are its prompt."""
        self.prompt_length, before = prompt_length, self.prompt_length
        try:
            yield
        finally:
            self.prompt_length = before


def question_mask(labels: Tensor) -> Tensor:
    """1 for every token before the first labelled one (LLaVA-EAS's rule), [B, n] bool."""
    return (labels != IGNORED_LABEL).cumsum(dim=1) == 0


@dataclass
class NotePrompt:
    """Forward pre-hook of the whole model: takes the prompt mask from `prompt_mask` or `labels`."""

    context: TokenContext

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note the mask; `prompt_mask` [B, n] is removed because no model of `transformers` knows it."""
        given, labels = kwargs.pop("prompt_mask", None), kwargs.get("labels")
        self.context.prompt_mask = question_mask(labels) if given is None and labels is not None else given
        return args, kwargs


@dataclass
class EnterStack:
    """Forward pre-hook of the stack: settles the mask of the pass and prepares its cache."""

    context: TokenContext

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Bind the call's arguments by name, so that positional calls work too."""
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        named = {**call.pop("kwargs", {}), **call}
        tokens = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        context = self.context
        context.mask, context.scratch = self._mask(tokens, named), {}
        context.prompt_mask = None
        named["past_key_values"] = context.cache = self._cache(module, named)
        return (), named

    def _mask(self, tokens: Tensor, named: dict[str, Any]) -> Tensor | None:
        n = tokens.shape[1]
        context = self.context
        mask = visible_tokens(named.get("attention_mask"), n, named.get("past_key_values"))
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
        context = self.context
        prepare_cache(
            cache,
            config.num_hidden_layers,
            context.skipped,
            context.stateful,
            context.pooling != "prefix",
            context.owner,
        )
        return cache


@dataclass
class LeaveStack:
    """Forward hook of the stack: lets go of the cache, which belongs to the caller."""

    context: TokenContext

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        """Called with the stack's output."""
        self.context.cache = None


def visible_tokens(
    attention_mask: Tensor | dict[str, Tensor] | None, n: int, cache: Cache | None = None
) -> Tensor | None:
    """[B, n] bool, which of the n tokens of this pass are real; None when nothing is masked.

    Understands the 2-D mask of tokenizers and the 4-D masks (boolean or additive) that `generate` makes for static
    caches, in which a real token sees at least itself; its column follows those of the tokens in `cache`.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        past = 0 if cache is None else int(cache.get_seq_length())
        past = min(past, attention_mask.shape[-1] - n)  # a sliding window has moved on
        itself = attention_mask[:, 0, :, past : past + n].diagonal(dim1=-2, dim2=-1)
        return itself if itself.dtype == torch.bool else itself == 0
    return attention_mask[:, -n:].bool()
