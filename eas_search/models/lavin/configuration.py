"""Configuration of LaVIN: a LLaMA, a CLIP vision tower, and the small parts that join them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "lavin"


class LavinConfig(PreTrainedConfig):
    """Shape of a LaVIN model (Luo et al., arXiv 2305.15023); the defaults are those of LaVIN-7B with CLIP ViT-L/14.

    Args:
        text_config: of the LLaMA, as an object or its dictionary.
        vision_config: of CLIP's vision tower.
        vision_feature_layers: layers of the vision tower, counted from 1, whose class token is an image feature; None:
            every fourth one.
        projection_dim: width of the bottleneck between image features and text embeddings.
        modality_token_ids: placeholders for the embedding of text-only and of image-and-text samples. They may lie
            outside the vocabulary: they are never looked up.
        image_token_id: placeholder of one image feature.
        kwargs: see `PreTrainedConfig`.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | LlamaConfig | None = None,
        vision_config: dict[str, Any] | CLIPVisionConfig | None = None,
        vision_feature_layers: Sequence[int] | None = None,
        projection_dim: int = 128,
        modality_token_ids: Sequence[int] = (32000, 32001),
        image_token_id: int = 32002,
        **kwargs: Any,
    ) -> None:
        self.text_config = _built(LlamaConfig, text_config)
        self.vision_config = _built(CLIPVisionConfig, vision_config or _VIT_L)
        layers = range(4, self.vision_config.num_hidden_layers + 1, 4)
        self.vision_feature_layers = list(layers if vision_feature_layers is None else vision_feature_layers)
        if not all(1 <= layer <= self.vision_config.num_hidden_layers for layer in self.vision_feature_layers or (0,)):
            raise ValueError(
                f"vision_feature_layers is {self.vision_feature_layers}; expected layers from 1 to "
                f"{self.vision_config.num_hidden_layers}, by default every fourth"
            )
        self.projection_dim = projection_dim
        self.modality_token_ids = list(modality_token_ids)
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def image_seq_length(self) -> int:
        """Image features, and so placeholders, per image."""
        return len(self.vision_feature_layers)


_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def _built(kind: Any, values: Any) -> Any:
    return kind(**(values or {})) if isinstance(values, dict | None) else values


AutoConfig.register(MODEL_TYPE, LavinConfig, exist_ok=True)
