"""A tiny twin of a model: the same classes and the same layers, with small widths, few words and random weights.

It shows within seconds, and without the checkpoint, what the blocks of a configuration compute.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

WIDTH, FFN, HEADS, KV_HEADS, VOCAB = 64, 96, 4, 2, 160
HEAD_DIM = WIDTH // HEADS
FIRST_SPECIAL_ID = 120  # special tokens are renumbered from here; ordinary ones stay below
IMAGE, PATCH = 32, 8

# Names of configuration fields and the size that they get; a value is never made larger. The first name that fits
# counts, so that the order of the groups matters.
Fields = tuple[tuple[str, int], ...]
LATENT: Fields = (
    (r"kv_lora_rank", 16),
    (r"q_lora_rank", 24),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"qk_head_dim|v_head_dim|index_head_dim", HEAD_DIM),
    (r"index_n_heads", 2),
    (r"index_topk", 8),
)
EXPERTS: Fields = (
    (r"(\w+_)?(num_(local_|routed_)?experts|n_routed_experts|num_total_experts)|moe_num_experts", 4),
    (r"(\w+_)?(num_experts_per_tok(en)?|moe_top_?k|moe_k|num_selected_experts)|experts_per_token|top_k_experts", 2),
)
RECURRENT: Fields = (
    (r"linear_(key|value)_head_dim|mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size|state_size", HEAD_DIM),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 2 * HEADS),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
)
IMAGES_AND_SOUNDS: Fields = (
    (r"(\w+_)?image_size|img_size|crop_size|max_img_size", IMAGE),
    (r"(\w+_)?patch_size", PATCH),
    (r"window_size", 4),
    (r"num_query_tokens|num_queries|num_latents|resampler_n_latents|mm_tokens_per_image", 4),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel", 16),
    (r"max_source_positions", 32),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
)
FIELDS: Fields = (
    # widths of a residual stream
    (r"(\w+_)?hidden_size|d_model|n_embd|(\w+_)?hidden_dim|dim|d_embed|model_dim|emb_dim|residual_size", WIDTH),
    (r"(text_|vision_|backbone_|decoder_|encoder_|audio_)?(embed_dim|width)|word_embed_proj_dim", WIDTH),
    (r"(\w+_)?projection_dim|proj_dim|output_dim|adapter_out_dim|projection_size|output_hidden_size", WIDTH),
    (r"embedding_size|embedding_dim|lru_width|attention_hidden_size|projector_hidden_size|pooler_output_size", WIDTH),
    # widths of an FFN
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_(hidden_)?(dim|size)|d_ff|n_inner|mlp_dim|d_inner", FFN),
    (r"dim_feedforward|(\w+_)?moe_(shared_expert_)?intermediate_size|intermediate_dim|feed_forward_size", FFN),
    # heads
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?)|attn_heads|num_attn_heads", HEADS),
    (r"(\w+_)?num_(key_value|kv)_heads|n_kv_heads", KV_HEADS),
    (r"(\w+_)?head_dim|dim_head|attention_head_size|d_head|kv_channels|d_kv|head_size", HEAD_DIM),
    *LATENT,
    *EXPERTS,
    *RECURRENT,
    # text
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input|vocabulary_size", VOCAB),
    (r"(\w+_)?max_position_embeddings|n_positions|max_seq_len(gth)?|(\w+_)?context_length|n_ctx", 128),
    (r"(attention_)?sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", 8),
    *IMAGES_AND_SOUNDS,
)


def tiny_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """A twin of `model` (of which only the class and the configuration are read), in eval mode and float32.

    Raises:
        Exception: whatever the class raises for sizes that do not fit together.
    """
    config = shrink(copy.deepcopy(model.config))
    kind: Any = type(model)
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        twin = kind._from_config(config, dtype=torch.float32)
    return fill(twin, seed)


def sub_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """`config` and every configuration inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from sub_configs(value)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Make every width of `config` tiny, in place; the number and the kinds of the layers stay."""
    special: dict[int, int] = {}
    for part in sub_configs(config):
        _shrink_fields(part)
        _renumber(part, special)
        _settle(part)
    return config


def small(name: str, value: Any, fields: Fields = FIELDS) -> Any:
    """The tiny value of a numeric field by `fields`, or `value` itself; never larger than it was."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name == "window_size" and value > 64:  # in pixels, not in patches
        return IMAGE
    return next((min(value, tiny) for names, tiny in fields if re.fullmatch(names, name)), value)


def _shrink_fields(config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None)
    alike = {name for name in ("num_key_value_heads", "num_kv_heads") if getattr(config, name, heads) == heads}
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == "chunk_size_feed_forward":
            continue
        if isinstance(value, tuple | list) and re.fullmatch(r"(\w+_)?(image_size|patch_size)", name):
            tiny = [small(name, entry) if len(value) == 2 or i > 0 else entry for i, entry in enumerate(value)]
            setattr(config, name, type(value)(tiny))
        elif name in alike and type(value) is int:
            setattr(config, name, min(value, HEADS))  # as many heads of keys as of queries stay as many
        elif (tiny := small(name, value)) != value:
            setattr(config, name, tiny)
    if getattr(config, "kv_lora_rank", None) and isinstance(getattr(config, "qk_rope_head_dim", None), int):
        for name, value in (("num_key_value_heads", HEADS), ("head_dim", config.qk_rope_head_dim)):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, value)
    for name in ("n_group", "num_expert_group"):
        if (getattr(config, name, None) or 1) > 1:
            setattr(config, name, 2)
            config.topk_group = 1


def _renumber(config: Any, special: dict[int, int]) -> None:
    """Special token ids beyond the tiny vocabulary, the same new one for the same old one in every part."""

    def new(old: Any) -> Any:
        if isinstance(old, bool) or not isinstance(old, int) or old < FIRST_SPECIAL_ID:
            return old
        return special.setdefault(old, FIRST_SPECIAL_ID + len(special) % (VOCAB - FIRST_SPECIAL_ID))

    for name, value in list(vars(config).items()):
        if re.fullmatch(r"(\w+_)?token_(id|index)|image_token|(\w+_)?token_ids", name):
            setattr(config, name, [new(entry) for entry in value] if isinstance(value, list) else new(value))


def _settle(config: Any) -> None:
    """Lists whose entries are sizes."""
    if isinstance(vars(config).get("conv_dim"), list | tuple):  # feature extractors of raw audio
        config.conv_dim = type(config.conv_dim)([16] * len(config.conv_dim))
    if vars(config).get("image_grid_pinpoints"):
        config.image_grid_pinpoints = [[IMAGE, IMAGE]]
    if isinstance(rope := vars(config).get("rope_parameters"), dict):
        if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
            rope.setdefault("mrope_section", [1, 1, 1])
        _settle_rope(rope, vars(config).get("head_dim") or HEAD_DIM)


def _settle_rope(rope: dict[str, Any], head_dim: Any) -> None:
    for name, value in rope.items():
        if isinstance(value, dict):
            _settle_rope(value, head_dim)
        elif isinstance(value, list | tuple) and isinstance(head_dim, int):
            pairs = int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
            sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3][: len(value)]
            rope[name] = sections if name == "mrope_section" else list(value)[:pairs]


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Matrices of unit gain, norm gains around 1, small biases: every part then shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            if parameter.dim() < 2:
                gain = float("norm" in (name + owner).lower() and not name.endswith("bias"))
                parameter.copy_(gain + 0.2 * values)
            elif "embed" in name or "token" in name:
                parameter.copy_(0.7 * values)
            else:
                fan_in = parameter[0].numel() if parameter.dim() > 3 or "conv" in name else parameter.shape[-1]
                parameter.copy_(values * fan_in**-0.5)
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """While active, no warnings and no log lines about invented configurations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
