"""Synthetic scans: procedural volumes that vaguely resemble tomography but are not medical data.

Private volumes show a bent organ of two parts among lumps and vessels of similar brightness. Public
ones show a ring in the same surroundings. Brightness alone is therefore not sufficient to segment
either; shape, surroundings and texture are needed. Every client has its own scanner. Results on
these volumes say nothing about medicine; their difficulty is fixed and was never tuned to a
federated method.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.data.partition.fractions import rng_for, split_sizes
from fedhelp_jax.data.synthetic.phantoms import split_generated
from fedhelp_jax.data.synthetic.procedural import (
    blurred_3d,
    bump,
    grid_3d,
    step,
    turned,
    uniform_3d,
    waves_3d,
)
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, image_sha256

LABEL_NAMES = ("background", "phantom_front", "phantom_back")
RING_NAMES = ("phantom_ring",)

# Brightness as a fraction of full scale. Lumps are as bright as the organ's parts, or dark.
_AIR, _FLUID, _TISSUE, _VESSEL = 0.02, 0.16, 0.36, 0.72
_FRONT, _BACK = 0.66, 0.52
_LUMPS, _VESSELS = 14, 3
# Volumes are drawn in blocks of about this many voxels, so that large ones fit in memory.
_BLOCK_VOXELS = 2**19

Size = tuple[int, ...]
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


class Scanners(NamedTuple):
    """Properties of the scanners that take the volumes.

    The leading axis of every leaf has one entry per volume, or a single one for all volumes.

    Attributes:
        bias: Coefficients of the log sensitivity, which is 0 at the centre: its linear terms in z,
            y and x, followed by its quadratic terms, [n, 6].
        gamma: Exponent of the contrast, [n].
        gain: Factor on the brightness, [n].
        noise: Standard deviation of the noise as a fraction of full scale, [n].
        blur: Width of the blur as a fraction of the shortest side, [n].
    """

    bias: np.ndarray
    gamma: np.ndarray
    gain: np.ndarray
    noise: np.ndarray
    blur: np.ndarray


def phantom_scanners(rng: np.random.Generator, count: int) -> Scanners:
    """Returns random synthetic scanners (leading axis of length `count`)."""
    return Scanners(
        bias=rng.uniform(-0.18, 0.18, (count, 6)),
        gamma=np.exp(rng.uniform(-0.35, 0.35, count)),
        gain=np.exp(rng.uniform(-0.15, 0.15, count)),
        noise=rng.uniform(0.015, 0.05, count),
        blur=rng.uniform(0.0, 0.025, count),
    )


def phantom_scanner(seed: int, client: int) -> Scanners:
    """Returns the synthetic scanner of one client (leading axis of length 1)."""
    return phantom_scanners(rng_for(seed, "phantom scanner", client), 1)


def phantom_organs(
    count: int, scanners: Scanners, size: Size, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns synthetic scans of an organ of two parts, and its masks.

    Args:
        count: Number of volumes.
        scanners: The scanner of each volume, or one for all.
        size: Depth, height and width; the organ's front points towards row 0.
        rng: Source of all random draws.

    Returns:
        Volumes, uint8 [count, D, H, W], and the class of each voxel as an index into `LABEL_NAMES`,
        of the same type and shape.
    """
    return _volumes(_organ, count, scanners, size, rng)


def phantom_rings(
    count: int, scanners: Scanners, size: Size, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns synthetic scans of a ring and its masks of 0 and 1; see `phantom_organs`."""
    return _volumes(_ring, count, scanners, size, rng)


def load_phantom_volumes(
    *,
    num_examples: int,
    fractions: Sequence[float],
    volume_size: Size,
    validation_fraction: float,
    test_fraction: float,
    max_train: int | None,
    seed: int,
) -> FederatedDataset:
    """Returns synthetic scans and the masks of their organs for `len(fractions)` clients.

    A client's volumes depend only on the seed, its number and its size. Organs have the same
    distribution for all clients, which differ in their scanners.

    Args:
        num_examples: Total number of volumes of all clients and splits.
        fractions: Each client's share; positive, with sum 1.
        volume_size: Depth, height and width of volumes and masks.
        validation_fraction: Share of a client's training examples held out for validation.
        test_fraction: Share of a client's examples used for testing, at least one example.
        max_train: Maximum number of training examples per client; None keeps all.
        seed: The run's seed.

    Raises:
        UserError: A value is invalid.
    """
    # Every client needs one example for training and one for testing.
    sizes = split_sizes(num_examples, fractions, minimum=2)
    volumes, masks, clients = [], [], []
    start = 0
    for number, total in enumerate(sizes):
        rng = rng_for(seed, "phantom volumes", number)
        scanner = phantom_scanner(seed, number)
        volume, mask = phantom_organs(total, scanner, volume_size, rng)
        volumes.append(volume)
        masks.append(mask)
        clients.append(
            split_generated(
                np.arange(start, start + total, dtype=np.int32),
                validation_fraction=validation_fraction,
                test_fraction=test_fraction,
                max_train=max_train,
                seed=seed,
                client=number,
            )
        )
        start += total
    return FederatedDataset(
        name="phantom_volumes",
        synthetic=True,
        images=np.concatenate(volumes)[..., None],
        labels=np.concatenate(masks),
        label_names=LABEL_NAMES,
        clients=tuple(clients),
    )


def load_phantom_volume_public(
    num_examples: int | None, volume_size: Size, seed: int
) -> PublicDataset:
    """Returns synthetic scans of rings as a public data set, each from a different scanner.

    Args:
        num_examples: Number of volumes; None means 64.
        volume_size: Depth, height and width of volumes and masks.
        seed: The run's seed.
    """
    rng = rng_for(seed, "phantom rings")
    count = 64 if num_examples is None else num_examples
    volumes, masks = phantom_rings(count, phantom_scanners(rng, count), volume_size, rng)
    return PublicDataset(
        name="phantom_volumes",
        synthetic=True,
        images=volumes[..., None],
        labels=masks,
        label_names=RING_NAMES,
        sha256=tuple(image_sha256(volume) for volume in volumes),
        originals=volumes,
    )


class _Part(NamedTuple):
    """The object to segment among the distractors; all arrays are [n, D, H, W].

    Attributes:
        inside: Depth of each voxel below the surface; negative outside.
        brightness: Brightness of each voxel, used only inside.
        classes: uint8 class of each voxel; 0 outside.
    """

    inside: np.ndarray
    brightness: np.ndarray
    classes: np.ndarray


def _volumes(
    draw: Callable[[Axes, np.random.Generator, int], _Part],
    count: int,
    scanners: Scanners,
    size: Size,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 volumes of the objects that `draw` draws, and classes, [count, *size] each."""
    volumes = np.zeros((count, *size), np.uint8)
    masks = np.zeros_like(volumes)
    axes = grid_3d(size)
    edge = 1 / min(size)
    block = max(1, _BLOCK_VOXELS // int(np.prod(size)))
    for start in range(0, count, block):
        part = slice(start, start + block)
        n = len(volumes[part])
        thing = draw(axes, rng, n)
        masks[part] = thing.classes
        scene = _surroundings(axes, edge, rng, n)
        # A dark seam of fluid of uneven width makes the surface visible against bright lumps too.
        seam = uniform_3d(rng, 0.02, 0.07, n) * (1 + 0.5 * waves_3d(axes, 4, rng, n)) + edge
        scene += step(thing.inside + seam, edge) * (_FLUID - scene)
        scene += step(thing.inside, edge) * (thing.brightness - scene)
        scanner = Scanners(*(leaf[part] if len(leaf) == count else leaf for leaf in scanners))
        volumes[part] = _scan(scene, scanner, axes, rng)
    return volumes, masks


def _organ(axes: Axes, rng: np.random.Generator, n: int) -> _Part:
    """Returns bent ellipsoids that are thicker towards the front, which is at negative y."""
    z, y, x = _placed(axes, rng, n, shift=0.14, angle=0.35)
    length = uniform_3d(rng, 0.52, 0.68, n)
    along = y / length
    z = z - uniform_3d(rng, -0.25, 0.25, n) * along * along
    x = x - uniform_3d(rng, 0.08, 0.25, n) * along * along
    thickness = uniform_3d(rng, 0.28, 0.40, n) * (1 - uniform_3d(rng, 0.1, 0.4, n) * along)
    flat = uniform_3d(rng, 0.8, 1.2, n)
    radius = np.sqrt(np.square(z * flat) + np.square(x / flat)) / np.maximum(thickness, 0.05)
    rough = 1 + uniform_3d(rng, 0.02, 0.10, n) * waves_3d((z, y, x), 8, rng, n)
    inside = (rough - np.hypot(radius, along)) * 0.3
    front = along + 0.12 * waves_3d((z, y, x), 4, rng, n) < uniform_3d(rng, -0.2, 0.15, n)
    grains = waves_3d((z, y, x), 22, rng, n)
    layers = np.cos(uniform_3d(rng, 17, 23, n) * (y + 0.3 * z) + uniform_3d(rng, 0, 6.28, n))
    brightness = np.where(front, _FRONT + 0.05 * grains, _BACK + 0.06 * layers)
    brightness = brightness * np.exp(rng.normal(0, 0.06, (n, 1, 1, 1))).astype(np.float32)
    classes = np.where(inside > 0, np.where(front, 1, 2), 0).astype(np.uint8)
    return _Part(inside, brightness, classes)


def _ring(axes: Axes, rng: np.random.Generator, n: int) -> _Part:
    """Returns tori in any orientation."""
    z, y, x = _placed(axes, rng, n, shift=0.2, angle=np.pi)
    radius, thickness = uniform_3d(rng, 0.38, 0.55, n), uniform_3d(rng, 0.13, 0.20, n)
    around = np.hypot(y, x * uniform_3d(rng, 1.0, 1.3, n)) - radius
    rough = 1 + uniform_3d(rng, 0.02, 0.15, n) * waves_3d((z, y, x), 6, rng, n)
    inside = thickness * rough - np.hypot(around, z)
    brightness = uniform_3d(rng, _BACK, _FRONT, n) + 0.05 * waves_3d((z, y, x), 20, rng, n)
    return _Part(inside, brightness, (inside > 0).astype(np.uint8))


def _surroundings(axes: Axes, edge: float, rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns the brightness of a body of uneven tissue with lumps and vessels, in air."""
    z, y, x = axes
    scene = _TISSUE + 0.05 * waves_3d(axes, 5, rng, n) + 0.03 * waves_3d(axes, 18, rng, n)
    for _ in range(_LUMPS):
        u, v, w = _placed(axes, rng, n, shift=0.8, angle=np.pi)
        a, b, c = (uniform_3d(rng, 0.14, 0.42, n) for _ in range(3))
        lump = 1 - np.sqrt(np.square(u / a) + np.square(v / b) + np.square(w / c))
        bright = uniform_3d(rng, _BACK - 0.05, _FRONT + 0.05, n)
        bright = np.where(rng.random((n, 1, 1, 1)) < 0.25, np.float32(_FLUID), bright)
        scene += step(0.25 * lump, edge) * (bright - scene)
    for _ in range(_VESSELS):
        u, v, w = _placed(axes, rng, n, shift=0.6, angle=np.pi)
        v = v - uniform_3d(rng, -0.4, 0.4, n) * u * u
        width = np.maximum(uniform_3d(rng, 0.03, 0.07, n), edge)
        scene += bump(np.hypot(v, w), width) * (_VESSEL - scene)
    # The body is rounder than the box, so that the corners are air.
    skin = uniform_3d(rng, 1.0, 1.12, n) + 0.03 * waves_3d(axes, 5, rng, n)
    body = skin - np.power(np.abs(z) ** 3 + np.abs(y) ** 3 + np.abs(x) ** 3, 1 / 3)
    scene *= np.exp(rng.normal(0, 0.05, (n, 1, 1, 1))).astype(np.float32)
    return (_AIR + step(body, edge) * (scene - _AIR)).astype(np.float32)


def _placed(axes: Axes, rng: np.random.Generator, n: int, shift: float, angle: float) -> Axes:
    """Returns coordinates shifted by up to `shift` and rotated by up to `angle` about each axis."""
    z, y, x = (axis - uniform_3d(rng, -shift, shift, n) for axis in axes)
    y, x = turned(y, x, uniform_3d(rng, -angle, angle, n))
    z, y = turned(z, y, uniform_3d(rng, -angle, angle, n))
    z, x = turned(z, x, uniform_3d(rng, -angle, angle, n))
    return z, y, x


def _scan(scene: np.ndarray, scanner: Scanners, axes: Axes, rng: np.random.Generator) -> np.ndarray:
    """Returns the scanner's volume of a scene, uint8 [n, D, H, W]."""
    gamma, gain, noise, blur = (
        leaf.astype(np.float32)[:, None, None, None] for leaf in scanner[1:]
    )
    bias = scanner.bias.astype(np.float32)[:, :, None, None, None]
    terms = (*axes, *(np.square(axis) for axis in axes))
    sensitivity = np.exp(sum(bias[:, i] * term for i, term in enumerate(terms)))
    image = blurred_3d(
        np.maximum(scene, 0) ** gamma * gain * sensitivity, blur * min(scene.shape[1:])
    )
    image = image + noise * rng.standard_normal(image.shape, np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
