"""The models that are timed: one LaVIN with random weights in all its forms, and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from published import published_merge
from torch import Tensor, nn

from eas_search.merging import merge
from eas_search.models.lavin import LavinConfig, LavinForConditionalGeneration
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips

PUBLISHED, ROUTED, BASE = "published merge", "routed, merged", "LaVIN, light adapters"
STATIC = "static, merged"
OURS = (STATIC, "static, no pooling, merged", ROUTED)
BOUND = "deleted (bound)"


def build_model(config: dict[str, Any], shape: dict[str, Any], device: str) -> Any:
    """A LaVIN of this shape with random weights."""
    torch.manual_seed(config["seed"])
    vocabulary = shape["text"]["vocab_size"]
    lavin = LavinConfig(
        text_config={**shape["text"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=shape["vision"],
        modality_token_ids=[vocabulary, vocabulary + 1],
        image_token_id=vocabulary + 2,
    )
    with torch.device(device):
        model = LavinForConditionalGeneration._from_config(lavin, dtype=getattr(torch, shape["dtype"]))
    return model.requires_grad_(False).eval()


def build_inputs(model: Any, batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """`batch` prompts of `tokens` tokens, modality token and image features included, each with a picture."""
    generator = torch.Generator().manual_seed(seed)
    config, text = model.config, model.config.text_config
    start = [config.modality_token_ids[1], text.bos_token_id, *[config.image_token_id] * config.image_seq_length]
    words = torch.randint(3, text.vocab_size, (batch, tokens - len(start)), generator=generator)
    ids = torch.cat([torch.tensor(start).expand(batch, -1), words], dim=1)
    size = config.vision_config.image_size
    pictures = torch.randn((batch, 3, size, size), generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def build_variants(model: Any, config: dict[str, Any], shape: dict[str, Any]) -> dict[str, nn.Module]:
    """Name → model. The published merge answers like the routed student, at `ROUTED`'s place before merging."""
    common = SkipConfig(
        **config["adapters"],
        skip=tuple(f"model.language_model.layers.{i}.self_attn" for i in shape["skip"]),
        placement="ffn",
        identity="paper",
        router="routed",
        router_spares_first=True,
        adapter_towers=("text", "vision"),
    )
    static = common.model_copy(update={"router": "static"})
    student = _student(model, common, config["seed"])
    nothing = SkipConfig(skip=common.skip, pia_dim=0, pooling="none")
    return {
        BOUND: apply_skips(model, nothing).eval(),
        f"{BOUND}, A/A": apply_skips(model, nothing).eval(),
        STATIC: merge(_student(model, static, config["seed"])).eval(),
        OURS[1]: merge(_student(model, static.model_copy(update={"pooling": "none"}), config["seed"])).eval(),
        ROUTED: merge(student).eval(),
        "routed, not merged": student,
        PUBLISHED: published_merge(model, student, common),
        BASE: _student(model, common.model_copy(update={"skip": ()}), config["seed"]),
        "LaVIN without adapters": model,
    }


def _student(model: Any, config: SkipConfig, seed: int) -> Any:
    """A student with random adapters in the model's precision."""
    student = apply_skips(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(student).values():
        parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(model.device, model.dtype)
    return student.eval()
