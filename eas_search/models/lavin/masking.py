"""Who sees whom in LaVIN: each row begins with its modality token, which nobody else sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from eas_search.exceptions import ConfigError
from eas_search.models.lavin.configuration import LavinConfig


def first_visible(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where each row of `tokens` [B, n, …] begins, [B], by its mask [B, past + n]; None: at 0."""
    if attention_mask is None:
        return torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
    return attention_mask.long().argmax(dim=1).to(tokens.device)


def modality_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
) -> Tensor:
    """4-D causal mask that hides each row's first visible token, the modality token, from all others.

    Args:
        config: of the text tower.
        inputs_embeds: [B, n, d]; its sizes and dtype count.
        attention_mask: [B, past + n], or None when nothing is padded. One with four dimensions is returned as it is.
        past_key_values: the tokens before these.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    first = first_visible(inputs_embeds, attention_mask)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key != first[batch]) | (key == query)

    mask: Tensor = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=seen,
    )
    return mask


def check_prompts(config: LavinConfig, input_ids: Tensor, attention_mask: Tensor | None, has_images: bool) -> None:
    """Whether every row begins with a modality token, and has an image if it says so.

    Raises:
        ConfigError: one does not.
    """
    begins = input_ids.gather(1, first_visible(input_ids, attention_mask).unsqueeze(1))
    text_id, image_id = config.modality_token_ids
    if not bool(((begins == text_id) | (begins == image_id)).all()):
        raise ConfigError(
            f"a sample begins with token {int(begins[(begins != text_id) & (begins != image_id)][0])}; expected "
            f"LaVIN's modality token, {text_id} or {image_id}: prepare the inputs with LavinProcessor"
        )
    if not has_images and bool((begins == image_id).any()):
        raise ConfigError(
            "a sample has an image by its modality token, but there are no pixel_values; expected one image for "
            "it: prepare the inputs with LavinProcessor"
        )
