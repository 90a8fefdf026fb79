"""KV-cache layers that know about skipped attentions.

A skipped site stores no keys and values, only what its PIA needs of the prompt while decoding: a vector per sample. It
still answers how long the sequence is: `transformers` asks layer 0, skipped or not.
"""

from __future__ import annotations

from functools import cache as memoise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
)

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.pooling import PoolState


class SiteStates:
    """Mixin for a cache layer: carries a site's pooled means through everything that moves batch rows.

    `owner` tells whose means they are (`TokenContext.owner`): a merged student keeps others than its student.
    """

    owner = -1

    @property
    def states(self) -> dict[str, PoolState]:
        """The means kept so far, by name."""
        return self.__dict__.setdefault("_eas_states", {})

    def _take_rows(self, index: Tensor) -> None:
        for key, state in self.states.items():
            self.states[key] = state.rows(index.to(state.value.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.states:
            rows = next(iter(self.states.values())).value.shape[0]
            self._take_rows(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            ConfigError: a running mean cannot forget.
        """
        if tokens_to_remove and any(state.count is not None for state in self.states.values()):
            raise ConfigError(
                "pooling 'prefix' cannot take back tokens, as candidate (assisted, prompt lookup) decoding does; "
                "expected plain decoding or pooling 'prompt'"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        # A skipped layer counts for itself: the one that it asks for its length may not have forgotten yet.
        left = getattr(self, "length", None)
        if not (self.get_seq_length() if left is None else left):  # type: ignore[attr-defined]
            self.states.clear()

    def reset(self) -> None:
        """Forget everything, for a new sequence."""
        super().reset()  # type: ignore[misc]
        self.states.clear()


class _NoKeysNoValues(CacheLayerMixin):
    """The bookkeeping of a cache layer without its tensors.

    `reference` is a kept layer of the same kind, `following` the next kept one that the cache moves between devices.
    """

    supports_early_init = False

    def __init__(
        self,
        replaces: CacheLayerMixin | None,
        reference: CacheLayerMixin | None,
        following: CacheLayerMixin | None,
        croppable: bool,
    ) -> None:
        super().__init__()
        self.is_sliding = getattr(replaces, "is_sliding", False)
        # A cache is compileable when all its layers are. A static one must stay so: otherwise `transformers` drops the
        # mask of a one-token pass and attends to slots that are not filled yet.
        self.is_compileable = getattr(replaces, "is_compileable", False)
        self.is_croppable = croppable
        self.is_initialized = True
        self.keys = self.values = torch.empty(0)  # there are none; Mllama counts them in every layer
        self.reference = reference
        self.following = following
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A skipped attention has no keys and values to store.

        Raises:
            ConfigError: always; only a model that does not skip this site asks for it.
        """
        raise ConfigError(
            "past_key_values was filled by a model that skips this attention, expected an empty cache: "
            "start the generation anew with this model"
        )

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.length if self.reference is None else self.reference.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is made for the kept layers, so theirs is the size that counts."""
        if self.reference is None:
            return self.length + query_length, 0
        return self.reference.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1 if self.reference is None else self.reference.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def offload(self) -> None:
        """Nothing to move."""

    def prefetch(self) -> None:
        """Nothing to move here; a cache that fetches one layer ahead means the next one that has something."""
        if self.following is not None:
            self.following.prefetch()

    def reset(self) -> None:
        """Start a new sequence."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """No rows of its own."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """No rows of its own."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """No rows of its own."""


class SkippedCacheLayer(SiteStates, _NoKeysNoValues):
    """The cache layer of a skipped site: the means of its PIA and the sequence length."""


@memoise
def _with_states(kind: type) -> type:
    return type(f"Stateful{kind.__name__}", (SiteStates, kind), {"__module__": kind.__module__})


def _stateful(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The same layer, of whatever kind, that also carries means."""
    kind: Any = type(layer)
    twin: CacheLayerMixin = object.__new__(_with_states(kind))
    twin.__dict__ = layer.__dict__
    return twin


def fixed_means(cache: object) -> bool:
    """Whether a cache holds means over a whole prompt, which later tokens no longer change."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, Cache) or own.get_seq_length() == 0:
        return False
    states = [state for layer in own.layers if isinstance(layer, SiteStates) for state in layer.states.values()]
    return any(state.count is None for state in states)


def prepare_cache(
    cache: Cache, layers: int, skipped: frozenset[int], stateful: frozenset[int], croppable: bool, owner: int
) -> None:
    """Put a `SkippedCacheLayer` into the slot of every skipped site and let `stateful` kept sites carry means.

    In place and idempotent, because `generate` keeps its own reference to the cache.

    Raises:
        ConfigError: the cache already holds tokens of another model, with other skipped sites or other means.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
    holders = {i for i, layer in enumerate(cache.layers) if isinstance(layer, SkippedCacheLayer)}
    if holders == skipped and all(getattr(cache.layers[i], "owner", None) == owner for i in skipped | stateful):
        return
    if holders or any(layer.get_seq_length() > 0 for layer in cache.layers if isinstance(layer, CacheLayerMixin)):
        raise ConfigError(
            "past_key_values holds tokens of another model; expected an empty cache: "
            "start the generation anew with this model"
        )
    kinds, moved = [type(layer) for layer in cache.layers], _moved(cache)
    for i in skipped:
        if kinds[i].__module__ != "transformers.cache_utils" or issubclass(kinds[i], LinearAttentionCacheLayerMixin):
            raise UnsupportedModelError(
                f"cache slot {i} is a {kinds[i].__name__}, which holds more than keys and values; expected a "
                "slot of softmax attention alone: leave this site in, or decode with use_cache=False"
            )
    # First, because the skipped ones refer to the objects that stay.
    for i in stateful:
        cache.layers[i] = _stateful(cache.layers[i])
        if not croppable:
            cache.layers[i].is_croppable = False
    kept = [(i, layer) for i, layer in enumerate(cache.layers) if i not in skipped]
    for i in skipped:
        # Sliding and full layers have masks of different sizes: the answer must come from a layer of the same kind.
        reference = next((layer for j, layer in kept if kinds[j] is kinds[i]), None)
        behind = sorted((j for j, _ in kept if j in moved), key=lambda j: (j < i, j))
        following = cache.layers[behind[0]] if behind else None
        cache.layers[i] = SkippedCacheLayer(cache.layers[i], reference, following, croppable)
    for i in skipped | stateful:
        cache.layers[i].owner = owner


def _moved(cache: Cache) -> set[int]:
    """The slots of the layers that a cache moves to the CPU and back, as `Cache.prefetch` chooses them."""
    if not cache.offloading:
        return set()
    marks = zip(cache.is_linear, cache.is_dummy, cache.is_sliding, strict=True)
    return {
        i
        for i, (linear, dummy, sliding) in enumerate(marks)
        if not (linear or dummy or (sliding and cache.only_non_sliding))
    }
