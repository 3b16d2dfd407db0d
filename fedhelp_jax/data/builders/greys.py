"""Radiographs as grey images of 8 bits, from whatever modes their publishers stored them in."""

import io

import numpy as np
from PIL import Image

from fedhelp_jax.data.builders.base import decoded, png
from fedhelp_jax.data.downloads import KEY
from fedhelp_jax.errors import UserError

# Of 8 bits a channel or fewer; of more, nobody could tell which grey is white.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def grey(data: bytes, name: str) -> Image.Image:
    """An image file's grey image, mode L; colours by their luma, transparency left out.

    Args:
      data: The file.
      name: Its name, for the message.

    Raises:
      UserError: If it is damaged, no image, or of more than 8 bits a channel.
    """
    image = decoded(data, name)
    mode, _ = _header(data)
    if mode not in _MODES:
        raise UserError(f"{KEY}: {name} must have 8 bits a channel, is of Pillow's mode {mode}")
    return image.convert("L")


def grey_png(data: bytes, name: str) -> tuple[bytes, Image.Image]:
    """An image file as a grey PNG file, unchanged if it is one, and its grey image.

    Raises:
      UserError: As of :func:`grey`.
    """
    image = grey(data, name)
    return (data if _header(data) == ("L", "PNG") else png(np.asarray(image))), image


def _header(data: bytes) -> tuple[str, str | None]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.format
