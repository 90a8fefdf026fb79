"""The proof of a deletion: a student without an attention equals the model in which that attention adds nothing.

The two are computed by different means: the student has the attention removed, while in the intact model a hook
replaces what the attention gives by zeros on its way to the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.calls import CallForm, call_form
from eas_search.exceptions import EasSearchError, UnsupportedModelError
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips


def prove_deletion(
    model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor], tolerance: float = 1e-4
) -> dict[str, str]:
    """Which sites cannot be deleted although they look like it, and why, by name; empty when all of them can.

    Two complementary halves of the sites are deleted first; only when one of them differs are its sites tried one by
    one. So a model whose sites are all sound costs four forward passes.

    Args:
        model: an original model.
        sites: of this model.
        inputs: keyword arguments of `forward`.
        tolerance: largest difference allowed of any output tensor, relative to the larger of 1 and that output. 1e-4
            suits float32.
    """
    refused: dict[str, str] = {}
    for half in (list(sites[::2]), list(sites[1::2])):
        if half and _difference(model, half, inputs)[0] > tolerance:
            for site in half:
                worst, reason = _difference(model, [site], inputs)
                if worst > tolerance:
                    refused[site.name] = reason or (
                        f"without this attention the model differs by {worst:.2g} from the model in which it adds "
                        f"nothing (tolerance {tolerance:g}); other parts must depend on it"
                    )
    return refused


def refuse_unsound(
    model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor], tolerance: float = 1e-4
) -> dict[str, str]:
    """`prove_deletion`, for a search over these sites.

    Raises:
        UnsupportedModelError: none of them can be deleted.
    """
    refused = prove_deletion(model, sites, inputs, tolerance)
    if len(refused) == len(sites):
        name, reason = next(iter(refused.items()))
        kind = type(model.get_submodule(name)).__name__
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} can be skipped ({kind}, {name}: {reason}); expected blocks whose "
            "attention stands alone: declare yours with register_pattern"
        )
    return refused


@torch.no_grad()
def _difference(model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor]) -> tuple[float, str]:
    """(largest relative difference of an output, '') or (inf, why) when the student does not run."""
    training = model.training
    model.eval()
    try:
        with silenced(model, sites):
            wanted = model(**inputs)
        # A fresh PIA adds nothing, yet it pools: so the student must also know its tokens.
        config = SkipConfig(skip=tuple(site.index for site in sites), pia_dim=2, placement="residual", pooling="prompt")
        given = apply_skips(model, config)(**inputs)
    except EasSearchError as error:
        return float("inf"), str(error)
    except Exception as error:
        return float("inf"), f"without this attention the model fails: {type(error).__name__}: {error}"[:200]
    finally:
        model.train(training)
    worst, answers = 0.0, _tensors(given)
    for name, first in _tensors(wanted).items():
        second = answers.get(name)
        if second is None or first.shape != second.shape:
            return float("inf"), f"without this attention the model's output {name!r} is missing or of another shape"
        difference = (first - second).abs().max().item() / max(1.0, first.abs().max().item())
        worst = max(worst, float("inf") if math.isnan(difference) else difference)
    return worst, ""


def _tensors(output: Any) -> dict[str, Tensor]:
    """Floating-point tensors of a model's output by name."""
    items = (
        output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple) else [output])
    )
    return {str(k): v for k, v in items if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}


@contextmanager
def silenced(model: nn.Module, sites: Sequence[AttentionSite]) -> Iterator[None]:
    """While active, the attentions of these sites add nothing: their outputs are replaced by zeros."""
    handles = []
    for site in sites:
        path = f"{site.block}.{site.pattern.writer}" if site.pattern.writer else site.name
        handles.append(model.get_submodule(path).register_forward_hook(_Silence(site), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Silence:
    def __init__(self, site: AttentionSite) -> None:
        self.adds = site.pattern.adds

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        form = call_form(type(module))
        given = len(output) if isinstance(output, tuple) else None
        if given != (None if form.returns is None else len(form.returns)):
            raise UnsupportedModelError(
                f"{type(module).__name__} returns {'a tensor' if given is None else f'{given} values'}, which its "
                f"source does not say ({form.returns}); expected a plain return: leave it in"
            )
        value = torch.zeros_like(CallForm.unpack(output))
        if self.adds:
            value = value + form.argument(self.adds, args, kwargs)
        return (value, *output[1:]) if isinstance(output, tuple) else value
