"""Inference forms of PIAs and the algebra that folds them into weights, computed in double precision.

Everything is expressed in u, the bare normalised tokens (x̂ = g1 ⊙ u + b1), because that is what a merged layer reads.
Matrices as in design: C, A bottleneck and pooled projections, B_k up-projections, w_k expert weights, W an FFN matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.exceptions import UnsupportedModelError
from eas_search.pia import Pia
from eas_search.pooling import PoolSession


@dataclass(frozen=True)
class FoldedPia:
    """Δ = Σ_k w_k (U_k z + u_k) with z = R u + r + p and p = mean(P u); all tensors float64.

    Attributes:
        down, down_bias: R [r, d] and r [r], the pooled term's constant part included.
        pool: P [r, d], or None without a pooled term.
        ups, up_biases: U_k [d, r] and u_k [d]; one entry when the router is static, two when it is routed.
        router, router_bias: E·G1 [2, d] and e + E b1 [2]; None when static.
        temperature: of the router.
    """

    down: Tensor
    down_bias: Tensor
    pool: Tensor | None
    ups: tuple[Tensor, ...]
    up_biases: tuple[Tensor, ...]
    router: Tensor | None
    router_bias: Tensor | None
    temperature: float


def fold_pia(pia: Pia, gain: Tensor, shift: Tensor | None, pooled: bool) -> FoldedPia:
    """Take scale, ½, norm1's affine part and a static router into the matrices.

    Args:
        pia: the trained PIA.
        gain: g1, [d]; ones when the adapter's input is x̂ itself.
        shift: b1, [d] or None.
        pooled: whether the stack pools at all (a PIA keeps its pooled weights under pooling `none`, unused).
    """
    g: Tensor = gain.double()
    b = torch.zeros_like(g) if shift is None else shift.double()
    mix, scale = pia.shape.mix, pia.shape.scale
    down, down_bias = pia.down.weight.double(), pia.down.bias.double() + pia.down.weight.double() @ b
    pool = None
    if pia.pool is not None and pooled:
        a = pia.pool.weight.double()
        pool = mix * a * g
        down_bias = down_bias + pia.pool.bias.double() + a @ b
    experts = pia.experts()
    ups: list[Tensor] = [up.dense().double() * scale for up in experts]
    up_biases: list[Tensor] = [up.bias.double() * scale for up in experts]
    router = router_bias = None
    if pia.router_weight is None:
        w = torch.softmax(pia.router_bias.double() / pia.shape.temperature, dim=-1)
        ups, up_biases = [w[0] * ups[0] + w[1] * ups[1]], [w[0] * up_biases[0] + w[1] * up_biases[1]]
    else:
        e = pia.router_weight.double()
        router, router_bias = e * g, pia.router_bias.double() + e @ b
    return FoldedPia(
        mix * down * g, mix * down_bias, pool, tuple(ups), tuple(up_biases), router, router_bias, pia.shape.temperature
    )


def linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """A frozen linear layer with these float64 values in the dtype of `like`."""
    layer = nn.Linear.__new__(nn.Linear)  # its own initialisation takes longer than the folding
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().to(like.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(like.dtype), requires_grad=False)
    else:
        layer.register_parameter("bias", None)
    return layer


class ThinPath(nn.Module):
    """A folded PIA that stays two thin products, where no single matrix can hold it (routed, or placed `residual`)."""

    def __init__(self, folded: FoldedPia, like: Tensor) -> None:
        super().__init__()
        self.down = linear(folded.down, folded.down_bias, like)
        self.pool = None if folded.pool is None else linear(folded.pool, None, like)
        self.ups = nn.ModuleList(linear(up, bias, like) for up, bias in zip(folded.ups, folded.up_biases, strict=True))
        self.router: nn.Linear | None = None
        if folded.router is not None and folded.router_bias is not None:
            bias = folded.router_bias / folded.temperature
            self.router = linear(folded.router / folded.temperature, bias, like)

    def forward(self, u: Tensor, session: PoolSession, key: str, other: Tensor | None = None) -> Tensor:
        """u [B, n, d] → Δ [B, n, d]; the pooled term is that of `other` [B, m, d] where there is one."""
        z = self.down(u)
        if self.pool is not None:
            z = z + session.mean(f"{key}.pool", u if other is None else other, self.pool.weight)
        if self.router is None:
            return self.ups[0](z)
        logits = session.router_mean(f"{key}.router", u if other is None else other, self.router.weight)
        logits = logits + self.router.bias
        w = torch.softmax(logits, dim=-1)
        # Autocast weighs the experts in float32.
        return (w[..., :1] * self.ups[0](z) + w[..., 1:] * self.ups[1](z)).to(u.dtype)


class FoldedFfn(nn.Module):
    """A plain FFN, gated or not, with up to two vectors per sample that carry the pooled terms: FFN(u + v) + w.

    [v, w] = spread(mean(P u)); w exists only where a stream PIA is folded. Submodules carry the names of the original
    FFN's projections (`names`), so that the state dict of a merged layer without pooling is that of an ordinary FFN of
    another width. Both vectors are as wide as the stream: the wide activations in between are passed over no more often
    than in an FFN that never was a student.
    """

    def __init__(self, names: tuple[str, ...], activation: nn.Module) -> None:
        super().__init__()
        self.names, self.activation = names, activation
        self.pool: nn.Linear | None = None
        self.spread: nn.Linear | None = None

    def forward(self, u: Tensor, session: PoolSession, residual: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """residual + FFN(u), both [B, n, d]; FFN(u) alone without a residual; `scale` [B, n, 1]: of s ⊙ u.

        Without gradients the wide activations are written as seldom as possible: their traffic, not the arithmetic, is
        what a merged layer could cost over a plain one.
        """
        # Asking a module by attribute takes longer than adding a vector to one token.
        parts: dict[str, Any] = self._modules
        *first, out = [parts[name] for name in self.names]
        in_place, lift = not torch.is_grad_enabled(), None
        if (pool := parts.get("pool")) is not None:
            shift = session.mean("fold.pool", u, pool.weight, parts["spread"], scale)
            if shift.shape[-1] > u.shape[-1]:
                shift, lift = shift.chunk(2, dim=-1)
            u = u + shift if scale is None else torch.addcmul(shift, u, scale)
        elif scale is not None:
            u = u * scale
        hidden = [layer(u) for layer in first]
        value = self.activation(hidden[0])
        if len(hidden) == 2:
            value = value.mul_(hidden[1]) if in_place and value is not hidden[0] else value * hidden[1]
        if residual is None:
            return out(value)
        if lift is not None:
            residual = residual + lift
        # The product accumulates onto the residual stream: one pass less, but over one token the calls cost more. Under
        # autocast the sum would take the product's precision, which an ordinary block's stream does not.
        if out.bias is None and residual.shape[-2] > 1:
            weight = out.weight
            if hidden[0].dtype == value.dtype == weight.dtype == residual.dtype:
                stream = residual.flatten(0, -2)
                # A sum with the lift is our own.
                add = stream.addmm_ if in_place and lift is not None else stream.addmm
                return add(value.flatten(0, -2), weight.T).view(residual.shape)
        y = out(value)
        return y.add_(residual) if in_place and y.dtype == residual.dtype else y + residual


def constant_gate(activation: Callable[[Tensor], Tensor]) -> float:
    """β with act(β) = 1, to the last digit of double precision; a gated neuron with this gate is linear.

    Raises:
        UnsupportedModelError: the activation does not reach 1 between 0 and 16.
    """
    low, high = 0.0, 16.0
    for _ in range(7):  # each narrows 1,024 times
        betas = torch.linspace(low, high, 1025, dtype=torch.float64, device="cpu")
        reached = activation(betas.clone()) >= 1.0  # some write in place
        if reached[0] or not reached[-1]:
            raise UnsupportedModelError(
                f"activation {type(activation).__name__} never equals 1, so a `parallel` PIA cannot fold into this "
                "gated FFN; expected SiLU, GELU or ReLU: use placement 'ffn'"
            )
        first = int(reached.int().argmax())
        low, high = betas[first - 1].item(), betas[first].item()
    return high


def check_odd_part(activation: Callable[[Tensor], Tensor]) -> None:
    """Two neurons ±u are the linear map u exactly when act(u) − act(−u) = u, as for ReLU, GELU, SiLU and QuickGELU.

    Raises:
        UnsupportedModelError: the activation lacks this property.
    """
    u = torch.linspace(-6, 6, 49, dtype=torch.float64, device="cpu")
    if not torch.allclose(activation(u) - activation(-u), u, atol=1e-9):
        raise UnsupportedModelError(
            f"activation {type(activation).__name__} has act(u) − act(−u) ≠ u, so a `parallel` PIA cannot fold into "
            "this FFN; expected ReLU, GELU, SiLU or QuickGELU: use placement 'ffn'"
        )


def carries_linear(activation: Callable[[Tensor], Tensor], gated: bool) -> bool:
    """Whether neurons behind this activation can be linear, so that a stream PIA can be neurons of the FFN."""
    try:
        constant_gate(activation) if gated else check_odd_part(activation)
    except UnsupportedModelError:
        return False
    return True
