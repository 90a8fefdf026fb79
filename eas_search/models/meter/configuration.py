"""`MeterConfig`: the sizes of METER (Dou et al., arXiv 2111.02387), by default those of METER-CLIP16-RoBERTa."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig

TEXT = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# METER leaves out CLIP's last layer: 11 of 12.
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 288,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}


class MeterConfig(PreTrainedConfig):
    """Sizes of the two encoders and of the co-attention layers.

    Attributes:
        text_config: RoBERTa's.
        vision_config: of CLIP's vision transformer; its image size is the resolution that the model reads.
        hidden_size, intermediate_size, num_attention_heads: of the co-attention layers.
        num_hidden_layers: co-attention layers per stream.
        num_images: images per text; 1 for VQAv2 and retrieval, 2 for NLVR2.
        skipped_cross_reads: what stands in for a skipped cross-attention reads on its own stream: what the attention
            would have read (`attention_input`), or the input of the whole layer (`layer_input`, the published code),
            see `MeterCrossLayer`.
    """

    model_type = "meter"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": RobertaConfig,
        "vision_config": CLIPVisionConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_hidden_layers: int = 6
    num_images: int = 1
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    skipped_cross_reads: str = "attention_input"
    is_decoder: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make configurations of the encoders' dictionaries; what they do not say is that of METER-CLIP16-RoBERTa."""
        for name, defaults in (("text_config", TEXT), ("vision_config", VISION)):
            given = getattr(self, name)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, name, self.sub_configs[name](**{**defaults, **(given or {})}))
        if self.skipped_cross_reads not in ("attention_input", "layer_input"):
            raise ValueError(
                f"skipped_cross_reads is {self.skipped_cross_reads!r}, expected 'attention_input' or 'layer_input'"
            )
        super().__post_init__(**kwargs)
