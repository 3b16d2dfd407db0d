"""Preprocessing of public images at their native size into a foundation model's input."""

import math
from typing import NamedTuple

import numpy as np

from fedhelp_jax.data.readers.images import resize_arrays
from fedhelp_jax.settings.schema import PIXEL_LAYOUTS, PIXEL_SCALES

# Mean and standard deviation per channel, for pixels in [0, 1]; None leaves pixels unchanged.
_STATISTICS = {
    "uint8": None,
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "signed": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class _Settings(NamedTuple):
    size: int | None
    scale: str
    layout: str


class Preprocessing(_Settings):
    """The preprocessing of an image before a foundation model sees it.

    Attributes:
      size: Side of the square that the model takes; None keeps each image's own size.
      scale: "uint8": unchanged pixels 0..255; "unit": in [0, 1]; "signed": ``x / 127.5 - 1``;
        "imagenet", "clip": in [0, 1], then standardised with the mean and standard deviation of
        each channel that these models were trained with.
      layout: "nhwc" or "nchw".

    >>> print(Preprocessing(224, "clip", "nchw"))
    bicubic 224, clip, nchw
    """

    __slots__ = ()

    def __new__(
        cls, size: int | None = None, scale: str = "uint8", layout: str = "nhwc"
    ) -> "Preprocessing":
        """Checks the settings.

        Raises:
          ValueError: If a scale or layout is unknown.
        """
        if scale not in PIXEL_SCALES:
            raise ValueError(f"scale must be one of {', '.join(PIXEL_SCALES)}, got {scale!r}")
        if layout not in PIXEL_LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(PIXEL_LAYOUTS)}, got {layout!r}")
        return super().__new__(cls, size, scale, layout)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the images as the model takes them.

        Args:
          pixels: uint8 ``[B, H, W, C]`` with 3 channels, or 1 (grey, repeated over 3 channels).

        Returns:
          ``[B, S, S, 3]``, or ``[B, 3, S, S]`` if the layout is "nchw"; uint8 if the scale is
          "uint8", else float32.

        Raises:
          ValueError: If ``pixels`` has another dtype or shape.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"pixels must be uint8 [B, H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        if self.size is None:
            pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
        else:
            pixels = resize_arrays(pixels, self.size)
        statistics = _STATISTICS[self.scale]
        if statistics is not None:
            mean, deviation = (255 * np.array(values) for values in statistics)
            pixels = ((pixels - mean) / deviation).astype(np.float32)
        if self.layout == "nchw":
            pixels = np.moveaxis(pixels, -1, 1)
        return np.ascontiguousarray(pixels)

    def answer_of(self, output: np.ndarray) -> np.ndarray:
        """Returns the model's output with its classes or features on the last axis.

        In the layout "nchw", the channel axis of a mask ``[B, P, H, W]`` is moved to the end.
        Spatial axes of length one, as left by pooling, are dropped.

        Returns:
          float32 ``[B, P]`` or ``[B, *spatial, P]``.
        """
        if self.layout == "nchw" and output.ndim == 4:
            output = np.moveaxis(output, 1, -1)
        if output.ndim > 2 and math.prod(output.shape[1:]) == max(output.shape[1:]):
            output = output.reshape(len(output), -1)
        with np.errstate(over="ignore"):  # overflow gives infinity, which is refused later
            return np.ascontiguousarray(output, np.float32)

    def __str__(self) -> str:
        """Returns the description used in fingerprints."""
        size = "native size" if self.size is None else f"bicubic {self.size}"
        return f"{size}, {self.scale}, {self.layout}"
