"""LoRA (Hu et al., arXiv 2106.09685) on kept attentions, through PEFT: the alternative to light adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eas_search.skip_config import SkipConfig


def attach_lora(attention: nn.Module, qkv: Sequence[str], config: SkipConfig) -> None:
    """Put LoRA layers of rank `adapter_dim` around the query and value projections of an attention, in place.

    They start as no-ops (B = 0), add `scale` · B A x and are float32 over a half-precision base.

    Args:
        attention: the attention module.
        qkv: names of its input projections, query first and value last; one name when they are one projection.
        config: rank and scale.
    """
    import peft

    names = sorted({qkv[0], qkv[-1]})
    settings = peft.LoraConfig(
        r=config.adapter_dim,
        lora_alpha=config.scale * config.adapter_dim,  # type: ignore[arg-type]
        target_modules=names,
        fan_in_fan_out=isinstance(attention.get_submodule(names[0]), Conv1D),
    )
    peft.inject_adapter_in_model(settings, attention)
    for layer in lora_layers(attention).values():
        for part in (layer.lora_A, layer.lora_B):
            part.to(torch.promote_types(part.default.weight.dtype, torch.float32))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name."""
    modules = model.named_modules()
    return {name: part for name, part in modules if hasattr(part, "lora_A") and hasattr(part, "base_layer")}


def copy_lora(source: nn.Module, target: nn.Module) -> None:
    """Give the LoRA layers of a student the weights of those of another one that keeps at least the same attentions."""
    theirs = lora_layers(source)
    for name, layer in lora_layers(target).items():
        for part in ("lora_A", "lora_B"):
            getattr(layer, part).load_state_dict(getattr(theirs[name], part).state_dict())


def merge_lora(model: nn.Module) -> None:
    """Fold LoRA layers into their projections, W + scale · B A as PEFT computes it.

    The projections get new tensors, because the original model shares the old ones. A quantised projection keeps its
    LoRA layer: folding would round it to four bits again.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        if not base.weight.is_floating_point():
            continue
        folded = base.weight.detach().double() + layer.get_delta_weight("default").detach().double()
        base.weight = nn.Parameter(folded.to(base.weight.dtype), requires_grad=False)
        model.set_submodule(name, base)
