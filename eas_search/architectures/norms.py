"""Norms taken apart: norm(x) = gain ⊙ normalise(x) + shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.exceptions import UnsupportedModelError


class Normalise(nn.Module):
    """A norm without its affine part: x / rms(x), or (x − mean) / std when `centred` (LayerNorm)."""

    def __init__(self, eps: float, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] → [..., d], computed in float32 or better and returned in x's dtype."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            return F.layer_norm(values, x.shape[-1:], eps=self.eps).to(x.dtype)
        return F.rms_norm(values, x.shape[-1:], eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"eps={self.eps}, centred={self.centred}"


def split_norm(norm: nn.Module) -> tuple[Normalise, Tensor, Tensor | None]:
    """(normalise, gain [d], shift [d] or None) of a LayerNorm or RMSNorm module.

    The decomposition is checked on numbers, so a norm that only looks like one of these is refused.

    Raises:
        UnsupportedModelError: the module is neither, or computes something else.
    """
    weight = getattr(norm, "weight", None)
    epsilon = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if weight is None or epsilon is None:
        raise UnsupportedModelError(
            f"norm {type(norm).__name__} has no weight or epsilon; expected a LayerNorm or RMSNorm: "
            "skip only sites of other blocks"
        )
    centred = isinstance(norm, nn.LayerNorm)
    normalise, shift = Normalise(epsilon, centred), getattr(norm, "bias", None)
    if weight.device.type != "meta":
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
            recomposed = weight * normalise(x) + (0.0 if shift is None else shift)
            # Two roundings of the weight's dtype, the product's and the norm's own; norms of `transformers` compute in
            # float32 even for double input.
            eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
            tolerance = 8 * eps * max(1.0, recomposed.abs().max().item())
            difference = (recomposed - norm(x)).abs().max().item()
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"norm {type(norm).__name__} is not gain · normalise(x) + shift (difference {difference:.2g}); "
                "expected a LayerNorm or RMSNorm: skip only sites of other blocks"
            )
    return normalise, weight, shift
