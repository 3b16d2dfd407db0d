"""Volumes: resized, and given the look of another scanner."""

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.data.partition.fractions import rng_for

# Volumes are worked on in blocks of about so many voxels, so that memory stays small.
_BLOCK_VOXELS = 2**24


def check_finite(volume: np.ndarray, where: str) -> None:
    """Checks that all voxels are numbers.

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
    """Returns volumes resized, [N, *size, 1], uint8 or float32 as they are.

    Antialiased and linear along each axis, as `jax.image.resize(method="linear")`; uint8 is
    rounded. Sides are stretched independently.

    Args:
        volumes: uint8 or float32 [N, D, H, W].
        size: The three sides of the result; volumes that have them already keep their voxels.

    Raises:
        UserError: A voxel is not finite: it would spread over the whole volume.
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
        # Weights are positive with sum 1, so that nothing leaves 0..255.
        part = np.rint(part) if volumes.dtype == np.uint8 else part
        resized[start : start + block] = part.reshape(-1, *size)
    return resized[..., None]


def resize_volume(volume: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns one volume resized as by `resize_volumes`, [*size, C].

    Args:
        volume: uint8 or float32 [D, H, W] or, of several modalities, [D, H, W, C].
        size: The three sides of the result.
    """
    channels = np.moveaxis(volume, -1, 0) if volume.ndim == 4 else volume[None]
    return np.moveaxis(resize_volumes(channels, size)[..., 0], 0, -1)


def resize_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns a mask resized, [*size]: the class at the centre of each new pixel or voxel.

    Along an axis of n, place i of m is place ``floor((i + 1/2) n / m)``.

    Args:
        mask: [H, W] or [D, H, W].
        size: The sides of the result.
    """
    places = [(2 * np.arange(m) + 1) * n // (2 * m) for n, m in zip(mask.shape, size, strict=True)]
    return mask[np.ix_(*places)]


def scanner_shift(volumes: np.ndarray, seed: int, client: int) -> np.ndarray:
    """Returns volumes as if one client's own scanner had taken them: a SIMULATED difference.

    For data of a single site, to make clients unlike each other. With intensities s in 0..1,

        s' = gain * s**gamma * exp(bias) + noise

    where the bias field is a random quadratic polynomial of the position. Gain, gamma, bias field
    and level of noise are the client's; the noise is each voxel's. Zero stays zero, since the
    noise fades out where there is no signal. The strengths are fixed and say nothing about real
    scanners.

    Args:
        volumes: uint8 [n, D, H, W], at the resolution they were taken at.
        seed: The run's seed.
        client: The client's number. The noise of a volume depends on seed, client and its place
            in `volumes`.

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
    """Returns the weights of `old` places in each of `new` ones, float32 [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    # Triangles as wide as the step between new places: antialiasing, where that is more than one.
    distance = np.abs(centres[:, None] - np.arange(old)) / max(1, old / new)
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _bias(shape: tuple[int, ...], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a smooth field to multiply with, float32 [D, H, W]; its logarithm has mean 0."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    terms = np.stack([x, y, z, x * y, y * z, z * x, x * x, y * y, z * z])
    field = np.tensordot(rng.standard_normal(len(terms)), terms, axes=1)
    field -= field.mean()
    # A volume of one voxel has no field.
    return np.exp(strength * field / max(field.std(), 1e-9)).astype(np.float32)
