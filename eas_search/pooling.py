"""Means over tokens that never look where they must not, in one piece or token by token.

PIA pools information over tokens. A `PoolSession` computes these means for one attention site during one forward pass
and, when the model decodes with a cache, keeps what the next call needs. The modes are those of `SkipConfig.pooling`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.skip_config import Pooling


@dataclass
class PoolState:
    """What a mean needs in order to go on: `value` [B, 1, q] and, for a running mean, the token `count` [B, 1, 1]."""

    value: Tensor
    count: Tensor | None = None

    def rows(self, index: Tensor) -> PoolState:
        """The state of the given batch rows (beam search reorders, repeats and drops rows)."""
        return PoolState(self.value[index], None if self.count is None else self.count[index])


@dataclass
class PoolSession:
    """The means of one site in one forward pass.

    Attributes:
        mode: see `SkipConfig.pooling`.
        mask: [B, n], 1 for the tokens that may enter; None: all of them.
        states: one entry per mean, kept between calls of the same generation; None when nothing is cached.
        scratch: shared by the sites of a stack during one pass, for what is the same at all of them.
    """

    mode: Pooling
    mask: Tensor | None = None
    states: dict[str, PoolState] | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, key: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over tokens of W x_t.

        Args:
            key: name of this mean within the site.
            x: [B, n, d] tokens.
            weight: W, [q, d]; None for the identity.

        Returns:
            [B, 1, q] for `prompt` and `all`; [B, n, q] for `prefix` (mean up to each token) and `none` (the token
            itself).
        """
        project = (lambda values: values) if weight is None else (lambda values: F.linear(values, weight))
        if self.mode == "none":
            return project(x)
        state = None if self.states is None else self.states.get(key)
        if self.mode == "prefix":
            return self._running(key, project(x), state)
        if state is not None:
            return state.value
        # The mean comes first: one token per sample then meets the weight.
        value = project(self._mean_of_tokens(x))
        if self.states is not None:
            self.states[key] = PoolState(value)
        return value

    def _mean_of_tokens(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x.mean(dim=1, keepdim=True)
        weights = self.scratch.get("weights")
        if weights is None:
            mask = self.mask.to(x.dtype)
            # Rows without a pooled token (all padding) get a zero mean instead of 0/0.
            weights = self.scratch["weights"] = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0)).unsqueeze(1)
        # A batched product reads x once; multiplying by the weights and summing would write a copy of it.
        return torch.bmm(weights.to(x.dtype), x)

    def _running(self, key: str, values: Tensor, state: PoolState | None) -> Tensor:
        if self.mask is None:
            counts = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype).view(1, -1, 1)
            counts = counts.expand(values.shape[0], -1, 1)
        else:
            mask = self.mask.to(values.dtype).unsqueeze(-1)
            values, counts = values * mask, mask.cumsum(dim=1)
        sums = values.cumsum(dim=1)
        if state is not None:
            assert state.count is not None, "a running mean keeps its count"
            sums, counts = sums + state.value, counts + state.count
        if self.states is not None:
            self.states[key] = PoolState(sums[:, -1:], counts[:, -1:])
        return sums / counts.clamp(min=1.0)
