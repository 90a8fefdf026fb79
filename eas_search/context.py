"""What the blocks of one stack must know about the tokens of the current forward pass.

Blocks of `transformers` get a 4-D attention mask or none at all, never the labels. The hooks in `hooks` note here which
tokens are real and which belong to the prompt, and prepare the KV cache.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from eas_search.asked import Asked
from eas_search.cache import SiteStates, SkippedCacheLayer
from eas_search.masks import visible_tokens
from eas_search.pooling import PoolSession
from eas_search.skip_config import Pooling

_OWNERS = itertools.count()

_Tokens = tuple[Tensor | None, Tensor | None, dict[str, Tensor], bool, tuple[int, ...] | None, str, Asked | None]


class Pass(threading.local):
    """What the forward pass says in which a thread is; every thread sees its own.

    Models of `transformers` may run in several threads at once, and autograd may compute a checkpointed block again in
    a thread of its own.

    Attributes:
        mask: [B, n], 1 for tokens that may enter a mean; None: all.
        scratch: see `PoolSession`; new in every pass.
        entered: whether the stack is running.
        shape: (B, n) of the tokens.
        refusal: see `PoolSession`.
        cache: KV cache, if the pass uses one.
        asked: which tokens the blocks at the end of the stack compute; None: all.
        wish: what the whole model was asked for, see `asked_of`, until the stack is entered.
        prompt_mask: [B, n] as noted from `prompt_mask=` or `labels=`, until the stack is entered.
        given_mask: [B, n] attention mask that the whole model was called with, until the stack is entered. A tower
            whose blocks are run from outside their stack is never entered; then this is the mask.
        width: n of the tokens that the whole model was called with, until the stack is entered; None: unknown.
        prompt_length: tokens of the prompt while `generate` runs.
    """

    mask: Tensor | None = None
    entered: bool = False
    shape: tuple[int, ...] | None = None
    refusal: str = ""
    cache: Cache | None = None
    asked: Asked | None = None
    wish: int | Tensor | None = None
    prompt_mask: Tensor | None = None
    given_mask: Tensor | None = None
    width: int | None = None
    prompt_length: int | None = None

    def __init__(self) -> None:
        self.scratch: dict[str, Tensor] = {}

    def begin(self, entered: bool) -> None:
        """Forget the tokens of the last pass, of which an interrupt may have left more than a mask."""
        self.tokens = None, None, {}, entered, None, "", None
        self.cache = None

    @property
    def tokens(self) -> _Tokens:
        """What sessions read, for a block that is computed again."""
        return self.mask, self.given_mask, self.scratch, self.entered, self.shape, self.refusal, self.asked

    @tokens.setter
    def tokens(self, tokens: _Tokens) -> None:
        self.mask, self.given_mask, self.scratch, self.entered, self.shape, self.refusal, self.asked = tokens


@dataclass(eq=False)
class TokenContext:
    """Shared by all sites of one stack.

    Attributes:
        pooling: see `SkipConfig.pooling`.
        skipped: cache slots of the skipped sites.
        stateful: cache slots of kept sites whose routed light adapters keep a mean.
        layers: number of cache slots of the stack; 0 where no hook can say when it is entered.
        owner: number of this context, by which a cache tells whose means it holds.
        spare_first: see `SkipConfig.router_spares_first`.
        causal: whether a site of the stack only looks back.
        streams: whether the stack runs two streams side by side, so that only the call of an attention says which
            tokens it sees.
        whole: whether every token is computed to the end, whatever is asked for (see `asked`).
        now: the pass in which the asking thread is.
    """

    pooling: Pooling
    skipped: frozenset[int] = frozenset()
    stateful: frozenset[int] = frozenset()
    layers: int = 0
    owner: int = field(default_factory=lambda: next(_OWNERS))
    spare_first: bool = False
    causal: bool = True
    streams: bool = False
    whole: bool = False
    now: Pass = field(default_factory=Pass, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenContext:
        """The context of a copied or merged student, whose adapters are others."""
        twin = copy.copy(self)
        twin.owner, twin.now = next(_OWNERS), Pass()
        return twin

    @property
    def mask(self) -> Tensor | None:
        """[B, n], 1 for tokens that may enter a mean in the current pass; None: all."""
        return self.now.mask

    @property
    def cache(self) -> Cache | None:
        """KV cache of the current pass, if it uses one."""
        return self.now.cache

    def session(self, layer: int, x: Tensor, mask: Tensor | None = None) -> PoolSession:
        """The means of the site in cache slot `layer`, over the tokens x [B, n, d].

        `mask` is the one that the attention was called with; it counts where there are several streams.
        """
        if self.streams:
            # One row for all queries: an encoder's tokens all see the same.
            row = mask[..., :1, :] if mask is not None and mask.dim() == 4 else mask
            seen = visible_tokens(row, x.shape[1])
            return PoolSession(self.pooling, seen, spare_first=self.spare_first)
        now, refusal = self.now, ""
        if now.entered:
            refusal = now.refusal
            if now.shape is not None and x.dim() == 3 and x.shape[:2] != now.shape:
                refusal = f"it got tokens of shape {tuple(x.shape[:2])} in a pass over {tuple(now.shape)}"
        elif self.causal and self.pooling in ("prompt", "prefix"):
            refusal = "it ran outside the module that owns its list of layers"
        elif self.layers and torch._C._current_graph_task_id() != -1:
            # A backward pass that computes a block again by other means than the model's own switch (`RememberedPass`).
            refusal = "activation checkpointing runs it again without the masks of its pass"
        mask = now.mask if now.entered else now.given_mask
        if mask is not None and mask.shape != x.shape[:2]:
            mask = None  # of another tower's tokens
        states = None
        if now.cache is not None and layer < len(now.cache.layers):
            slot = now.cache.layers[layer]
            states = slot.states if isinstance(slot, SiteStates) else None
        # Of a pass that never enters, nobody says when it ends: nothing is kept for the next block.
        scratch = now.scratch if now.entered else {}
        return PoolSession(self.pooling, mask, states, scratch, refusal, self.spare_first)

    def advance(self, layer: int, tokens: int) -> None:
        """Count the tokens that a skipped site has let through."""
        cache = self.now.cache
        if cache is not None:
            slot = cache.layers[layer]
            assert isinstance(slot, SkippedCacheLayer)
            slot.length += tokens

    @contextmanager
    def generating(self, prompt_length: int | None) -> Iterator[None]:
        """While active, only the first `prompt_length` tokens of a row are its prompt."""
        now = self.now
        now.prompt_length, before = prompt_length, now.prompt_length
        # A part of a model that decodes by itself would take what an interrupted pass of the whole one has noted.
        now.prompt_mask = now.given_mask = now.width = now.wish = None
        try:
            yield
        finally:
            now.prompt_length = before


@dataclass(eq=False)
class RememberedPass:
    """Activation checkpointing of either kind, in which a block that is computed again sees the tokens of its own pass.

    By then the stack has been left, and another pass may have left its masks behind.
    """

    checkpoint: Callable[..., Any]
    contexts: tuple[TokenContext, ...]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's `checkpoint`."""
        seen = [context.now.tokens for context in self.contexts]

        def run(*args: Any, **kwargs: Any) -> Any:
            before = [context.now.tokens for context in self.contexts]
            try:
                self._show(seen)
                return function(*args, **kwargs)
            finally:
                self._show(before)

        return self.checkpoint(run, *args, **kwargs)

    def _show(self, passes: list[_Tokens]) -> None:
        for context, tokens in zip(self.contexts, passes, strict=True):
            context.now.tokens = tokens


def remember_passes(stack: nn.Module, contexts: tuple[TokenContext, ...]) -> None:
    """Where activation checkpointing is on, let it restore the contexts of the pass that it computes again."""
    for module in stack.modules():
        checkpoint: Any = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None:
            continue
        known: tuple[TokenContext, ...] = ()
        if isinstance(checkpoint, RememberedPass):
            checkpoint, known = checkpoint.checkpoint, checkpoint.contexts
        missing = [context for context in contexts if context not in known]
        if missing:
            remembering: Any = RememberedPass(checkpoint, (*known, *missing))
            module._gradient_checkpointing_func = remembering
