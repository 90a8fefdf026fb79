"""METER (Dou et al., arXiv 2111.02387): CLIP's vision transformer, RoBERTa, and two streams of co-attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertPooler
from transformers.utils import ModelOutput

from eas_search.models.meter.configuration import MeterConfig
from eas_search.models.meter.layers import MeterCrossLayer


@dataclass
class MeterModelOutput(ModelOutput):
    """What `MeterModel` gives for B texts of n tokens with m images of p tokens each.

    Attributes:
        text_features: [B·m, n, d] the text stream, once per image.
        image_features: [B·m, p, d] the image stream; its first token is the class token.
        pooler_output: [B, m·2d] first tokens of both streams after their poolers, (text, image) per image.
    """

    text_features: Tensor | None = None
    image_features: Tensor | None = None
    pooler_output: Tensor | None = None


class MeterPreTrainedModel(PreTrainedModel):
    """What the models of this folder have in common."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["MeterCrossLayer", "CLIPEncoderLayer", "RobertaLayer"]

    @property
    def trained_with_adapters(self) -> tuple[str, ...]:
        """Parameters that METER-EAS trains in any case: poolers, token types, and the head of the task."""
        parts = ("cross_modal_text_pooler", "cross_modal_image_pooler", "token_type_embeddings")
        heads = ("classifier", "rank_output")
        names = [name for name, _ in self.named_parameters()]
        return tuple(n for n in names if n.split(".")[0] in heads or set(parts) & set(n.split(".")[:2]))


class MeterModel(MeterPreTrainedModel):
    """Both encoders and the co-attention layers.

    In every layer both streams read each other as they were before it. Text has token type 0, image j has type 1 + j.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.text_model = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, d)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, d)
        self.token_type_embeddings = nn.Embedding(1 + config.num_images, d)
        self.cross_modal_text_layers = self._layers()
        self.cross_modal_image_layers = self._layers()
        self.cross_modal_text_pooler = BertPooler(config)
        self.cross_modal_image_pooler = BertPooler(config)
        self.post_init()

    def _layers(self) -> nn.ModuleList:
        return nn.ModuleList(MeterCrossLayer(self.config) for _ in range(self.config.num_hidden_layers))

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The image stream before token types, [N, p, d], of images [N, 3, H, W]."""
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state
        stream: Tensor = self.cross_modal_image_transform(self.vision_model.post_layernorm(patches))
        return stream

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MeterModelOutput:
        """Texts [B, n] and images [B, 3, H, W], or [B, m, 3, H, W] for m images per text, to features of both streams.

        Args:
            input_ids: tokens; with C times as many rows as images, C texts in a row belong to the same images.
            pixel_values: images of the configured size.
            attention_mask: [B, n], 1 for real tokens; None: all are.
            kwargs: `return_dict` and the like are accepted and without effect.
        """
        images = pixel_values.unsqueeze(1) if pixel_values.dim() == 4 else pixel_values
        m = images.shape[1]
        if m != self.config.num_images:
            raise ValueError(f"pixel_values has {m} images per text, expected num_images = {self.config.num_images}")
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        text = self.cross_modal_text_transform(text).repeat_interleave(m, dim=0)
        image = self.get_image_features(images.flatten(0, 1))
        if len(input_ids) != len(images):
            of_text = image.unflatten(0, images.shape[:2])
            image = of_text.repeat_interleave(len(input_ids) // len(images), dim=0).flatten(0, 1)
        types = torch.arange(1, 1 + m, device=image.device).repeat(len(input_ids)).unsqueeze(1)
        # They may be trained in a higher precision than the rest.
        text = text + self.token_type_embeddings.weight[0].to(text.dtype)
        image = image + self.token_type_embeddings(types).to(image.dtype)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(m, dim=0)
        text, image = self._attend(text, image, attention_mask)
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return MeterModelOutput(text, image, pooled.view(len(input_ids), -1))

    def _attend(self, text: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The co-attention layers; images have no padding."""
        among_text = create_bidirectional_mask(self.config, text, mask)
        from_image = create_bidirectional_mask(self.config, image, mask, encoder_hidden_states=text)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = text_layer(text, image, among_text, None), image_layer(image, text, None, from_image)
        return text, image
