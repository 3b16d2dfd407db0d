"""Resizes volumes and simulates the appearance of another scanner."""

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.data.partition.fractions import rng_for

# Volumes are processed in blocks of about this many voxels to limit memory use.
_BLOCK_VOXELS = 2**24


def check_finite(volume: np.ndarray, where: str) -> None:
    """Checks that all voxels are finite.

    Args:
        volume: Voxels of any type and shape.
        where: Key and file, for messages.

    Raises:
        UserError: Some are NaN or infinite.
    """
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        count = int((~np.isfinite(volume)).sum())
        raise UserError(
            f"{where}: {count} of {volume.size} voxels are NaN or infinite; replace them by "
            "numbers, such as that of air, first"
        )


def resize_volumes(volumes: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns resized volumes, [N, *size, 1], of the same type.

    Uses antialiased linear interpolation along each axis, as in
    `jax.image.resize(method="linear")`; uint8 results are rounded. Axes are scaled independently.

    Args:
        volumes: uint8 or float32 [N, D, H, W].
        size: The three sides of the result. Volumes of this size are not changed.

    Raises:
        UserError: A voxel is not finite; it would spread over the whole volume.
    """
    check_finite(volumes, "volumes to be resized")
    if volumes.shape[1:] == tuple(size):
        return np.ascontiguousarray(volumes)[..., None]
    check_fits((len(volumes), *size), volumes.dtype.name, "data.volume_size", "the volumes")
    depth, height, width = (
        _weights(old, new) for old, new in zip(volumes.shape[1:], size, strict=True)
    )
    resized = np.zeros((len(volumes), *size), volumes.dtype)
    block = max(1, _BLOCK_VOXELS // volumes[0].size) if len(volumes) else 1
    for start in range(0, len(volumes), block):
        part = volumes[start : start + block].astype(np.float32)
        part = height @ (part @ width.T)
        part = depth @ part.reshape(*part.shape[:2], -1)
        # Weights are nonnegative and sum to 1, so that values stay in 0..255.
        part = np.rint(part) if volumes.dtype == np.uint8 else part
        resized[start : start + block] = part.reshape(-1, *size)
    return resized[..., None]


def resize_volume(volume: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns one volume resized as by `resize_volumes`, [*size, C].

    Args:
        volume: uint8 or float32 [D, H, W] or, with several modalities, [D, H, W, C].
        size: The three sides of the result.
    """
    channels = np.moveaxis(volume, -1, 0) if volume.ndim == 4 else volume[None]
    return np.moveaxis(resize_volumes(channels, size)[..., 0], 0, -1)


def resize_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns a resized mask, [*size]: the class at the centre of each new pixel or voxel.

    Along an axis of length n that is resized to m, index i takes the value at index
    ``floor((i + 1/2) n / m)``.

    Args:
        mask: [H, W] or [D, H, W].
        size: The sides of the result.
    """
    places = [(2 * np.arange(m) + 1) * n // (2 * m) for n, m in zip(mask.shape, size, strict=True)]
    return mask[np.ix_(*places)]


def scanner_shift(volumes: np.ndarray, seed: int, client: int) -> np.ndarray:
    """Returns volumes as if taken by one client's own scanner, a SIMULATED difference.

    This makes clients differ in data of a single site. With intensities s in 0..1,

        s' = gain * s**gamma * exp(bias) + noise

    where the bias field is a random quadratic polynomial of the position. Gain, gamma, bias field
    and noise level are drawn per client; the noise is drawn per voxel. Zero stays zero, since the
    noise fades out where there is no signal. The strengths are fixed and say nothing about real
    scanners.

    Args:
        volumes: uint8 [n, D, H, W], at their original resolution.
        seed: The run's seed.
        client: The client's number. The noise of a volume depends on the seed, the client and the
            volume's position in `volumes`.

    Returns:
        uint8 of the same shape.
    """
    rng = rng_for(seed, "scanner", client)
    gamma, gain = np.exp(rng.uniform(-0.4, 0.4)), rng.uniform(0.75, 1.1)
    level = rng.uniform(0.01, 0.06)
    field = _bias(volumes.shape[1:], rng.uniform(0.1, 0.3), rng)
    tone = (gain * (np.arange(256) / 255) ** gamma).astype(np.float32)
    noise = rng_for(seed, "scanner noise", client)
    shifted = np.empty_like(volumes)
    for place, volume in enumerate(volumes):
        signal = tone[volume] * field
        grain = noise.standard_normal(volume.shape, np.float32) * np.float32(level)
        signal += grain * np.minimum(1, 10 * signal)
        shifted[place] = np.rint(255 * np.clip(signal, 0, 1))
    return shifted


def _weights(old: int, new: int) -> np.ndarray:
    """Returns the interpolation weights of `old` samples for `new` ones, float32 [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    # Triangle kernels, widened to the step between new samples for antialiasing if it exceeds 1.
    distance = np.abs(centres[:, None] - np.arange(old)) / max(1, old / new)
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _bias(shape: tuple[int, ...], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a smooth multiplicative field, float32 [D, H, W], whose logarithm has mean 0."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    terms = np.stack([x, y, z, x * y, y * z, z * x, x * x, y * y, z * z])
    field = np.tensordot(rng.standard_normal(len(terms)), terms, axes=1)
    field -= field.mean()
    # The field of a single voxel has standard deviation 0.
    return np.exp(strength * field / max(field.std(), 1e-9)).astype(np.float32)
