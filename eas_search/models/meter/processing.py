"""From texts and images to the inputs of METER."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def meter_processor(tokenizer: Any, image_size: int) -> CLIPProcessor:
    """RoBERTa's tokenizer and CLIP's preprocessing: the shorter edge resized (bicubic), the centre cropped.

    Args:
        tokenizer: the one of the text encoder.
        image_size: edge in pixels, that of the model's `vision_config`.
    """
    crop = {"height": image_size, "width": image_size}
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop), tokenizer)


def save_folder(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Write model and processor as one folder in the Hugging Face layout."""
    model.save_pretrained(folder)
    meter_processor(tokenizer, model.config.vision_config.image_size).save_pretrained(folder)
