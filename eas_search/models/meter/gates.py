"""The order in which METER-EAS numbers the attentions of the co-attention layers."""

from __future__ import annotations

from typing import Any

KINDS = (
    ("cross_modal_text_layers", "attention"),
    ("cross_modal_text_layers", "crossattention"),
    ("cross_modal_image_layers", "attention"),
    ("cross_modal_image_layers", "crossattention"),
)


def gate_names(model: Any) -> list[str]:
    """Names of the attention sites in the order of METER-EAS's gates; `SkipConfig(skip=…)` takes such names.

    With 6 layers per stream: 0–5 text self-attention, 6–11 text cross-attention, 12–17 image self-attention and 18–23
    image cross-attention. (The published code means the same, but its gates 18–23 switch off image self-attention, so
    that it skips fewer attentions than it draws; here each gate is one attention.)

    Args:
        model: a METER model, with or without a head.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [
        f"{prefix}{layers}.{i}.{attention}.self"
        for layers, attention in KINDS
        for i in range(len(getattr(model.base_model, layers)))
    ]
