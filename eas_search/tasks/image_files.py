"""Opening pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = (255, 255, 255, 255)
SIXTEEN = 257  # 65535 / 255: what a step of 8 bits is in 16


def open_image(image: Any) -> Any:
    """The picture itself, in colour, from a picture, a file, or a file's bytes. Raises TaskDataError if it is none.

    See `in_colour` for what becomes of pictures that are not 8 bits of red, green and blue.
    """
    from PIL import Image

    if not isinstance(image, Path) and hasattr(image, "read_bytes"):
        image = image.read_bytes()  # kept inside another file, see `arrow.ArrowImage`
    if isinstance(image, Image.Image):
        return in_colour(image)
    if not isinstance(image, Path | bytes):
        return image
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            return in_colour(picture)
    except (OSError, Image.DecompressionBombError) as error:  # what is no picture raises an OSError, too
        name = f"{len(image)} bytes" if isinstance(image, bytes) else f"'{image}'"
        reason = getattr(error, "strerror", None) or "not a picture"
        raise TaskDataError(
            f"image {name} cannot be read ({reason}); expected a picture such as PNG or JPEG; check --data."
        ) from error


def in_colour(picture: Image) -> Image:
    """8 bits of red, green and blue, upright, as a person would see the picture.

    It is turned as its camera noted; what is transparent shows white; grey levels of 16 bits are divided by 257, those
    of 32 bits or in floating point have no fixed scale and are spread over their own range, from black to white.
    """
    from PIL import Image

    picture = _upright(picture)
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture).convert("RGB")
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, WHITE), coloured).convert("RGB")
    return picture.convert("RGB")


def _upright(picture: Image) -> Image:
    from PIL import ImageOps

    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged notes of a camera raise many kinds; the picture itself is whole
        return picture


def _eight_bits(picture: Image) -> Image:
    """Grey levels of more than 8 bits as 8. What is not finite counts as the darkest."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.rint(values / SIXTEEN).astype(np.uint8))
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.where(np.isfinite(values), values, low) - low
    return Image.fromarray(np.rint(values * (255 / (high - low) if high > low else 0.0)).astype(np.uint8))
