"""Procedural fields from which phantoms are drawn, in NumPy and batched over images."""

import numpy as np


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y of the pixels of a square from -1 to 1, float32 [1, size, size] each."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    return x[None], y[None]


def uniform(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    """Returns one uniform random number per image, float32 [count, 1, 1]."""
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates in axes rotated by `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def waves(
    x: np.ndarray,
    y: np.ndarray,
    frequency: float,
    rng: np.random.Generator,
    count: int,
    terms: int = 5,
) -> np.ndarray:
    """Returns a smooth random field per image with standard deviation near 1, [count, H, W]."""
    field = np.zeros((count, *x.shape[1:]), np.float32)
    for _ in range(terms):
        along, _ = turned(x, y, uniform(rng, 0, 2 * np.pi, count))
        speed = uniform(rng, 0.5 * frequency, 1.5 * frequency, count)
        field += np.cos(speed * along + uniform(rng, 0, 2 * np.pi, count))
    return field * np.float32(np.sqrt(2 / terms))


def cells(
    x: np.ndarray, y: np.ndarray, jitter: float, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns cellular noise: one random point per unit square (Worley 1996).

    Args:
        x: [count or 1, H, W], in units of cells.
        y: Same shape and units as `x`.
        jitter: 0 for a regular lattice, 1 for a point anywhere in its square.
        rng: Source of one random lattice per image.
        count: Number of images.

    Returns:
        Distance to the nearest point, distance to the second nearest, and a number in [0, 1)
        that is characteristic of the nearest point; each [count, H, W].
    """
    salt = rng.integers(0, 2**32, (count, 1, 1), dtype=np.uint32)
    column, row = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    shape = np.broadcast_shapes(x.shape, salt.shape)
    first, second = np.full(shape, 9, np.float32), np.full(shape, 9, np.float32)
    mark = np.zeros(shape, np.float32)
    for right in (-1, 0, 1):
        for down in (-1, 0, 1):
            bits = _mixed(column + right, row + down, salt)
            shift_x = ((bits & 1023).astype(np.float32) / 1024 - 0.5) * jitter + 0.5
            shift_y = (((bits >> 10) & 1023).astype(np.float32) / 1024 - 0.5) * jitter + 0.5
            distance = np.hypot(column + right + shift_x - x, row + down + shift_y - y)
            distance = distance.astype(np.float32)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            mark = np.where(nearer, (bits >> 20).astype(np.float32) / 4096, mark)
            first = np.where(nearer, distance, first)
    return first, second, mark


def bump(value: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Returns a Gaussian of `value` with the given width, which is 1 where `value` is 0."""
    return np.exp(-np.square(value / width))


def step(value: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Returns 0 where `value` is negative and 1 where positive, with a soft edge of that width."""
    return 0.5 + 0.5 * np.tanh(value / width)


def blurred(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Returns Gaussian-blurred images.

    Args:
        images: [n, H, W, 3].
        sigma: Width of the blur in pixels, [n or 1, 1, 1].
    """
    pad = min(images.shape[1] - 1, 3 * int(np.ceil(sigma.max())) + 1)
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    fy = np.fft.fftfreq(images.shape[1])[:, None]
    fx = np.fft.rfftfreq(images.shape[2])[None, :]
    keep = np.exp(-2 * np.square(np.pi * sigma) * (fx**2 + fy**2)).astype(np.float32)
    spectrum = np.fft.rfft2(images, axes=(1, 2)) * keep[..., None]
    images = np.fft.irfft2(spectrum, s=images.shape[1:3], axes=(1, 2))
    return images[:, pad:-pad, pad:-pad] if pad else images


def grid_3d(size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns z, y and x of the voxel centres of the box [-1, 1]^3, float32 [1, D, H, W] each."""
    lines = [((np.arange(side, dtype=np.float32) + 0.5) / side) * 2 - 1 for side in size]
    z, y, x = np.meshgrid(*lines, indexing="ij")
    return z[None], y[None], x[None]


def uniform_3d(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    """Returns one uniform random number per volume, float32 [count, 1, 1, 1]."""
    return uniform(rng, low, high, count)[..., None]


def waves_3d(
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    frequency: float,
    rng: np.random.Generator,
    count: int,
    terms: int = 5,
) -> np.ndarray:
    """Returns a smooth random field per volume with standard deviation near 1, [count, D, H, W]."""
    field = np.zeros((count, *axes[0].shape[1:]), np.float32)
    for _ in range(terms):
        direction = rng.standard_normal((3, count, 1, 1, 1), np.float32)
        direction /= np.sqrt(np.square(direction).sum(axis=0))
        along = sum(axis * part for axis, part in zip(axes, direction, strict=True))
        speed = uniform_3d(rng, 0.5 * frequency, 1.5 * frequency, count)
        field += np.cos(speed * along + uniform_3d(rng, 0, 2 * np.pi, count))
    return field * np.float32(np.sqrt(2 / terms))


def blurred_3d(volumes: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Returns Gaussian-blurred volumes.

    Args:
        volumes: [n, D, H, W].
        sigma: Width of the blur in voxels, [n or 1, 1, 1, 1].
    """
    pad = min(min(volumes.shape[1:]) - 1, 3 * int(np.ceil(sigma.max())) + 1)
    volumes = np.pad(volumes, ((0, 0), *[(pad, pad)] * 3), mode="reflect")
    fz, fy, fx = np.meshgrid(
        *(np.fft.fftfreq(side) for side in volumes.shape[1:3]),
        np.fft.rfftfreq(volumes.shape[3]),
        indexing="ij",
    )
    keep = np.exp(-2 * np.square(np.pi * sigma) * (fz**2 + fy**2 + fx**2)).astype(np.float32)
    spectrum = np.fft.rfftn(volumes, axes=(1, 2, 3)) * keep
    volumes = np.fft.irfftn(spectrum, s=volumes.shape[1:], axes=(1, 2, 3))
    return volumes[:, pad:-pad, pad:-pad, pad:-pad] if pad else volumes


def _mixed(column: np.ndarray, row: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """Returns 32 pseudorandom bits per lattice square; uint32 overflow is intended."""
    bits = column.astype(np.uint32) * np.uint32(374761393)
    bits = bits + row.astype(np.uint32) * np.uint32(668265263) + salt
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(1274126177)
    return bits ^ (bits >> np.uint32(16))
