"""Public images for the study `relevance`, as sources that a config names.

    --config.public.name=benchmarks.public_images:chest_xrays --config.public.path=FILE.npz
    --config.public.name=benchmarks.public_images:noise

With the same number of images from each source, a study asks how much it matters what they show.
"""

from pathlib import Path

import numpy as np

from fedhelp_jax.data.arrays import public_from_arrays
from fedhelp_jax.data.partition.fractions import rng_for
from fedhelp_jax.data.readers.images import resize_arrays
from fedhelp_jax.data.readers.npz import public_subset
from fedhelp_jax.data.sources import Request
from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.settings.schema import PublicConfig

NOISE_CLASSES = 9


def chest_xrays(config: PublicConfig, request: Request) -> PublicDataset:
    """Returns chest X-rays with and without tuberculosis, from Shenzhen and Montgomery County.

    `public.path` is an .npz file with ``images``, uint8 [N, H, W], and ``tb_label``, 0 or 1 [N].
    """
    file = Path(str(config.path))
    with np.load(file) as stored:
        images, labels = stored["images"], stored["tb_label"]
    chosen = public_subset(len(images), config.num_examples, file)
    return public_from_arrays(
        resize_arrays(images[chosen], request.image_size),
        labels[chosen],
        label_names=("normal", "tuberculosis"),
        name="chest X-rays",
    )


def noise(config: PublicConfig, request: Request) -> PublicDataset:
    """Returns independent uniform pixels with random labels, the same for every seed."""
    count, side = config.num_examples or 512, request.image_size
    rng = rng_for(0, "noise")
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return public_from_arrays(images, rng.integers(0, NOISE_CLASSES, count), name="noise")
