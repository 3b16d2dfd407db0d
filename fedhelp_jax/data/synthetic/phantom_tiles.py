"""Synthetic tissue tiles: procedural pictures that resemble histology but are not medical data.

They are the public counterpart of the phantom lesions, with another kind of picture and other
classes. Their difficulty is fixed and was never tuned to a federated method.
"""

import numpy as np

from fedhelp_jax.data.partition.fractions import rng_for
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
from fedhelp_jax.data.types import PublicDataset, image_sha256

LABEL_NAMES = (
    "phantom_mesh",
    "phantom_empty",
    "phantom_dots",
    "phantom_stripes",
    "phantom_swirls",
    "phantom_glands",
    "phantom_cells",
    "phantom_strands",
    "phantom_blobs",
)

MASK_NAMES = ("phantom_nuclei",)

# A pixel belongs to a nucleus if its amount of haematoxylin, before uneven staining, exceeds this.
# Tissues without nuclei stay below it.
_NUCLEUS = 0.35
# Tiles whose nuclei cover less than this share of their area count as having none.
_LEAST_AREA = 0.02

# Colours of the pale background, of eosin (tissue) and of haematoxylin (dark).
_PALE = np.array((0.94, 0.90, 0.93), np.float32)
_EOSIN = np.array((0.86, 0.56, 0.70), np.float32)
_DARK = np.array((0.38, 0.24, 0.52), np.float32)
_BLOCK_PIXELS = 2**19


def phantom_tiles(
    labels: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns synthetic tissue tiles and the masks of their nuclei.

    Args:
        labels: int [n], classes 0..8.
        size: Height and width.
        rng: Source of all random draws.

    Returns:
        Tiles, uint8 [n, size, size, 3], and masks of the pixels that haematoxylin stains strongly,
        bool [n, size, size]; these are empty for tissues without nuclei.
    """
    images = np.zeros((len(labels), size, size, 3), np.uint8)
    masks = np.zeros((len(labels), size, size), bool)
    block = max(1, _BLOCK_PIXELS // size**2)
    for start in range(0, len(labels), block):
        part = slice(start, start + block)
        images[part], masks[part] = _draw(labels[part], size, rng)
    return images, masks


def load_phantom_public(
    num_examples: int | None, image_size: int, seed: int, *, masks: bool = False
) -> PublicDataset:
    """Returns synthetic tissue tiles of nine equally likely classes as a public data set.

    Args:
        num_examples: Number of tiles; None means 512.
        image_size: Height and width.
        seed: The run's seed.
        masks: Whether labels are masks of the nuclei, uint8 [P, image_size, image_size] of 0 and
            1, rather than classes, int32 [P]. If so, twice as many tiles are drawn (or 4, 8, ...
            times as many, until there are enough), and the first ones with nuclei are returned.
    """
    count = 512 if num_examples is None else num_examples
    drawn = 2 * count if masks else count
    while True:
        rng = rng_for(seed, "phantom tiles")
        labels = rng.integers(0, len(LABEL_NAMES), drawn).astype(np.int32)
        images, nuclei = phantom_tiles(labels, image_size, rng)
        chosen = np.arange(drawn)
        if masks:
            chosen = np.flatnonzero(nuclei.mean((1, 2)) >= _LEAST_AREA)
        if len(chosen) >= count:
            break
        drawn *= 2
    chosen = chosen[:count]
    images = images[chosen]
    return PublicDataset(
        name="phantoms",
        synthetic=True,
        images=images,
        labels=nuclei[chosen].astype(np.uint8) if masks else labels[chosen],
        label_names=MASK_NAMES if masks else LABEL_NAMES,
        sha256=tuple(image_sha256(image) for image in images),
        originals=images,
    )


def _draw(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 tiles, a minority of whose area may show another tissue, and their masks."""
    n = len(labels)
    x, y = grid(size)
    eosin, dark = _tissue(labels, size, rng)
    others = _tissue(rng.integers(0, len(LABEL_NAMES), n), size, rng)
    # The other tissue is where a smooth field exceeds a quantile; the label keeps the larger part.
    field = waves(x, y, 2.5, rng, n)
    share = rng.uniform(0, 0.48, n)
    limit = np.array([np.quantile(f, 1 - s) for f, s in zip(field, share, strict=True)])
    other = step(field - limit[:, None, None].astype(np.float32), 0.15)
    eosin = eosin + other * (others[0] - eosin)
    dark = dark + other * (others[1] - dark)
    nuclei = dark > _NUCLEUS

    # Staining varies between and within tiles, so that colour alone is a poor feature.
    stain = np.exp(rng.normal(0, 0.35, (2, n, 1, 1))).astype(np.float32)
    uneven = 1 + 0.15 * waves(x, y, 3, rng, n)
    eosin = np.clip(eosin * stain[0] * uneven, 0, 1)[..., None]
    dark = np.clip(dark * stain[1] * uneven, 0, 1)[..., None]
    tint = np.exp(rng.normal(0, 0.05, (n, 1, 1, 3)))
    image = ((1 - eosin) * _PALE + eosin * _EOSIN) * (1 - dark) + dark * _DARK
    image = blurred(image * tint, uniform(rng, 0, 0.035, n) * size)
    noise = rng.standard_normal(image.shape, np.float32) * uniform(rng, 0.02, 0.08, n)[..., None]
    return np.round(np.clip(image + noise, 0, 1) * 255).astype(np.uint8), nuclei


def _tissue(
    labels: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each tile's amounts of eosin and haematoxylin, both 0..1 [n, size, size]."""
    n = len(labels)
    x, y = turned(*grid(size), uniform(rng, 0, 2 * np.pi, n))
    zoom = uniform(rng, 0.7, 1.4, n)
    x, y = x * zoom, y * zoom
    soft = 2.5 / size
    bend = 0.12 * waves(x, y, 3, rng, n)

    eosin = np.zeros((n, size, size), np.float32)
    dark = np.zeros_like(eosin)

    def members(label: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        chosen = np.flatnonzero(labels == label)
        return chosen, len(chosen), x[chosen], y[chosen]

    chosen, m, u, v = members(0)  # mesh: thin walls around empty cells
    near, second, _ = cells(2.6 * u, 2.6 * v, 0.8, rng, m)
    eosin[chosen] = 0.9 * bump(second - near, 0.16 + soft)

    chosen, m, u, v = members(1)  # empty: only a little debris
    near, _, mark = cells(2 * u, 2 * v, 1, rng, m)
    eosin[chosen] = 0.10 + 0.5 * bump(near, 0.35) * (mark > 0.75)

    chosen, m, u, v = members(2)  # dots: crowded small nuclei
    near, _, mark = cells(5 * u, 5 * v, 0.9, rng, m)
    eosin[chosen] = 0.35
    dark[chosen] = (0.6 + 0.4 * mark) * step(0.34 - near, 0.15)

    chosen, m, u, v = members(3)  # stripes: parallel fibres
    fibre = 0.5 + 0.5 * np.cos(uniform(rng, 13, 18, m) * (v + bend[chosen]))
    eosin[chosen] = 0.45 + 0.55 * fibre
    dark[chosen] = 0.25 * fibre**4

    chosen, m, u, v = members(4)  # swirls: smooth, pale
    flow = np.cos(5 * (v + 3 * bend[chosen]) + waves(u, v, 4, rng, m))
    eosin[chosen] = 0.28 + 0.22 * flow
    dark[chosen] = 0.10 + 0.08 * flow

    chosen, m, u, v = members(5)  # glands: dark rings around a pale middle
    near, _, mark = cells(1.5 * u, 1.5 * v, 0.5, rng, m)
    ring = bump(near - 0.34 - 0.08 * mark, 0.10)
    eosin[chosen] = 0.6 * step(near - 0.3, 0.1)
    dark[chosen] = 0.85 * ring

    chosen, m, u, v = members(6)  # cells: one nucleus each, with pale borders
    near, second, mark = cells(2.8 * u, 2.8 * v, 0.7, rng, m)
    eosin[chosen] = 0.25 + 0.6 * step(second - near - 0.18, 0.12)
    dark[chosen] = step(0.20 + 0.08 * mark - near, 0.1)

    chosen, m, u, v = members(7)  # strands: wavy fibres with few long nuclei
    wavy = v + 2.2 * bend[chosen]
    fibre = 0.5 + 0.5 * np.cos(uniform(rng, 9, 14, m) * wavy)
    near, _, mark = cells(1.5 * u, 4 * wavy, 0.9, rng, m)
    eosin[chosen] = 0.35 + 0.45 * fibre
    dark[chosen] = 0.9 * step(0.28 - near, 0.12) * (mark > 0.45)

    chosen, m, u, v = members(8)  # blobs: large crowded nuclei of uneven shape
    bumpy = 0.10 * waves(u, v, 9, rng, m)
    near, _, mark = cells(2.4 * u + bumpy, 2.4 * v + bumpy, 0.95, rng, m)
    eosin[chosen] = 0.55
    dark[chosen] = (0.55 + 0.45 * mark) * step(0.42 + 0.08 * mark - near, 0.14)
    return eosin, dark
