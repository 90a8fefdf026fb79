"""Images and sounds in the forms in which the models of `transformers` take them."""

from __future__ import annotations

from typing import Any

import torch
from shrink import IMAGE
from torch import Tensor

from eas_search.models.twin import sub_configs


def first_of(config: Any, *names: str) -> Any:
    """The first non-empty value that any part of the configuration has under one of these names."""
    parts = list(sub_configs(config))
    return next((value for name in names for part in parts if (value := getattr(part, name, None))), None)


def pictures(config: Any, batch: int, takes: set[str], generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Forms in which models take one image per sample; none when the model takes no images."""
    if not {"pixel_values", "grid_thw", "pixel_values_videos"} & takes:
        return []
    channels, size = first_of(config, "num_channels"), first_of(config, "image_size") or IMAGE
    height, width = size[-2:] if isinstance(size, tuple | list) else (size, size)
    image = torch.randn(batch, channels if isinstance(channels, int) else 3, height, width, generator=generator)
    sizes = torch.tensor([[height, width]] * batch)
    forms: list[dict[str, Tensor]] = []
    if {"image_grid_thw", "grid_thw", "spatial_shapes"} & takes:
        forms += packed(config, image, takes, generator)
    if "image_sizes" in takes:
        forms.append({"pixel_values": torch.stack([image, image.flip(-1)], dim=1), "image_sizes": sizes})
        forms.append({"pixel_values": image, "image_sizes": sizes})
    forms.append({"pixel_values": image})
    if "aspect_ratio_ids" in takes:
        ones = torch.ones(batch, 1, dtype=torch.long)
        tiles = {"aspect_ratio_ids": ones, "aspect_ratio_mask": ones.unsqueeze(-1)}
        forms.append({"pixel_values": image[:, None, None], **tiles})
    if "pixel_attention_mask" in takes:
        seen = torch.ones(batch, 1, height, width, dtype=torch.bool)
        forms.append({"pixel_values": image.unsqueeze(1), "pixel_attention_mask": seen})
    forms.append({"pixel_values": image.unsqueeze(1)})
    if "image_embeds_position_mask" in takes:  # Kosmos-2: the first tokens stand for the image
        places = torch.zeros(batch, 12, dtype=torch.long)
        places[:, : config.latent_query_num] = 1
        forms.append({"pixel_values": image, "image_embeds_position_mask": places})
    frames = first_of(config, "num_frames") or 2
    video = image.unsqueeze(1).repeat(1, frames, 1, 1, 1)
    forms.append({"pixel_values": video})
    if "pixel_values" not in takes and "pixel_values_videos" in takes:
        forms = [{"pixel_values_videos": video}]
    return forms


def packed(config: Any, image: Tensor, takes: set[str], generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Forms in which models take images cut into patches."""
    batch, _, height, width = image.shape
    forms: list[dict[str, Tensor]] = []
    grid_name = next((name for name in ("image_grid_thw", "grid_thw") if name in takes), None)
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", 8)
    frames = next((f for n in ("temporal_patch_size", "patch_temporal") if (f := getattr(vision, n, None))), 1)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or image.shape[1]
    rows, columns = height // patch, width // patch
    flat = torch.randn(batch * rows * columns, channels * frames * patch * patch, generator=generator)
    first = "pixel_values" if "pixel_values" in takes else "hidden_states"
    if "spatial_shapes" in takes:
        shapes = torch.tensor([[rows, columns]] * batch)
        seen = torch.ones(batch, rows * columns, dtype=torch.long)
        forms.append(
            {first: flat.reshape(batch, rows * columns, -1), "pixel_attention_mask": seen, "spatial_shapes": shapes}
        )
    if grid_name:
        grid = torch.tensor([[1, rows, columns]] * batch)
        more = {}
        for name in ("image_merge_sizes", "merge_sizes"):
            if name in takes:
                more[name] = torch.full((batch,), getattr(vision, "spatial_merge_size", 1) or 1)
        forms.append({first: flat, grid_name: grid, **more})
        forms.append({first: flat.reshape(-1, channels, patch, patch * frames), grid_name: grid, **more})
    return forms


def sounds(config: Any, batch: int, takes: set[str], generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Forms in which models take one sound per sample: spectrograms and raw waves."""
    bins, frames = first_of(config, "num_mel_bins") or 16, 2 * (first_of(config, "max_source_positions") or 32)
    if getattr(config, "max_length", None) in (64, 128):
        frames = config.max_length
    shapes = ((batch, bins, frames), (batch, frames, bins), (batch, 4000), (batch, 1, 4000))
    names = [name for name in ("input_features", "input_values") if name in takes]
    forms = [{name: torch.randn(shape, generator=generator)} for name in names for shape in shapes]
    mask = next((name for name in ("input_features_mask", "feature_attention_mask") if name in takes), None)
    if mask is None:
        return forms
    spectrograms = [form for form in forms if next(iter(form.values())).dim() == 3]
    return forms + [{**form, mask: torch.ones(batch, frames, dtype=torch.long)} for form in spectrograms]
