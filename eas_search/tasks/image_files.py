"""Opening pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from eas_search.exceptions import TaskDataError


def open_image(image: Any) -> Any:
    """The picture itself, in colour, from a picture, a file, or a file's bytes. Raises TaskDataError if it is none."""
    from PIL import Image

    if not isinstance(image, Path) and hasattr(image, "read_bytes"):
        image = image.read_bytes()  # kept inside another file, see `arrow.ArrowImage`
    if not isinstance(image, Path | bytes):
        return image
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:  # what is no picture raises an OSError, too
        name = f"{len(image)} bytes" if isinstance(image, bytes) else f"'{image}'"
        reason = getattr(error, "strerror", None) or "not a picture"
        raise TaskDataError(
            f"image {name} cannot be read ({reason}); expected a picture such as PNG or JPEG; check --data."
        ) from error
