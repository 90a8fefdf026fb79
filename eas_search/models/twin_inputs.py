"""Inputs of a tiny twin, by the signature of its forward pass and its configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.models.twin import FIRST_SPECIAL_ID, IMAGE, PATCH, WIDTH, quiet, sub_configs

BATCH, LENGTH = 2, 12
# What stands in the text for an image or a sound, by the argument that carries it.
MARKS = {
    "pixel_values": ("image_token_id", "image_token_index", "video_token_index"),
    "input_features": ("audio_token_id", "audio_token_index"),
}
TYPES: tuple[str, ...] = ("token_type_ids", "mm_token_type_ids")
Feed = dict[str, Tensor]


def twin_inputs(twin: nn.Module) -> Feed:
    """Arguments with which the twin's forward pass runs: its text with an image or a sound where it takes one.

    Raises:
        Exception: what the twin raised for the first of the forms that were tried, when none runs.
    """
    errors: list[Exception] = []
    for feed in _feeds(twin):
        attempt: Feed | None = feed
        for _ in range(3):
            if attempt is None:
                break
            try:
                with torch.no_grad(), quiet():
                    twin(**attempt)
                return attempt
            except Exception as error:  # tried in turn; the first is raised below
                errors.append(error)
                attempt = _recount(twin, attempt, error)
    raise errors[0]


def ordinary_tokens(
    config: Any, shape: tuple[int, ...], generator: torch.Generator, words: int = FIRST_SPECIAL_ID
) -> Tensor:
    """Random ids below `words` that are no special token of a configuration, nor beyond its vocabulary."""
    special: set[int] = set()
    for part in sub_configs(config):
        words = min(words, size) if type(size := getattr(part, "vocab_size", None)) is int else words
        for name, value in vars(part).items():
            if "token" in name or name.endswith("_id"):
                special |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    free = torch.tensor([i for i in range(words) if i not in special])
    return free[torch.randint(len(free), shape, generator=generator)]


def _feeds(twin: Any) -> Iterator[Feed]:
    """Candidates, the richest first."""
    config, generator = twin.config, torch.Generator().manual_seed(1)
    takes = set(inspect.signature(twin.forward).parameters)
    ids = ordinary_tokens(config, (BATCH, LENGTH), generator)
    text: Feed = {}
    if "input_ids" in takes:
        text["input_ids"] = ids
        if "attention_mask" in takes:
            text["attention_mask"] = torch.ones_like(ids)
        if "pixel_values" in takes:
            text |= {name: torch.zeros_like(ids) for name in TYPES if name in takes}
        if "qformer_input_ids" in takes:
            text["qformer_input_ids"] = ordinary_tokens(config, (BATCH, 6), generator)
    if "decoder_input_ids" in takes:
        text["decoder_input_ids"] = ordinary_tokens(config, (BATCH, LENGTH - 4), generator)
    for more in (*_pictures(config, takes, generator), *_sounds(config, takes, generator)):
        carrier = "pixel_values" if "pixel_values" in more else "input_features"
        if (mark := _mark(config, carrier)) is not None and "input_ids" in text:
            yield {**_with_marks(text, mark, 16 if carrier == "pixel_values" else 4), **more}
        yield {**text, **more}
        yield {**{k: v for k, v in text.items() if k == "decoder_input_ids"}, **more}
    yield text


def _mark(config: Any, carrier: str) -> int | None:
    return next((t for name in MARKS[carrier] if type(t := getattr(config, name, None)) is int), None)


def _with_marks(text: Feed, mark: int, count: int) -> Feed:
    """The text with `count` marks behind its second token."""
    ids = text["input_ids"][:, text["input_ids"][0] != mark]
    ids = torch.cat([ids[:, :2], torch.full((ids.shape[0], count), mark), ids[:, 2:]], dim=1)
    types = {name: (ids == mark).long() for name in TYPES if name in text}
    return {**text, "input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def _recount(twin: Any, feed: Feed, error: Exception) -> Feed | None:
    """The same inputs with as many marks as the model's complaint says that it has features."""
    found = re.search(r"tokens: (\d+),? features:? (\d+)", str(error))
    mark = _mark(twin.config, "pixel_values" if "pixel_values" in feed else "input_features")
    if found is None or mark is None or "input_ids" not in feed:
        return None
    tokens, features, batch = int(found[1]), int(found[2]), feed["input_ids"].shape[0]
    if tokens == features:  # some models count numbers, not vectors
        features //= WIDTH
    return _with_marks(feed, mark, features // batch) if features % batch == 0 and features < 600 else None


def _pictures(config: Any, takes: set[str], generator: torch.Generator) -> Iterator[Feed]:
    """Forms in which models take one image per sample."""
    if "pixel_values" not in takes:
        return
    parts = list(sub_configs(config))
    channels = next((c for part in parts if type(c := getattr(part, "num_channels", None)) is int), 3)
    size = next((s for part in parts if (s := getattr(part, "image_size", None))), IMAGE)
    height, width = size[-2:] if isinstance(size, tuple | list) else (size, size)
    image = torch.randn(BATCH, channels, height, width, generator=generator)
    sizes = {"image_sizes": torch.tensor([[height, width]] * BATCH)} if "image_sizes" in takes else {}
    vision = getattr(config, "vision_config", config)
    patch = next((p for part in (vision, *parts) if type(p := getattr(part, "patch_size", None)) is int), PATCH)
    rows, columns = height // patch, width // patch
    frames = getattr(vision, "temporal_patch_size", None) or 1
    flat = torch.randn(BATCH * rows * columns, channels * frames * patch * patch, generator=generator)
    if "image_grid_thw" in takes:
        yield {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, rows, columns]] * BATCH)}
    if "spatial_shapes" in takes:
        yield {
            "pixel_values": flat.reshape(BATCH, rows * columns, -1),
            "pixel_attention_mask": torch.ones(BATCH, rows * columns, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * BATCH),
        }
    if sizes:
        yield {"pixel_values": torch.stack([image, image.flip(-1)], dim=1), **sizes}
        yield {"pixel_values": image, **sizes}
    if "aspect_ratio_ids" in takes:
        ones = torch.ones(BATCH, 1, dtype=torch.long)
        tiles = {"aspect_ratio_ids": ones, "aspect_ratio_mask": ones.unsqueeze(-1)}
        yield {"pixel_values": image[:, None, None], **tiles}
    yield {"pixel_values": image}
    yield {"pixel_values": image.unsqueeze(1)}


def _sounds(config: Any, takes: set[str], generator: torch.Generator) -> Iterator[Feed]:
    """Forms in which models take one sound per sample."""
    parts = list(sub_configs(config))
    bins = next((b for part in parts if (b := getattr(part, "num_mel_bins", None))), 16)
    frames = 2 * next((n for part in parts if (n := getattr(part, "max_source_positions", None))), 32)
    if "input_features" in takes:
        yield {"input_features": torch.randn(BATCH, bins, frames, generator=generator)}
        yield {"input_features": torch.randn(BATCH, frames, bins, generator=generator)}
    if "input_values" in takes:
        yield {"input_values": torch.randn(BATCH, 4000, generator=generator)}
        yield {"input_values": torch.randn(BATCH, frames, bins, generator=generator)}
