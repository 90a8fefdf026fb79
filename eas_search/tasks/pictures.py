"""Pictures as a model with separate inputs for text and image gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError
from eas_search.tasks.image_files import open_image

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256  # pictures that the image processor gets at once; bounds the memory of raw ones


def picture_tensor(processor: Any, pictures: Sequence[Any]) -> Tensor:
    """`pixel_values` [N, 3, H, W] of pictures, files or their bytes, by the model's image processor.

    Raises:
        TaskDataError: a picture cannot be read, or the processor gives no single size to all.
    """
    import torch

    images = getattr(processor, "image_processor", processor)
    values = []
    for start in range(0, len(pictures), CHUNK):
        opened = [open_image(picture) for picture in pictures[start : start + CHUNK]]
        values.append(images(images=opened, return_tensors="pt")["pixel_values"])
    if len({value.shape[1:] for value in values}) > 1:
        raise TaskDataError(
            f"image processor '{type(images).__name__}' gives pictures of different sizes; expected one size for all: "
            "let it crop or resize to a fixed height and width (preprocessor_config.json)."
        )
    return torch.cat(values)
