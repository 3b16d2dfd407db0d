"""Harmonises and augments images, with pure functions that work under ``jit`` and ``vmap``.

Images are ``[N, *spatial, C]`` with ``spatial`` ``(H, W)`` or ``(D, H, W)``: uint8 pixels 0..255 or
floats. Each image is changed independently. Harmonisation is deterministic and applies to training
and evaluation alike; augmentation is random and applies to training batches only.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from fedhelp_jax.core.compilation import jit

AUGMENTATIONS = ("flip", "flip_all", "affine", "brightness")

# The strengths of the augmentations; all draws are uniform.
MAX_DEGREES = {2: 15.0, 3: 10.0}  # by the number of spatial axes; in 3D about each of the axes
SCALES = (0.9, 1.1)  # above 1 enlarges
MAX_SHIFT = 0.05  # of each side
CONTRASTS = (0.9, 1.1)
MAX_BRIGHTNESS = 0.1  # of an image's standard deviation

# Pools are harmonised in blocks of about this many values, to save memory.
_BLOCK_VALUES = 2**22


def resize(images: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resizes images linearly along each axis, with antialiasing, without keeping the aspect ratio.

    Args:
      images: ``[N, *spatial, C]`` uint8 or float.
      size: The sides of the result, static; images that already have them are returned unchanged.

    Returns:
      ``[N, *size, C]`` of the same dtype; uint8 is rounded.

    Raises:
      ValueError: If ``size`` does not have one side per spatial axis.

    Example:
      >>> resize(jnp.array([[[[0], [100]]]], jnp.uint8), (1, 4)).ravel().tolist()
      [0, 25, 75, 100]
    """
    spatial = images.shape[1:-1]
    if len(size) != len(spatial):
        raise ValueError(f"size must have {len(spatial)} sides, got {tuple(size)}")
    if tuple(size) == spatial:
        return images
    shape = (images.shape[0], *size, images.shape[-1])
    resized = jax.image.resize(images.astype(float), shape, "linear", antialias=True)
    # The weights are positive with sum 1, so all values stay within 0..255.
    return (jnp.round(resized) if images.dtype == jnp.uint8 else resized).astype(images.dtype)


def colour_constancy(images: jax.Array, power: float = 6) -> jax.Array:
    """Applies Shades of Gray: estimates the light of each image and divides it out.

    ``e_c = (mean_p x_pc^power)^(1/power)``, ``out_pc = x_pc / (sqrt(3) e_c / |e|)``

    over pixels ``p`` and colours ``c``, clipped to 0..255 and rounded. In FLamby's images, values
    above 255 wrap around to 0 instead, and fractions are truncated. A black channel stays black.

    Args:
      images: ``[N, *spatial, 3]`` uint8.
      power: At least 1, which is the grey-world assumption; static.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: If images are not uint8 or do not have three colours.

    References:
      Finlayson and Trezzi, Shades of Gray and Colour Constancy, CIC 2004.

    Example:
      >>> colour_constancy(jnp.array([[[[200, 100, 100]]]], jnp.uint8)).ravel().tolist()
      [141, 141, 141]
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"colour_constancy needs uint8 pixels, got {images.dtype}")
    if images.shape[-1] != 3:
        raise ValueError(f"colour_constancy needs images of 3 colours, got C = {images.shape[-1]}")
    pixels, axes = images.astype(float), tuple(range(1, images.ndim - 1))
    # The channel's largest value is factored out, because powers of dark values could underflow.
    largest = jnp.max(pixels, axes, keepdims=True)
    powers = jnp.mean((pixels / jnp.where(largest > 0, largest, 1)) ** power, axes, keepdims=True)
    light = largest * powers ** (1 / power)
    norm = jnp.sqrt(jnp.sum(light**2, -1, keepdims=True))
    return _as_pixels(pixels * norm / (np.sqrt(3) * jnp.where(light > 0, light, 1)))


def percentile_clip(images: jax.Array, low: float = 0.5, high: float = 99.5) -> jax.Array:
    """Clips each channel at two percentiles, which are then scaled to span the whole range.

    ``out = (clip(x, q_low, q_high) - q_low) / (q_high - q_low)``, times 255 for pixels

    Args:
      images: ``[N, *spatial, C]`` uint8 or float.
      low: The lower percentile over an image's spatial axes, interpolated linearly; static.
      high: The upper percentile, ``0 <= low < high <= 100``; static.

    Returns:
      The same shape; uint8 0..255, rounded, for uint8, else float32 0..1. A channel is 0 if both
      percentiles are equal, as in a constant channel.

    Raises:
      ValueError: If the percentiles are out of order.

    Example:
      >>> percentile_clip(jnp.array([[[[10.0], [20.0], [30.0]]]]), 0, 50).ravel().tolist()
      [0.0, 1.0, 1.0]
    """
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles must be 0 <= low < high <= 100, got {low} and {high}")
    flat = images.reshape(images.shape[0], -1, images.shape[-1])
    # Sorted before the conversion to float: bytes take a fifth of the time.
    ordered = jnp.sort(jnp.moveaxis(flat, 1, -1), -1)
    bottom, top = (_percentile(ordered, percent)[:, None, :] for percent in (low, high))
    span = jnp.where(top > bottom, top - bottom, 1)
    scaled = ((jnp.clip(flat.astype(float), bottom, top) - bottom) / span).reshape(images.shape)
    return _as_pixels(255 * scaled) if images.dtype == jnp.uint8 else scaled.astype(jnp.float32)


def z_score(images: jax.Array) -> jax.Array:
    """Returns ``(x - mean) / std`` over all voxels and channels of an image; 0 if it is constant.

    Args:
      images: ``[N, *spatial, C]`` uint8 or float.

    Returns:
      float32 of the same shape, in standard deviations (of the population).

    Example:
      >>> z_score(jnp.array([[[[1.0], [3.0]]]])).ravel().tolist()
      [-1.0, 1.0]
    """
    values, axes = images.astype(float), tuple(range(1, images.ndim))
    # Subtract the smallest value first: a constant image is then exactly 0, despite rounding.
    values -= jnp.min(values, axes, keepdims=True)
    values -= jnp.mean(values, axes, keepdims=True)
    std = jnp.sqrt(jnp.mean(values**2, axes, keepdims=True))
    return (values / jnp.where(std > 0, std, 1)).astype(jnp.float32)


HARMONIZATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "colour_constancy": colour_constancy,
    "percentile_clip": percentile_clip,
    "z_score": z_score,
}


def harmonize(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Harmonises a whole pool, in blocks of bounded memory.

    Args:
      images: ``[N, *spatial, C]`` uint8 or float; may be memory-mapped.
      names: Names from :data:`HARMONIZATIONS`, applied in this order; "z_score" only as the last.

    Returns:
      The same shape; uint8 for uint8 images, but float32 for floats and after "z_score". The
      images themselves if there are no names.

    Raises:
      ValueError: If a name is unknown or out of order, or a method does not support the images.

    Example:
      >>> harmonize(np.array([[[[1], [3]]]], np.uint8), ["percentile_clip", "z_score"]).tolist()
      [[[[-1.0], [1.0]]]]
    """
    _check_names("harmonization", names, HARMONIZATIONS)
    if "z_score" in names[:-1]:
        raise ValueError(f'"z_score" must be the last harmonization, got {", ".join(names)}')
    if not names or not len(images):
        return images
    block = min(max(1, _BLOCK_VALUES // images[0].size), len(images))
    is_uint8 = images.dtype == np.uint8 and names[-1] != "z_score"
    result = np.empty(images.shape, np.uint8 if is_uint8 else np.float32)
    for start in range(0, len(images), block):
        start = min(
            start, len(images) - block
        )  # the last block is full too, so one program fits all
        rows = slice(start, start + block)
        result[rows] = _harmonized(images[rows], tuple(names))
    return result


@functools.partial(jit, static_argnums=1)
def _harmonized(images: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return functools.reduce(lambda x, name: HARMONIZATIONS[name](x), names, images)


def augment(
    key: jax.Array, images: jax.Array, targets: jax.Array, names: Sequence[str]
) -> tuple[jax.Array, jax.Array]:
    """Augments each example of a training batch at random, by transforms in this order.

    * "flip": left and right (the last spatial axis) are exchanged with probability 1/2.
    * "flip_all": each spatial axis is flipped with probability 1/2, independently.
    * "affine": rotation about the centre by up to 15 degrees (3D: up to 10 about each axis), scale
      0.9..1.1, shift up to 5 % of each side. Pixels count as square; edges are replicated.
    * "brightness": ``mean + contrast (x - mean) + brightness std``, with contrast in 0.9..1.1,
      brightness in -0.1..0.1, and the image's own mean and standard deviation.

    Draws are uniform and depend only on ``key``, the position in the batch and the transform, but
    not on the size of the batch or on which other transforms are enabled.

    Args:
      key: The key of the batch.
      images: ``[N, *spatial, C]`` float, of any range.
      targets: Labels ``[N]``, which stay unchanged, or integer masks ``[N, *mask_spatial]``, which
        are transformed with the images. Masks cover the same area as the images, at any resolution.
      names: Names from :data:`AUGMENTATIONS`, in any order; static. Without any, nothing changes.

    Returns:
      ``(images, targets)`` of unchanged shapes and dtypes; masks take the nearest pixel.

    Raises:
      ValueError: If a name is unknown, images are not float, or targets are neither of the two.

    Example:
      >>> x = jnp.arange(3.0).reshape(1, 1, 3, 1)
      >>> images, labels = augment(jax.random.key(1), x, jnp.array([7]), ["flip"])
      >>> images.ravel().tolist(), labels.tolist()
      ([2.0, 1.0, 0.0], [7])
    """
    _check_names("augmentation", names, AUGMENTATIONS)
    if not names:
        return images, targets
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"augment needs float images, got {images.dtype}")
    if targets.ndim not in (1, images.ndim - 1):
        raise ValueError(f"targets must be labels [N] or masks [N, ...], got {targets.shape}")

    def one(position: jax.Array, image: jax.Array, mask: jax.Array | None) -> _Example:
        own = jax.random.fold_in(key, position)
        changed = image.astype(float), mask
        steps = zip(AUGMENTATIONS, (_flip, _flip_all, _affine, _brightness), strict=True)
        for number, (name, step) in enumerate(steps):  # numbers determine draws: never change one
            if name in names:
                changed = step(jax.random.fold_in(own, number), *changed)
        return changed[0].astype(image.dtype), changed[1]

    masks = targets if targets.ndim > 1 else None
    images, masks = jax.vmap(one)(jnp.arange(images.shape[0]), images, masks)
    return images, targets if masks is None else masks


# An image [*spatial, C], and its mask [*mask_spatial] or None.
_Example = tuple[jax.Array, jax.Array | None]


def _flip(key: jax.Array, image: jax.Array, mask: jax.Array | None, axis: int = -1) -> _Example:
    axis %= image.ndim - 1
    flipped = _uniform(key, (0, 1)) < 0.5
    return jax.tree.map(lambda x: jnp.where(flipped, jnp.flip(x, axis), x), (image, mask))


def _flip_all(key: jax.Array, image: jax.Array, mask: jax.Array | None) -> _Example:
    for axis in range(image.ndim - 1):
        image, mask = _flip(jax.random.fold_in(key, axis), image, mask, axis)
    return image, mask


def _affine(key: jax.Array, image: jax.Array, mask: jax.Array | None) -> _Example:
    """Computes ``out(p) = image(c + R^T (p - c - shift n) / scale)``.

    Here p are pixels, c is the centre, and n are the sides.
    """
    sides = np.array(image.shape[:-1])
    angles, scale, shift = (x.astype(float) for x in _draw_affine(key, len(sides)))
    rotation = jnp.eye(len(sides))
    for angle, (a, b) in zip(angles, combinations(range(len(sides)), 2), strict=True):
        turn = np.zeros((len(sides), len(sides)))  # by 90 degrees, from axis a to axis b
        turn[b, a], turn[a, b] = 1, -1
        step = np.eye(len(sides)) + jnp.sin(angle) * turn + (1 - jnp.cos(angle)) * (turn @ turn)
        # By default, accelerators would multiply in half precision.
        rotation = jnp.matmul(rotation, step, precision="highest")
    # In fractions of the image's sides, so that the map is the same for masks of any resolution.
    matrix = rotation.T * sides / sides[:, None] / scale

    def sources(grid: tuple[int, ...]) -> list[jax.Array]:
        ends = (-1, *(1 for _ in grid))
        place = jnp.stack(jnp.meshgrid(*((jnp.arange(n) + 0.5) / n for n in grid), indexing="ij"))
        place = place - 0.5 - shift.reshape(ends)
        place = jnp.tensordot(matrix, place, 1, precision="highest") + 0.5
        return list(place * np.reshape(grid, ends) - 0.5)

    warp = functools.partial(map_coordinates, mode="nearest")  # repeats the edge beyond the border
    places = sources(image.shape[:-1])
    moved = jax.vmap(lambda x: warp(x, places, 1), in_axes=-1, out_axes=-1)(image)
    return moved, mask if mask is None else warp(mask, sources(mask.shape), 0)


def _draw_affine(key: jax.Array, dimensions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws an angle in radians per plane, a scale, and shifts as fractions of the sides.

    All are float32.
    """
    keys, most = jax.random.split(key, 3), np.radians(MAX_DEGREES[dimensions])
    angles = _uniform(keys[0], (-most, most), (dimensions * (dimensions - 1) // 2,))
    shift = _uniform(keys[2], (-MAX_SHIFT, MAX_SHIFT), (dimensions,))
    return angles, _uniform(keys[1], SCALES), shift


def _brightness(key: jax.Array, image: jax.Array, mask: jax.Array | None) -> _Example:
    keys, mean = jax.random.split(key), jnp.mean(image)
    contrast = _uniform(keys[0], CONTRASTS)
    brightness = _uniform(keys[1], (-MAX_BRIGHTNESS, MAX_BRIGHTNESS))
    return mean + contrast * (image - mean) + brightness * jnp.std(image), mask


def _uniform(key: jax.Array, ends: Sequence[float], shape: tuple[int, ...] = ()) -> jax.Array:
    # Always float32, so that draws do not depend on the dtype of the images.
    return jax.random.uniform(key, shape, jnp.float32, *ends)


def _percentile(ordered: jax.Array, percent: float) -> jax.Array:
    """Returns a percentile of sorted values ``[..., n]``, interpolated linearly."""
    place = percent / 100 * (ordered.shape[-1] - 1)
    below = min(int(place), max(ordered.shape[-1] - 2, 0))
    pair = ordered[..., below : below + 2].astype(float)
    return pair[..., 0] + (place - below) * (pair[..., -1] - pair[..., 0])


def _as_pixels(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def _check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f'unknown {kind} "{name}"; there are {", ".join(known)}')
