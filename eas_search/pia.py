"""PIA, the propagation-of-information adapter (Wu et al., arXiv 2403.15226), and its light per-token form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.exceptions import ConfigError
from eas_search.pooling import PoolSession
from eas_search.skip_config import Router


@dataclass(frozen=True)
class PiaShape:
    """What fixes a PIA's function apart from its weights.

    `mix` is the factor in front of the bottleneck: ½ for a PIA that averages its own token with the pooled information,
    1 for the light adapter, which has no pooled term.
    """

    width: int
    rank: int
    groups: int = 2
    scale: float = 1.0
    temperature: float = 10.0
    router: Router = "static"
    pooled: bool = True
    mix: float = 0.5


class GroupedUp(nn.Module):
    """Up-projection R^r → R^d in groups: output group j reads only bottleneck group j.

    `weight` is [d, r / groups] (the layout of a grouped 1×1 convolution), `bias` [d]; both start at zero.
    """

    def __init__(self, rank: int, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(width, rank // groups))
        self.bias = nn.Parameter(torch.zeros(width))

    def dense(self) -> Tensor:
        """The same map as an ordinary block-diagonal matrix, [d, r]."""
        return _dense(self.weight, self.groups)


def _dense(weight: Tensor, groups: int) -> Tensor:
    return weight if groups == 1 else torch.block_diag(*weight.chunk(groups))


class Pia(nn.Module):
    """Δ(x̂) = scale · Σ_k w_k (B_k z + b_k), with z = mix · (C x̂ + c + s), s = mean(A x̂ + a), w = softmax(router / τ).

    Arguments of the mean and of the router are pooled by a `PoolSession`, which knows which tokens may enter. The
    static router holds two logits; the routed one reads the pooled x̂, E · mean(x̂) + e.

    `active` is the rank in use, None for all of it: the leading units of each group, as `copy_slice` takes them.
    """

    active: int | None = None

    def __init__(self, shape: PiaShape) -> None:
        super().__init__()
        if shape.width % shape.groups:
            raise ConfigError(f"groups is {shape.groups}, expected a divisor of the model's width {shape.width}")
        self.shape = shape
        self.down = nn.Linear(shape.width, shape.rank)
        self.pool = nn.Linear(shape.width, shape.rank) if shape.pooled else None
        self.ups = nn.ModuleList(GroupedUp(shape.rank, shape.width, shape.groups) for _ in range(2))
        self.router_weight = nn.Parameter(torch.zeros(2, shape.width)) if shape.router == "routed" else None
        self.router_bias = nn.Parameter(torch.zeros(2))
        for linear in (self.down, self.pool):
            if linear is not None:
                nn.init.normal_(linear.weight, std=shape.width**-0.5)
                nn.init.zeros_(linear.bias)

    def experts(self) -> tuple[GroupedUp, GroupedUp]:
        """The two up-projections."""
        first, second = self.ups
        assert isinstance(first, GroupedUp)
        assert isinstance(second, GroupedUp)
        return first, second

    def expert_weights(self, x: Tensor, session: PoolSession, key: str) -> Tensor:
        """w: [2] for the static router, [B, 1 or n, 2] for the routed one."""
        logits: Tensor = self.router_bias
        if self.router_weight is not None:
            logits = logits + session.router_mean(f"{key}.router", x, self.router_weight)
        return torch.softmax(logits / self.shape.temperature, dim=-1)

    def static_up(self) -> tuple[Tensor, Tensor]:
        """(scale · Σ w_k B_k, scale · Σ w_k b_k), [d, r] and [d]; only the static router has constant weights."""
        assert self.router_weight is None, "a routed PIA has no constant up-projection"
        w = torch.softmax(self.router_bias / self.shape.temperature, dim=-1)[1]
        first, second = self.experts()
        # Mixed before they are made dense: that is less to compute.
        weight, bias = torch.lerp(first.weight, second.weight, w), torch.lerp(first.bias, second.bias, w)
        if self.shape.scale != 1.0:
            weight, bias = weight * self.shape.scale, bias * self.shape.scale
        return _dense(weight, first.groups), bias

    def forward(self, x: Tensor, session: PoolSession, key: str = "pia", other: Tensor | None = None) -> Tensor:
        """Δ for the normalised tokens `x` [B, n, d]; `key` names this PIA within its site. Returns [B, n, d].

        Pooled term and router look at `other` [B, m, d] where it is given (cross-attention: the other stream).
        """
        seen = x if other is None else other
        z = self.down(x)
        if self.pool is not None and session.mode != "none":
            z = z + session.mean(f"{key}.pool", seen, self.pool.weight) + self.pool.bias
        z = self.shape.mix * z
        if self.active is not None:
            z = z * _leading(self.shape, self.active).to(z)
        if self.router_weight is None:
            return F.linear(z, *self.static_up())
        w = self.shape.scale * self.expert_weights(seen, session, key)
        first, second = (F.linear(z, up.dense(), up.bias) for up in self.experts())
        return w[..., :1] * first + w[..., 1:] * second


def _leading(shape: PiaShape, rank: int) -> Tensor:
    """Which bottleneck units are the first `rank / groups` of their group, [shape.rank] bool."""
    return torch.arange(shape.rank) % (shape.rank // shape.groups) < rank // shape.groups


def copy_slice(source: Pia, target: Pia) -> None:
    """Give `target` the leading bottleneck units of a larger `source`: each group keeps its first ones.

    Both must have the same width, groups and router. The weights are copied, not shared.
    """
    big, small = source.shape, target.shape
    assert (big.width, big.groups, big.router) == (small.width, small.groups, small.router)
    assert small.rank <= big.rank, f"rank {small.rank} is not a slice of rank {big.rank}"
    per_group = small.rank // small.groups
    kept = _leading(big, small.rank).nonzero().flatten()
    with torch.no_grad():
        for name in ("down", "pool"):
            wide, narrow = getattr(source, name), getattr(target, name)
            if narrow is not None:
                narrow.weight.copy_(wide.weight[kept])
                narrow.bias.copy_(wide.bias[kept])
        for wide_up, narrow_up in zip(source.experts(), target.experts(), strict=True):
            narrow_up.weight.copy_(wide_up.weight[:, :per_group])
            narrow_up.bias.copy_(wide_up.bias)
        target.router_bias.copy_(source.router_bias)
        if target.router_weight is not None and source.router_weight is not None:
            target.router_weight.copy_(source.router_weight)
