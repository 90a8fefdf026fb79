"""Under which conditions a model is trained or scored: who else must keep still, and in which precision it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import convert_to_fp32
from torch import nn

from eas_search.asked import only_labelled
from eas_search.names import MixedPrecision
from eas_search.plain_attention import step_by_step

Guard = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Conditions:
    """Of training and scoring.

    Attributes:
        guard: entered around every step, e.g. a lock shared with timing processes.
        bf16: whether matrix products are computed in bfloat16 (autocast). Weights, adapters and their gradients, norms
            and losses stay in the precision that they have.
        plain_attention: whether bfloat16 attention is computed step by step instead of fused, see `plain_attention`.
        labelled: whether a pass that is given labels need only compute the logits that predict them, see `asked`.
    """

    guard: Guard = nullcontext
    bf16: bool = False
    plain_attention: bool = False
    labelled: bool = False

    @contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """Around the forward passes of a model; the backward passes come behind it."""
        with ExitStack() as stack:
            if self.labelled:
                stack.enter_context(only_labelled())
            if self.bf16:
                stack.enter_context(torch.autocast(device_of(model).type, dtype=torch.bfloat16))
                # As accelerate does it: losses and scores, also those that users write, are not of half precision.
                stack.callback(model.register_forward_hook(lambda _, __, output: convert_to_fp32(output)).remove)
                if self.plain_attention:
                    stack.enter_context(step_by_step())
            yield


AS_IT_IS = Conditions()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def computes_in_bf16(choice: MixedPrecision, model: nn.Module) -> bool:
    """Whether a choice means bfloat16 for this model on this machine.

    `auto` does where the processor multiplies bfloat16 itself; elsewhere that would be slower than float32. A model
    that is in half precision, or quantised, has nothing to gain.
    """
    if choice != "auto":
        return choice == "bf16"
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return False
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
