"""OpenAI's CLIP vision transformer in the terms of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPVisionConfig

from eas_search.exceptions import ConfigError

TOWER = "model.vision_tower"
HEAD_WIDTH = 64  # of all published CLIP vision transformers
_OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_INSIDE = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCKS = "transformer.resblocks."


def visual_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the vision transformer: names behind `visual.` (CLIP) or `backbone.visual.` (LaVIN).

    Raises:
        ConfigError: nothing does.
    """
    for prefix in ("visual.", "backbone.visual."):
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if "conv1.weight" in part and "class_embedding" in part:
            return part
    raise ConfigError("the CLIP checkpoint has no visual.conv1.weight; expected OpenAI's, with a vision transformer")


def clip_state(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict under LaVIN's names; CLIP's own projection and what is not CLIP's are left out."""
    state = {f"{TOWER}.{new}": visual[old] for old, new in _OUTSIDE.items()}
    for name, tensor in visual.items():
        if not name.startswith(_BLOCKS):
            continue
        index, _, rest = name.removeprefix(_BLOCKS).partition(".")
        layer = f"{TOWER}.encoder.layers.{index}"
        path, _, kind = rest.rpartition(".")
        if path in _INSIDE:
            state[f"{layer}.{_INSIDE[path]}.{kind}"] = tensor
        elif rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{layer}.self_attn.{letter}_proj.{rest.rpartition('_')[2]}"] = part
    return state


def clip_config(visual: Mapping[str, Tensor], heads: int | None = None) -> CLIPVisionConfig:
    """Configuration from the shapes; `heads` None: 64 channels each, as in all published models."""
    width, _, _, patch = visual["conv1.weight"].shape
    places = visual["positional_embedding"].shape[0] - 1
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=visual[f"{_BLOCKS}0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[2] for name in visual if name.startswith(_BLOCKS)}),
        num_attention_heads=heads or width // HEAD_WIDTH,
        image_size=patch * round(places**0.5),
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
