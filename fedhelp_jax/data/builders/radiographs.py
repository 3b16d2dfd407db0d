"""Radiographs as grey images of 8 bits, from whatever modes their publishers stored them in."""

import numpy as np
from PIL import Image

from fedhelp_jax.data.builders.base import decoded, png


def grey(data: bytes, name: str) -> Image.Image:
    """An image file's grey image, mode L; colours by their luma, transparency left out.

    Args:
      data: The file.
      name: Its name, for the message.

    Raises:
      UserError: If it is damaged, no image, or of more than 8 bits a channel.
    """
    return _grey(decoded(data, name))


def grey_png(data: bytes, name: str) -> tuple[bytes, Image.Image]:
    """An image file as a grey PNG file, unchanged if it is one, and its grey image.

    Raises:
      UserError: As of :func:`grey`.
    """
    image = decoded(data, name)
    if (image.mode, image.format) == ("L", "PNG"):
        return data, image
    image = _grey(image)
    return png(np.asarray(image)), image


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("RGB").convert("L")
