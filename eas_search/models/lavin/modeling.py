"""LaVIN (Luo et al., arXiv 2305.15023) on the LLaMA and CLIP of `transformers`, without its adapters.

The adapters are those of this library: `apply_skips` puts them in. What is here is what they are put into:

    image features   f_j = class token after every fourth layer of CLIP's vision tower, without the final norm
    image embeddings e_j = W_up silu(W_down f_j)
    input            [modality, BOS, prefix, e_1 … e_K, text]; the prefix says that there is an image, or none
    attention        causal, and nobody but the modality token sees the modality token

Tokens that stand for an embedding are placeholders in `input_ids`, so that masks, labels and the KV cache have the
length of the input. Positions are counted from the modality token on, in one piece or token by token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.configuration import LavinConfig
from eas_search.models.lavin.masking import check_prompts, modality_mask


class LavinPreTrainedModel(PreTrainedModel):
    """What `transformers` must know of the model."""

    config: LavinConfig
    config_class = LavinConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False  # it has no mask that hides one token
    _supports_flex_attn = False


class Projector(nn.Module):
    """Image features [B, K, d_vision] → image embeddings [B, K, d_text]."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.up = nn.Linear(config.projection_dim, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.up(nn.functional.silu(self.down(features.to(self.down.weight.dtype))))


class LavinModel(LavinPreTrainedModel):
    """LaVIN without its output layer."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.projector = Projector(config)
        self.modality_embedding = nn.Embedding(2, config.text_config.hidden_size)
        self.language_model = LlamaModel._from_config(config.text_config)
        self.post_init()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Class tokens of the chosen layers, [B, K, d_vision], for `pixel_values` [B, 3, H, W]."""
        pixels = pixel_values.to(self.vision_tower.dtype)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        return torch.stack([states[layer][:, 0] for layer in self.config.vision_feature_layers], dim=1)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Image embeddings, [B, K, d_text], for `pixel_values` [B, 3, H, W]."""
        embeds: Tensor = self.projector(self.image_features(pixel_values))
        return embeds

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Input embeddings [B, n, d_text]; `pixel_values` has one image for every row with an image's modality token.

        Raises:
            ConfigError: images and placeholders do not fit together.
        """
        text_id, image_id = self.config.modality_token_ids
        with_image, image = input_ids == image_id, input_ids == self.config.image_token_id
        modality = with_image | (input_ids == text_id)
        table = self.get_input_embeddings()
        embeds = table(input_ids.masked_fill(modality | image, 0))
        chosen = self.modality_embedding(with_image.long()).to(embeds.dtype)
        embeds = torch.where(modality.unsqueeze(-1), chosen, embeds)
        if pixel_values is None:
            return embeds
        features = self.get_image_features(pixel_values).to(embeds)
        rows = with_image.any(dim=1).nonzero().flatten()
        if len(rows) != len(features) or int(image.sum(dim=1).max()) > features.shape[1]:
            raise ConfigError(
                f"{len(features)} images with {features.shape[1]} features each do not fit {len(rows)} samples with "
                f"an image and up to {int(image.sum(dim=1).max())} placeholders; expected one image per sample: "
                "prepare the inputs with LavinProcessor"
            )
        # Truncation may have cut off the last placeholders of a row, so features go by their rank in it.
        per_row = embeds.new_zeros(len(embeds), *features.shape[1:]).index_copy(0, rows, features)
        rank = (image.cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1).expand_as(embeds)
        rank = rank.clamp(max=features.shape[1] - 1)
        return torch.where(image.unsqueeze(-1), per_row.gather(1, rank), embeds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, n, d_text] of `input_ids` or `inputs_embeds`.

        Raises:
            ConfigError: inputs that `LavinProcessor` would not make.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            begins = past_key_values is None or past_key_values.get_seq_length() == 0
            if begins and (attention_mask is None or attention_mask.dim() == 2):
                check_prompts(self.config, input_ids, attention_mask, pixel_values is not None)
            inputs_embeds = self.embed(input_ids, pixel_values)
        mask = modality_mask(self.language_model.config, inputs_embeds, attention_mask, past_key_values)
        output: BaseModelOutputWithPast = self.language_model(
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return output
