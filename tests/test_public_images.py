"""Tests the public images of the study `relevance`."""

import numpy as np

from benchmarks.public_images import NOISE_CLASSES
from fedhelp_jax.data.sources import load_public
from fedhelp_jax.settings.schema import PublicConfig


def test_noise_has_no_content_and_is_the_same_for_every_seed():
    config = PublicConfig(name="benchmarks.public_images:noise", num_examples=900)
    public = load_public(config, 16, seed=0)
    other = load_public(config, 16, seed=1)
    np.testing.assert_array_equal(public.images, other.images)
    np.testing.assert_array_equal(public.labels, other.labels)
    assert public.images.shape == (900, 16, 16, 3)
    # Uniform bytes have a standard deviation of 73.9, and their mean over 3 * 16**2 a smaller one.
    means = public.images.reshape(900, -1).mean(1)
    assert abs(means.std() - 73.9 / 16 / 3**0.5) < 0.2
    assert np.bincount(public.labels).min() > 60 and len(public.label_names) == NOISE_CLASSES


def test_chest_xrays_have_the_labels_of_tuberculosis(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 20, 20), dtype=np.uint8)
    file = tmp_path / "xrays.npz"
    np.savez(file, images=images, tb_label=np.arange(12) % 2, masks=images)
    config = PublicConfig(
        name="benchmarks.public_images:chest_xrays", path=str(file), num_examples=5
    )
    public = load_public(config, 20, seed=0)
    assert public.label_names == ("normal", "tuberculosis") and len(public.images) == 5
    for image, label in zip(public.images, public.labels, strict=True):
        (place,) = np.flatnonzero((images == image[..., 0]).all((1, 2)))
        assert label == place % 2
