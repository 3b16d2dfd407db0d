"""Converts radiographs to grey images of 8 bits, whatever mode their publishers stored them in."""

import numpy as np
from PIL import Image

from fedhelp_jax.data.builders.base import decoded, png


def grey(data: bytes, name: str) -> Image.Image:
    """Returns an image file as a grey image of mode L, using the luma and ignoring transparency.

    Args:
      data: Contents of the file.
      name: Its name, for the message.

    Raises:
      UserError: If it is damaged, is not an image, or has more than 8 bits per channel.
    """
    return _grey(decoded(data, name))


def grey_png(data: bytes, name: str) -> tuple[bytes, Image.Image]:
    """Returns an image file as a grey PNG file (unchanged if it is one), and its grey image.

    Raises:
      UserError: As in :func:`grey`.
    """
    image = decoded(data, name)
    if (image.mode, image.format) == ("L", "PNG"):
        return data, image
    image = _grey(image)
    return png(np.asarray(image)), image


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("RGB").convert("L")
