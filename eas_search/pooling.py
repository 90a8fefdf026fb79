"""Means over tokens that never look where they must not, in one piece or token by token.

PIA pools information over tokens. A `PoolSession` computes these means for one attention site during one forward pass
and, when the model decodes with a cache, keeps what the next call needs. The modes are those of `SkipConfig.pooling`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.exceptions import UnsupportedModelError
from eas_search.skip_config import Pooling


@dataclass
class PoolState:
    """What a mean needs in order to go on: `value` [B, 1, q] and, for a running mean, the token `count` [B, 1, 1]."""

    value: Tensor
    count: Tensor | None = None

    def rows(self, index: Tensor) -> PoolState:
        """The state of the given batch rows (beam search reorders, repeats and drops rows)."""
        index = index.to(self.value.device)  # the stack's devices may differ
        return PoolState(self.value[index], None if self.count is None else self.count[index])


@dataclass
class PoolSession:
    """The means of one site in one forward pass.

    Attributes:
        mode: see `SkipConfig.pooling`.
        mask: [B, n], 1 for the tokens that may enter; None: all of them.
        states: one entry per mean, kept between calls of the same generation; None when nothing is cached.
        scratch: shared by the sites of a stack during one pass, for what is the same at all of them.
        refusal: why nobody knows which tokens may enter; '' when that is known.
        spare_first: whether the router leaves out the first token of every row (`SkipConfig.router_spares_first`).
    """

    mode: Pooling
    mask: Tensor | None = None
    states: dict[str, PoolState] | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    refusal: str = ""
    spare_first: bool = False

    def router_mean(self, key: str, x: Tensor, weight: Tensor) -> Tensor:
        """`mean`, without the first token of every row where the router spares it."""
        if not self.spare_first or self.mode == "none" or (self.states or {}).get(key) is not None:
            return self.mean(key, x, weight)  # in a later piece there is no first token
        if "spared" not in self.scratch:
            seen = torch.ones_like(x[..., 0], dtype=torch.bool) if self.mask is None else self.mask.bool()
            self.scratch["spared"] = seen & (seen.cumsum(dim=1) > 1)
            self.scratch["spared weights"] = _weights(self.scratch["spared"], x)
        weights = {"weights": self.scratch["spared weights"]}
        return replace(self, mask=self.scratch["spared"], scratch=weights).mean(key, x, weight)

    def mean(
        self,
        key: str,
        x: Tensor,
        weight: Tensor | None = None,
        then: Callable[[Tensor], Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Mean over tokens of W x_t, or of W (s_t x_t).

        Args:
            key: name of this mean within the site.
            x: [B, n, d] tokens.
            weight: W, [q, d]; None for the identity.
            then: applied to the mean; of one that stays the same for all later tokens, its result is what is kept.
            scale: s, [B, n, 1]; None: ones.

        Returns:
            [B, 1, q] for `prompt` and `all`; [B, n, q] for `prefix` (mean up to each token) and `none` (the token
            itself); what `then` makes of it.
        """
        state = None if self.states is None else self.states.get(key)
        if state is not None and state.count is None:  # while decoding nothing is left to do
            return state.value
        then = then or _as_it_is
        if scale is not None and (self.mask is None or self.mode in ("none", "prefix")):
            x, scale = x * scale, None  # else the weights of the mean take it
        if self.mode == "none":
            return then(x if weight is None else F.linear(x, weight))
        if self.refusal:
            raise UnsupportedModelError(
                f"a block with a skipped attention cannot pool: {self.refusal}; expected the tokens of its stack: "
                "choose pooling 'none' or leave this stack's sites in"
            )
        if self.mode == "prefix":
            return then(self._running(key, x if weight is None else F.linear(x, weight), state))
        # The mean comes first: one token per sample then meets the weight. In half precision its rounding would reach
        # all tokens.
        value = self._mean_of_tokens(x, scale)
        if weight is not None:
            precise = _accumulator(x)
            value = F.linear(value.to(precise), weight.to(precise)).to(x.dtype)
        value = then(value)
        if self.states is not None:
            self.states[key] = PoolState(value)
        return value

    def _mean_of_tokens(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.mask is None:
            return x.mean(dim=1, keepdim=True)
        weights = self.scratch.get("weights")
        if weights is None:
            weights = self.scratch["weights"] = _weights(self.mask, x)
        if scale is not None:
            weights = weights * scale.transpose(1, 2)
        # A batched product reads x once; multiplying by the weights and summing would write a copy of it.
        return torch.bmm(weights.to(x), x)

    def _running(self, key: str, values: Tensor, state: PoolState | None) -> Tensor:
        dtype, values = values.dtype, values.to(_accumulator(values))
        if self.mask is None:
            counts = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype).view(1, -1, 1)
            counts = counts.expand(values.shape[0], -1, 1)
        else:
            mask = self.mask.to(values).unsqueeze(-1)
            values, counts = values * mask, mask.cumsum(dim=1)
        sums = values.cumsum(dim=1)
        if state is not None:
            assert state.count is not None, "a running mean keeps its count"
            sums, counts = sums + state.value, counts + state.count
        if self.states is not None:
            self.states[key] = PoolState(sums[:, -1:], counts[:, -1:])
        return (sums / counts.clamp(min=1.0)).to(dtype)


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _weights(mask: Tensor, x: Tensor) -> Tensor:
    """[B, 1, n]: what turns a sum into a mean. Rows without a pooled token (all padding) get zero instead of 0/0."""
    mask = mask.to(_accumulator(x))
    return (mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0)).unsqueeze(1)


def _accumulator(x: Tensor) -> torch.dtype:
    """At least float32: in bfloat16 a count stops at 256 and a long sum no longer grows."""
    return torch.promote_types(x.dtype, torch.float32)
