"""A tiny METER with random weights, and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eas_search.models.meter import MeterConfig, MeterForClassification

TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
VISION = {
    "hidden_size": 28,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PATCHES, WORDS = 17, 7


def tiny_config(**changes: Any) -> MeterConfig:
    fusion = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_labels": 5}
    return MeterConfig(**{**fusion, "text_config": TEXT, "vision_config": VISION, **changes})


def randomly(model: Any, seed: int = 0) -> Any:
    """Weights so large that every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            wide = parameter.dim() > 1
            parameter.copy_(values * parameter.shape[-1] ** -0.5 if wide else values * 0.3 + ("orm" in name) * 1.0)
    return model.eval()


def tiny_meter(seed: int = 0, kind: Any = MeterForClassification, **changes: Any) -> Any:
    return randomly(kind(tiny_config(**changes)), seed)


def batch(words: int = WORDS, images: int = 0) -> dict[str, Tensor]:
    """Two rows, the second with two tokens of padding; `images` per row, 0 for one without its own dimension."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 60, (2, words), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 1, 0
    shape = (2, images, 3, 32, 32) if images else (2, 3, 32, 32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(shape, generator=generator)}
