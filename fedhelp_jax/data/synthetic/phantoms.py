"""Synthetic skin lesions: procedural pictures that resemble dermoscopy but are not medical data.

They replace real hospitals when a program must run without any data. Eight imbalanced classes
differ in the combination of colour, border and inner texture; none of the three alone is
sufficient to tell them apart. Every client has its own camera. Results on these images say nothing
about medicine; their difficulty is fixed and was never tuned to a federated method.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhelp_jax.data.partition.fractions import rng_for, split_sizes, split_validation
from fedhelp_jax.data.synthetic.procedural import (
    blurred,
    bump,
    cells,
    grid,
    step,
    turned,
    uniform,
    waves,
)
from fedhelp_jax.data.types import ClientSplit, FederatedDataset

LABEL_NAMES = (
    "phantom_tan_smooth_network",
    "phantom_tan_irregular_network",
    "phantom_dark_irregular_dots",
    "phantom_tan_smooth_dots",
    "phantom_pink_smooth_streaks",
    "phantom_pink_irregular_dots",
    "phantom_dark_smooth_streaks",
    "phantom_dark_irregular_streaks",
)
MASK_NAMES = ("phantom_lesion",)
PROPORTIONS = (0.36, 0.24, 0.14, 0.09, 0.07, 0.05, 0.03, 0.02)

_COLOURS = ("tan", "dark", "pink")
_TEXTURES = ("network", "dots", "streaks")
_PALETTE = np.array([(0.60, 0.40, 0.26), (0.36, 0.25, 0.24), (0.76, 0.44, 0.40)], np.float32)
_SKIN = np.array((0.88, 0.70, 0.61), np.float32)
_HAIRS = 5
# Images are drawn in blocks of about this many pixels, so that large ones fit in memory.
_BLOCK_PIXELS = 2**19


class Cameras(NamedTuple):
    """Properties of the cameras that take the images.

    The leading axis of every leaf has one entry per image, or a single one for all images.

    Attributes:
        gain: Colour cast, [n, 3].
        gradient: Change of the light from the centre to the right and to the lower edge, [n, 2].
        noise: Standard deviation of the sensor noise as a fraction of full scale, [n].
        blur: Width of the blur as a fraction of the image width, [n].
    """

    gain: np.ndarray
    gradient: np.ndarray
    noise: np.ndarray
    blur: np.ndarray


def phantom_camera(seed: int, client: int) -> Cameras:
    """Returns the synthetic camera of one client (leading axis 1)."""
    rng = rng_for(seed, "phantom camera", client)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.18)
    return Cameras(
        gain=np.exp(rng.normal(0, 0.05, (1, 3))),
        gradient=strength * np.array([[np.cos(angle), np.sin(angle)]]),
        noise=rng.uniform(0.01, 0.04, 1),
        blur=rng.uniform(0.0, 0.025, 1),
    )


def phantom_images(
    labels: np.ndarray, cameras: Cameras, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns synthetic skin lesions and their masks.

    Args:
        labels: int [n], classes 0..7.
        cameras: The camera of each image, or one for all.
        size: Height and width.
        rng: Source of all random draws.

    Returns:
        Images, uint8 [n, size, size, 3], and lesion masks, bool [n, size, size].
    """
    count = len(labels)
    images = np.zeros((count, size, size, 3), np.uint8)
    masks = np.zeros((count, size, size), bool)
    block = max(1, _BLOCK_PIXELS // size**2)
    for start in range(0, count, block):
        part = slice(start, start + block)
        scene, masks[part] = _draw(labels[part], size, rng)
        camera = Cameras(*(leaf[part] if len(leaf) == count else leaf for leaf in cameras))
        images[part] = _photograph(scene, camera, rng)
    return images, masks


def load_phantoms(
    *,
    num_examples: int,
    fractions: Sequence[float],
    image_size: int,
    validation_fraction: float,
    test_fraction: float,
    max_train: int | None,
    seed: int,
    masks: bool = False,
) -> FederatedDataset:
    """Returns synthetic skin lesions for `len(fractions)` clients.

    A client's images depend only on the seed, its number and its size. All clients draw their
    classes with the same `PROPORTIONS`; they differ in their cameras.

    Args:
        num_examples: Total number of images of all clients and splits.
        fractions: Each client's share; positive, with sum 1.
        image_size: Height and width.
        validation_fraction: Share of a client's training examples held out for validation.
        test_fraction: Share of a client's examples used for testing, at least one example.
        max_train: Maximum number of training examples per client; None keeps all.
        seed: The run's seed.
        masks: Whether labels are the lesions' masks, uint8 [N, image_size, image_size] of 0 and
            1, rather than classes, int32 [N]. The images and splits are the same either way.

    Raises:
        UserError: A value is invalid.
    """
    # Every client needs one example for training and one for testing.
    sizes = split_sizes(num_examples, fractions, minimum=2)
    images, labels, clients = [], [], []
    start = 0
    for number, total in enumerate(sizes):
        rng = rng_for(seed, "phantom images", number)
        label = rng.choice(len(PROPORTIONS), total, p=PROPORTIONS).astype(np.int32)
        image, mask = phantom_images(label, phantom_camera(seed, number), image_size, rng)
        images.append(image)
        labels.append(mask.astype(np.uint8) if masks else label)
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
        name="phantoms",
        synthetic=True,
        images=np.concatenate(images),
        labels=np.concatenate(labels),
        label_names=MASK_NAMES if masks else LABEL_NAMES,
        clients=tuple(clients),
    )


def split_generated(
    indices: np.ndarray,
    *,
    validation_fraction: float,
    test_fraction: float,
    max_train: int | None,
    seed: int,
    client: int,
) -> ClientSplit:
    """Returns the splits of one client whose examples were drawn independently of each other.

    Args:
        indices: int32 [n] positions in the pool, at least two.
        validation_fraction: Share of the training examples held out for validation.
        test_fraction: Share of all examples used for testing; at least one, but never all.
        max_train: Maximum number of training examples; None keeps all.
        seed: The run's seed.
        client: The client's number.
    """
    num_test = min(max(1, round(len(indices) * test_fraction)), len(indices) - 1)
    # Examples are independent, so the last ones can serve as the test split.
    rest, test = np.split(indices, [len(indices) - num_test])
    train, validation = split_validation(
        rest,
        rest,
        validation_fraction=validation_fraction,
        max_train=max_train,
        seed=seed,
        client=client,
    )
    return ClientSplit(f"client_{client}", train, validation, test)


def _draw(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns lesions on skin, float32 [n, size, size, 3], and their masks."""
    n = len(labels)
    x, y = grid(size)
    words = [LABEL_NAMES[label].split("_") for label in labels]
    colour = np.array([_COLOURS.index(word[1]) for word in words])
    irregular = np.array([word[2] == "irregular" for word in words])
    texture = np.array([_TEXTURES.index(word[3]) for word in words])

    # Geometry of the lesion: position, rotation, aspect, and a border made of a few harmonics.
    u, v = x - uniform(rng, -0.18, 0.18, n), y - uniform(rng, -0.18, 0.18, n)
    u, v = turned(u, v, uniform(rng, 0, 2 * np.pi, n))
    aspect = uniform(rng, 0.85, 1.18, n)
    u, v = u * aspect, v / aspect
    rho, phi = np.hypot(u, v), np.arctan2(v, u)
    radius = uniform(rng, 0.50, 0.74, n)
    # Some irregular borders still come out round, because the harmonics' strengths are random.
    roughness = np.where(irregular, rng.uniform(0.10, 0.20, n), rng.uniform(0.0, 0.06, n))
    roughness = roughness.astype(np.float32)[:, None, None]
    wobble = np.zeros_like(rho)
    for harmonic in range(2, 11):
        # Higher harmonics are weaker, so that borders are ragged rather than star-shaped.
        strength = rng.normal(0, 1.7 / np.sqrt(harmonic), (n, 1, 1)).astype(np.float32)
        wobble += strength * np.cos(harmonic * phi + uniform(rng, 0, 2 * np.pi, n))
    inside = radius * (1 + roughness * wobble / np.float32(np.sqrt(3))) - rho
    cover = step(inside, np.maximum(uniform(rng, 0.03, 0.10, n), 1 / size))[..., None]

    # Colours: each lesion is mixed with a random second palette colour and is never uniform.
    other = rng.integers(0, len(_PALETTE), n)
    lean = rng.uniform(0, 0.25, (n, 1))
    base = (1 - lean) * _PALETTE[colour] + lean * _PALETTE[other]
    base = (base + rng.normal(0, 0.025, (n, 3)))[:, None, None].astype(np.float32)
    darkness = _texture(texture, u / radius, v / radius, rng)
    shade = 1 + 0.09 * waves(x, y, 5, rng, n) - uniform(rng, 0.28, 0.65, n) * darkness
    lesion = base * np.exp(rng.normal(0, 0.08, (n, 1, 1, 1))) * shade[..., None]

    skin = _SKIN * np.exp(rng.normal(0, 0.04, (n, 1, 1, 3)))
    skin = skin * (1 + 0.025 * waves(x, y, 6, rng, n) + 0.012 * waves(x, y, 22, rng, n))[..., None]
    scene = cover * lesion + (1 - cover) * skin
    scene *= 1 - 0.65 * _hairs(x, y, size, rng, n)[..., None]
    vignette = uniform(rng, 0.0, 0.30, n) * np.square(x * x + y * y)
    return (scene * (1 - vignette[..., None])).astype(np.float32), inside > 0


def _texture(
    kind: np.ndarray, u: np.ndarray, v: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns the darkness of the inner texture of lesions of radius 1, 0..1 [n, H, W]."""
    n = len(kind)
    density = uniform(rng, 2.4, 3.4, n)
    near, second, mark = cells(u * density, v * density, 0.6, rng, n)
    network = bump(second - near, 0.22)
    dots = bump(near, 0.20 + 0.12 * mark) * (mark > 0.25)
    count = rng.integers(7, 12, (n, 1, 1))
    phase = count * np.arctan2(v, u) + uniform(rng, 0, 2 * np.pi, n) + 0.8 * waves(u, v, 3, rng, n)
    streaks = np.square(0.5 + 0.5 * np.cos(phase)) * step(np.hypot(u, v) - 0.35, 0.2)
    chosen = np.stack([network, dots, streaks])[kind, np.arange(n)]
    # Add a little of the other two textures, as in real lesions.
    return 0.85 * chosen + 0.15 * (network + dots + streaks) / 3


def _hairs(x: np.ndarray, y: np.ndarray, size: int, rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns how much hair covers each pixel, 0..1 [n, H, W]."""
    cover = np.zeros((n, size, size), np.float32)
    # Hairs are at least about one pixel wide, since thinner ones would vanish at random.
    width = np.maximum(uniform(rng, 0.008, 0.02, n), 0.8 / size)
    number = rng.choice(_HAIRS + 1, (n, 1, 1), p=(0.6, 0.18, 0.1, 0.06, 0.04, 0.02))
    for hair in range(_HAIRS):
        along, across = turned(x, y, uniform(rng, 0, 2 * np.pi, n))
        bend = uniform(rng, -0.5, 0.5, n) * along * along
        line = bump(across - bend - uniform(rng, -0.9, 0.9, n), width)
        cover = np.maximum(cover, np.where(hair < number, line, 0))
    return cover


def _photograph(scene: np.ndarray, camera: Cameras, rng: np.random.Generator) -> np.ndarray:
    """Returns the camera's image of a scene, uint8 [n, H, W, 3]."""
    size = scene.shape[1]
    x, y = grid(size)
    gradient = camera.gradient.astype(np.float32)[:, :, None, None]
    light = 1 + gradient[:, 0] * x + gradient[:, 1] * y
    gain = camera.gain.astype(np.float32)[:, None, None, :]
    image = blurred(scene * light[..., None] * gain, camera.blur[:, None, None] * size)
    noise = rng.standard_normal(image.shape, np.float32)
    image = image + noise * camera.noise.astype(np.float32)[:, None, None, None]
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
