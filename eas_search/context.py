"""What the blocks of one stack must know about the tokens of the current forward pass.

Blocks of `transformers` get a 4-D attention mask or none at all, never the labels. The hooks in `hooks` note here which
tokens are real and which belong to the prompt, and prepare the KV cache.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from eas_search.cache import SiteStates, SkippedCacheLayer
from eas_search.masks import visible_tokens
from eas_search.pooling import PoolSession
from eas_search.skip_config import Pooling

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
        given_mask: [B, n] attention mask that the whole model was called with, until the stack is entered. A tower
            whose blocks are run from outside their stack is never entered; then this is the mask.
        shape: (B, n) of the tokens of the current pass.
        layers: number of cache slots of the stack.
        entered: whether the stack is running.
        prompt_length: tokens of the prompt while `generate` runs.
        owner: number of this context, by which a cache tells whose means it holds.
        spare_first: see `SkipConfig.router_spares_first`.
        causal: whether a site of the stack only looks back.
        streams: whether the stack runs two streams side by side, so that only the call of an attention says which
            tokens it sees.
    """

    pooling: Pooling
    skipped: frozenset[int] = frozenset()
    stateful: frozenset[int] = frozenset()
    mask: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    cache: Cache | None = None
    prompt_mask: Tensor | None = None
    given_mask: Tensor | None = None
    shape: tuple[int, ...] | None = None
    layers: int = 0
    entered: bool = False
    prompt_length: int | None = None
    owner: int = field(default_factory=lambda: next(_OWNERS))
    spare_first: bool = False
    causal: bool = True
    streams: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenContext:
        """The context of a copied or merged student, whose adapters are others."""
        twin = copy.copy(self)
        twin.owner = next(_OWNERS)
        return twin

    def session(self, layer: int, x: Tensor, mask: Tensor | None = None) -> PoolSession:
        """The means of the site in cache slot `layer`, over the tokens x [B, n, d].

        `mask` is the one that the attention was called with; it counts where there are several streams.
        """
        refusal = ""
        if self.streams:
            # One row for all queries: an encoder's tokens all see the same.
            row = mask[..., :1, :] if mask is not None and mask.dim() == 4 else mask
            seen = visible_tokens(row, x.shape[1])
            return PoolSession(self.pooling, seen, spare_first=self.spare_first)
        if not self.entered and self.causal and self.pooling in ("prompt", "prefix"):
            refusal = "it ran outside the module that owns its list of layers"
        elif self.entered and self.shape is not None and x.dim() == 3 and x.shape[:2] != self.shape:
            refusal = f"it got tokens of shape {tuple(x.shape[:2])} in a pass over {tuple(self.shape)}"
        mask = self.mask if self.entered else self.given_mask
        if mask is not None and mask.shape != x.shape[:2]:
            mask = None  # of another tower's tokens
        states = None
        if self.cache is not None and layer < len(self.cache.layers):
            slot = self.cache.layers[layer]
            states = slot.states if isinstance(slot, SiteStates) else None
        # Of a pass that never enters, nobody says when it ends: nothing is kept for the next block.
        scratch = self.scratch if self.entered else {}
        return PoolSession(self.pooling, mask, states, scratch, refusal, self.spare_first)

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


_PassState = tuple[Tensor | None, dict[str, Tensor], bool, tuple[int, ...] | None]


@dataclass
class Recompute:
    """`context_fn` of torch's activation checkpointing: a block that is computed again sees the tokens of its own pass.

    By then the stack has been left, and another pass may have left its masks behind.
    """

    contexts: tuple[TokenContext, ...]

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What is entered around the pass and, later, around its recomputation."""
        return nullcontext(), self._again(
            [(context.mask, context.scratch, True, context.shape) for context in self.contexts]
        )

    @contextmanager
    def _again(self, then: list[_PassState]) -> Iterator[None]:
        now = [(context.mask, context.scratch, context.entered, context.shape) for context in self.contexts]
        try:
            self._set(then)
            yield
        finally:
            self._set(now)

    def _set(self, states: list[_PassState]) -> None:
        for context, state in zip(self.contexts, states, strict=True):
            context.mask, context.scratch, context.entered, context.shape = state


def remember_passes(stack: nn.Module, contexts: tuple[TokenContext, ...]) -> None:
    """Where activation checkpointing is on, let it restore the contexts of the pass that it computes again."""
    for module in stack.modules():
        checkpoint: Any = module.__dict__.get("_gradient_checkpointing_func")
        keywords = getattr(checkpoint, "keywords", {})
        if keywords.get("use_reentrant") is False and "context_fn" not in keywords:
            remembering: Any = partial(checkpoint, context_fn=Recompute(contexts))
            module._gradient_checkpointing_func = remembering
