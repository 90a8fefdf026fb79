"""What the rules of `shrink` do not know about single model types, as data."""

from __future__ import annotations

from typing import Any

from shrink import HEAD_DIM, HEADS, VOCAB, WIDTH

# Model types whose first task of `tiny.TASKS` is not the one to test.
CLASSES: dict[str, tuple[str, ...]] = {}

_IMAGE_TOKEN = 121
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": 64, "frequency_stride": 8, "time_stride": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blip-2": {"image_token_index": _IMAGE_TOKEN},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_routed_experts": 4, "num_key_value_heads": HEADS},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"vocab_size": VOCAB},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "florence2": {
        "vision_config.embed_dim": [16, 16, 32, 32],
        "vision_config.num_heads": [2, 2, 2, 2],
        "vision_config.num_groups": [2, 2, 2, 2],
        "vision_config.depths": [1, 1, 1, 1],
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": WIDTH // 4},
    "glm5_next": {"text_config.index_kpool": 4},
    "glm5_next_text": {"index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": WIDTH},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "instructblip": {"image_token_index": _IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": _IMAGE_TOKEN},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32},
    "laguna": {"num_attention_heads_per_layer": [HEADS] * 4},
    "led": {"attention_window": [4] * 4},  # divides the study's 12 tokens
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": [4] * 4},
    "ministral": {"head_dim": HEAD_DIM},
    "mistral4": {"head_dim": HEAD_DIM, "qk_rope_head_dim": 8},
    "mistral_large4": {"text_config.head_dim": HEAD_DIM, "text_config.kv_source_layers": [0, 1, 2, 3]},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3]},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "nemotron": {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 16},
    "pocket_tts": {"flow_head_config.condition_dim": WIDTH},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16)},
    "speech_to_text": {"conv_channels": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"mamba_headdim": HEAD_DIM, "n_mamba_heads": 8, "attention_head_dim": 2 * HEAD_DIM},
}
for _swin in ("swin", "swinv2", "donut-swin", "maskformer-swin", "dinat", "swin2sr"):
    OVERRIDES[_swin] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "hidden_size": WIDTH}
