"""Norms taken apart: norm(x) = gain ⊙ normalise(x) + shift."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.architectures.precision import in_float32
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
        scale = self.scale(values)
        return (F.rms_norm(values, x.shape[-1:], eps=self.eps) if scale is None else values * scale).to(x.dtype)

    def scale(self, x: Tensor) -> Tensor | None:
        """1 / rms(x), [..., 1], where x times that is all that `forward` does; None where it is not.

        On a CPU the norm of a vector is one pass that writes nothing, while `F.rms_norm` writes the squares and
        remembers more for its backward pass, which takes half as long again (torch 2.13); elsewhere that is one kernel.
        """
        if self.centred or x.device.type != "cpu" or torch.finfo(x.dtype).bits < 32:
            return None
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div_(x.shape[-1]).add_(self.eps).rsqrt_()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"eps={self.eps}, centred={self.centred}"


@dataclass(frozen=True)
class AffineForm:
    """How a norm's affine part is stored: gain = weight + `offset` (1 in Gemma), ones when it has no weight."""

    centred: bool
    offset: float

    def gain(self, norm: Any) -> Tensor | None:
        """g [d]; None stands for ones."""
        weight = getattr(norm, "weight", None)
        return weight if weight is None or not self.offset else weight + self.offset

    def apply(self, norm: Any, v: Tensor) -> Tensor:
        """g ⊙ v + b for v [..., d] that is already normalised."""
        gain, shift = self.gain(norm), getattr(norm, "bias", None)
        v = v if gain is None else v * gain
        return v if shift is None else v + shift


def _epsilon(norm: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon", "norm_eps")
    return next((value for name in names if isinstance(value := getattr(norm, name, None), float)), None)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm or RMSNorm by its name."""
    return bool(re.search(r"(Layer|RMS)_?Norm", type(module).__name__, re.IGNORECASE))


def affine_form(norm: nn.Module, width: int | None = None) -> AffineForm:
    """Which of the known forms `norm` has; decided on numbers, so a norm that only looks like one is refused.

    Args:
        norm: a LayerNorm or RMSNorm module of whatever library class.
        width: d, needed when the norm has no weight.

    Raises:
        UnsupportedModelError: none of the forms gives what the module gives.
    """
    weight, eps = getattr(norm, "weight", None), _epsilon(norm)
    if eps is None or (weight is None and (width is None or not is_norm(norm))):
        raise UnsupportedModelError(
            f"norm {type(norm).__name__} has no weight or epsilon; expected a LayerNorm or RMSNorm: "
            "skip only sites of other blocks"
        )
    centred = isinstance(norm, nn.LayerNorm) or "LayerNorm" in type(norm).__name__
    forms = [AffineForm(centred, 0.0), AffineForm(False, 0.0), AffineForm(True, 0.0), AffineForm(False, 1.0)]
    if weight is not None and weight.device.type == "meta":
        return forms[3] if "Gemma" in type(norm).__name__ else forms[0]
    with torch.no_grad(), in_float32(norm):
        like = getattr(norm, "weight", None)
        like = torch.ones(width or 1) if like is None else like
        x = torch.randn(4, like.shape[0], generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
        # Not centred, so that a LayerNorm and an RMSNorm cannot be taken for each other.
        x = x + 0.5
        wanted = norm(x)
        # Two roundings of the weight's dtype, the product's and the norm's own; norms of `transformers` compute in
        # float32 even for double input.
        tolerance = 8 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)
        best = float("inf")
        for form in forms:
            recomposed = form.apply(norm, Normalise(eps, form.centred)(x))
            difference = (recomposed - wanted).abs().max().item()
            if difference <= tolerance * max(1.0, recomposed.abs().max().item()):
                return form
            best = min(best, difference)
    raise UnsupportedModelError(
        f"norm {type(norm).__name__} is not gain · normalise(x) + shift (difference {best:.2g}); "
        "expected a LayerNorm or RMSNorm: skip only sites of other blocks"
    )


def split_norm(norm: nn.Module, width: int | None = None) -> tuple[Normalise, Tensor, Tensor | None]:
    """(normalise, gain [d], shift [d] or None) of a LayerNorm or RMSNorm module.

    The decomposition is checked on numbers, so a norm that only looks like one of these is refused.

    Raises:
        UnsupportedModelError: the module is neither, or computes something else.
    """
    form, eps = affine_form(norm, width), _epsilon(norm)
    assert eps is not None
    gain = form.gain(norm)
    if gain is None:
        assert width is not None
        gain = torch.ones(width)
    return Normalise(eps, form.centred), gain, getattr(norm, "bias", None)
