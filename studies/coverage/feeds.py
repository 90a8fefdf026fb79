"""Inputs of a tiny model, by the signature of its forward pass and its configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from shrink import FIRST_SPECIAL_ID, WIDTH
from torch import Tensor, nn
from towers import pictures, sounds

from eas_search.models.twin import sub_configs

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_index")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


def ordinary_tokens(config: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random token ids that are no special token of `config`."""
    special: set[int] = set()
    for part in sub_configs(config):
        for name, value in vars(part).items():
            if "token" in name or name.endswith("_id"):
                special |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    free = torch.tensor([i for i in range(3, FIRST_SPECIAL_ID) if i not in special])
    return free[torch.randint(len(free), shape, generator=generator)]


def inputs(model: nn.Module, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Arguments of `model.forward`: text of `length` tokens, with an image (audio) where the model takes one."""
    errors = []
    for feed in _feeds(model, batch, length):
        for _ in range(3):
            try:
                with torch.no_grad():
                    model(**feed)
                return feed
            except Exception as error:  # tried in turn; the last one is raised below
                errors.append(error)
                feed = _count_image_tokens(model, feed, error)  # noqa: PLW2901
                if feed is None:
                    break
    raise errors[0]


def _feeds(model: Any, batch: int, length: int) -> list[dict[str, Tensor]]:
    """Candidate inputs, the richest first."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    takes = set(inspect.signature(model.forward).parameters)
    if "past_values" in takes and hasattr(config, "num_input_channels"):
        shape = (batch, config.context_length, config.num_input_channels)
        return [{"past_values": torch.randn(shape, generator=generator)}]
    text = _text(config, takes, (batch, length), generator)
    without_ids = {name: value for name, value in text.items() if name not in ("input_ids", "attention_mask")}
    feeds = []
    token, audio = _special(config, IMAGE_TOKENS), _special(config, AUDIO_TOKENS)
    for picture in pictures(config, batch, takes, generator):
        if token is not None and "input_ids" in text:
            feeds += [{**_with_image_tokens(text, token, count), **picture} for count in (16, 4)]
        else:
            feeds += [{**text, **picture}, picture]
    heard = sounds(config, batch, takes, generator)
    if audio is not None and "input_ids" in text:
        feeds += [{**_with_image_tokens(text, audio, 4), **sound} for sound in heard]
    feeds += [{**text, **sound} for sound in heard]
    feeds += [{**without_ids, **sound} for sound in heard]
    return [*feeds, text]


def _special(config: Any, names: tuple[str, ...]) -> int | None:
    return next((token for name in names if isinstance(token := getattr(config, name, None), int)), None)


def _text(config: Any, takes: set[str], shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Whatever goes with tokens."""
    batch, length = shape
    ids = ordinary_tokens(config, shape, generator)
    text: dict[str, Tensor] = {}
    if "input_ids" in takes:
        text["input_ids"] = ids
        if "attention_mask" in takes:
            text["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in takes and any(getattr(part, "is_encoder_decoder", False) for part in sub_configs(config)):
        text["decoder_input_ids"] = ordinary_tokens(config, (batch, length - 4), generator)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in takes and "input_ids" in takes and "pixel_values" in takes:
            text[name] = torch.zeros_like(ids)
    if "bbox" in takes:
        corner = torch.randint(0, 50, (batch, length, 2), generator=generator)
        text["bbox"] = torch.cat([corner, corner + 20], dim=-1)
    if "qformer_input_ids" in takes:
        text["qformer_input_ids"] = ordinary_tokens(config, (batch, 6), generator)
    if "flattened_patches" in takes:
        width = config.vision_config.patch_embed_hidden_size
        places = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)).expand(batch, -1, -1)
        text["flattened_patches"] = torch.cat([places, torch.randn(batch, 16, width, generator=generator)], dim=-1)
    return text


def _with_image_tokens(text: dict[str, Tensor], token: int, count: int) -> dict[str, Tensor]:
    ids = text["input_ids"]
    ids = ids[:, ids[0] != token]
    image = torch.full((ids.shape[0], count), token)
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], dim=1)
    out = {**text, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in text:
            out[name] = (ids == token).long()
    return out


def _count_image_tokens(model: Any, feed: dict[str, Tensor], error: Exception) -> dict[str, Tensor] | None:
    """The same inputs with as many image tokens as the model's complaint says it has image features."""
    found = re.search(r"tokens: (\d+),? features:? (\d+)", str(error))
    names = IMAGE_TOKENS if "pixel_values" in feed else AUDIO_TOKENS
    token = _special(model.config, names)
    if found is None or token is None or "input_ids" not in feed:
        return None
    tokens, features, batch = int(found[1]), int(found[2]), feed["input_ids"].shape[0]
    if tokens == features:  # some models count numbers, not vectors
        features //= WIDTH
    return _with_image_tokens(feed, token, features // batch) if features % batch == 0 and features < 600 else None
