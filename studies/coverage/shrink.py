"""Any configuration of `transformers` made tiny, by the names of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from eas_search.models import twin
from eas_search.models.twin import EXPERTS, IMAGES_AND_SOUNDS, LATENT, RECURRENT, Fields, sub_configs

WIDTH, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 4, 160
HEAD_DIM = WIDTH // HEADS
FIRST_SPECIAL_ID = 120  # special tokens are renumbered from here; ordinary ones stay below
IMAGE, PATCH = 32, 8

FIELDS: Fields = (
    *RECURRENT,
    # width of a residual stream
    (r"(\w+_)?hidden_size|d_model|n_embd|(\w+_)?hidden_dim|dim|d_embed|model_dim|emb_dim|residual_size", WIDTH),
    (
        r"(text_|vision_|backbone_|decoder_|encoder_|audio_)(embed_dim|dim|width)|width|embed_dim|word_embed_proj_dim",
        WIDTH,
    ),
    (r"(\w+_)?projection_dim|proj_dim|output_dim|adapter_out_dim|projection_size|output_hidden_size", WIDTH),
    (r"embedding_size|embedding_dim|lru_width|attention_hidden_size|projector_hidden_size|pooler_output_size", WIDTH),
    # width of an FFN
    (
        r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_(hidden_)?(dim|size)|d_ff|n_inner|mlp_dim|d_inner|dim_feedforward",
        FFN,
    ),
    (r"(\w+_)?moe_(shared_expert_)?intermediate_size|intermediate_dim|ffn_size|feed_forward_size", FFN),
    # heads
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|head)|attn_heads|num_attn_heads", HEADS),
    (r"(\w+_)?num_(key_value|kv)_heads|num_kv_heads|n_kv_heads|cross_attn_num_key_value_heads", KV_HEADS),
    (r"(\w+_)?head_dim|dim_head|attention_head_size|d_head|kv_channels|attention_key_size|d_kv|head_size", HEAD_DIM),
    # depth
    (r"(\w+_)?num_(hidden_)?layers|n_layers?|layers|(\w+_)?depth|num_blocks|(encoder|decoder)_layers", LAYERS),
    (r"num_(encoder|decoder|self_attention|vision|dec|block)_(layers|blocks)|(text|vision|xl)_layers", LAYERS),
    *LATENT,
    *EXPERTS,
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    # text
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input|vocabulary_size|vocab_sizes", VOCAB),
    (r"(\w+_)?max_position_embeddings|n_positions|max_seq_len(gth)?|(\w+_)?context_length|n_ctx", 128),
    (r"(attention_)?sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", 8),
    *IMAGES_AND_SOUNDS,
)
LAYER_LISTS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "attention_types")
LAYER_MAPS = ("no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "no_rope_layer_interval")


def small(name: str, value: Any) -> Any:
    """See `eas_search.models.twin.small`; here the depth becomes small, too."""
    return twin.small(name, value, FIELDS)


def shrink(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Make `config` tiny in place; `overrides` are exact values by dotted path (`text_config.head_dim`)."""
    special: dict[int, int] = {}
    single = {id(part): _single_layers(part) for part in sub_configs(config)}
    for part in sub_configs(config):
        _shrink_fields(part)
        _renumber(part, special)
    for path, value in (overrides or {}).items():
        owner, _, name = path.rpartition(".")
        target: Any = config
        for step in owner.split(".") if owner else ():
            target = getattr(target, step)
        setattr(target, name, value)
    for part in sub_configs(config):
        _settle_lists(part)
        if own := single.get(id(part)):
            kinds = part.layer_types
            part.per_layer_config = {i: own[kind] for i, kind in enumerate(kinds) if own.get(kind)}
    return config


def _single_layers(config: Any) -> dict[str, dict[str, Any]]:
    """Fields that differ between layers, by layer type and made small; `config` becomes uniform."""
    spec = vars(config).get("_heterogeneity_spec")
    if spec is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for i, kind in enumerate(config.layer_types):
        found.setdefault(kind, {name: small(name, v) for name, v in spec.per_layer_overrides.get(i, {}).items()})
    config.per_layer_config = None
    return found


def _shrink_fields(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == "chunk_size_feed_forward":
            continue
        if isinstance(value, tuple | list) and re.fullmatch(r"(\w+_)?(image_size|patch_size)", name):
            tiny = [small(name, entry) if len(value) == 2 or i > 0 else entry for i, entry in enumerate(value)]
            setattr(config, name, type(value)(tiny))
        elif (tiny := small(name, value)) != value:
            setattr(config, name, tiny)
    rank = getattr(config, "kv_lora_rank", None)
    if rank and isinstance(getattr(config, "qk_rope_head_dim", None), int):
        for name, value in (("num_key_value_heads", HEADS), ("head_dim", config.qk_rope_head_dim)):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, value)
    for name in ("n_group", "num_expert_group"):
        if (getattr(config, name, None) or 1) > 1:
            setattr(config, name, 2)
            config.topk_group = 1


def _renumber(config: Any, special: dict[int, int]) -> None:
    """Special token ids beyond the tiny vocabulary, the same new one for the same old one in every part."""
    for name, value in list(vars(config).items()):
        if not re.fullmatch(r"(\w+_)?token_(id|index)|image_token|(\w+_)?token_ids", name):
            continue

        def new(old: Any) -> Any:
            if isinstance(old, bool) or not isinstance(old, int) or old < FIRST_SPECIAL_ID:
                return old
            return special.setdefault(old, FIRST_SPECIAL_ID + len(special) % (VOCAB - FIRST_SPECIAL_ID))

        setattr(config, name, [new(entry) for entry in value] if isinstance(value, list) else new(value))


def layers_of(config: Any) -> int:
    """The number of layers of a configuration."""
    return next(
        (n for name in ("num_hidden_layers", "depth") if isinstance(n := getattr(config, name, None), int)), LAYERS
    )


def _settle_lists(config: Any) -> None:
    """Lists with one entry per layer, and others whose length or range follows from the small sizes."""
    layers = layers_of(config)
    for name in LAYER_LISTS:
        kinds = vars(config).get(name)
        if isinstance(kinds, list | tuple) and kinds and isinstance(kinds[0], str) and len(kinds) != layers:
            distinct = list(dict.fromkeys(kinds))
            setattr(config, name, [distinct[i % len(distinct)] for i in range(layers)])
    for name in LAYER_MAPS:
        values = vars(config).get(name)
        if isinstance(values, list | tuple) and values:
            setattr(config, name, list(values)[:layers])
    for name in (
        "deepstack_visual_indexes",
        "fullatt_block_indexes",
        "global_attn_indexes",
        "intermediate_layers_indices",
    ):
        values = vars(config).get(name)
        if isinstance(values, list | tuple) and values:
            setattr(config, name, type(values)(sorted({i * layers // len(values) for i in range(len(values))})))
    _settle_towers(config, layers)
    head = vars(config).get("head_dim") or HEAD_DIM
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict):
        if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
            rope.setdefault("mrope_section", [1, 1, 1])
        _settle_rope(rope, head)


def _settle_towers(config: Any, layers: int) -> None:
    """Lists of vision and audio towers: widths of convolutions, places where features are taken."""
    if isinstance(vars(config).get("conv_dim"), list | tuple):  # feature extractors of raw audio
        config.conv_dim = type(config.conv_dim)([16] * len(config.conv_dim))
    if vars(config).get("image_grid_pinpoints"):
        config.image_grid_pinpoints = [[IMAGE, IMAGE]]
    for name in ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_layer"):
        values = vars(config).get(name)
        if isinstance(values, list | tuple):
            setattr(config, name, type(values)(-1 - i % layers for i in range(len(values))))
    if isinstance(vars(config).get("stage_names"), list):
        depths = vars(config).get("depths")
        stages = len(depths) if isinstance(depths, list | tuple) else layers
        config.stage_names = ["stem", *(f"stage{i + 1}" for i in range(stages))]
        config.set_output_features_output_indices(out_features=None, out_indices=[stages])


def _settle_rope(rope: dict[str, Any], head_dim: Any) -> None:
    for name, value in rope.items():
        if isinstance(value, dict):
            _settle_rope(value, head_dim)
        elif isinstance(value, list | tuple) and isinstance(head_dim, int):
            pairs = int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
            if name == "mrope_section":
                rope[name] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3][: len(value)]
            else:
                rope[name] = list(value)[:pairs]
