import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers import volumes as module
from fedhelp_jax.data.readers.volumes import resize_volumes, scanner_shift

VOLUMES = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 10), dtype=np.uint8)


def ball(shape=(24, 28, 20), value=150):
    """A ball in black: what a scan without a table looks like."""
    axes = (np.linspace(-1, 1, side) for side in shape)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    return np.where(radius < 0.8, value, 0).astype(np.uint8)


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 3, 5), (8, 5, 13), (16, 20, 17), (1, 1, 1)])
def test_resizing_is_that_of_jax(size):
    resized = resize_volumes(VOLUMES, size)
    assert resized.shape == (3, *size, 1) and resized.dtype == np.uint8
    expected = jax.image.resize(
        jnp.asarray(VOLUMES, float), (3, *size), method="linear", antialias=True
    )
    assert np.abs(resized[..., 0] - np.asarray(expected, np.float64)).max() <= 0.501


def test_halving_one_side_by_hand():
    line = np.array([0, 0, 0, 0, 80, 80, 80, 80], np.uint8)
    resized = resize_volumes(np.broadcast_to(line, (1, 2, 3, 8)), (2, 3, 4))
    # Triangles of two voxels to each side: weights 1, 3, 3, 1 over 8, and at the ends 3, 3, 1.
    assert np.array_equal(resized[0, ..., 0], np.broadcast_to([0, 10, 70, 80], (2, 3, 4)))


def test_a_size_that_is_there_already_keeps_every_voxel():
    assert np.array_equal(resize_volumes(VOLUMES, (8, 9, 10)), VOLUMES[..., None])
    assert resize_volumes(VOLUMES[:0], (4, 4, 4)).shape == (0, 4, 4, 4, 1)


def test_blocks_change_nothing(monkeypatch):
    whole = resize_volumes(VOLUMES, (4, 5, 6))
    monkeypatch.setattr(module, "_BLOCK_VOXELS", 1500)
    assert np.array_equal(resize_volumes(VOLUMES, (4, 5, 6)), whole)


def test_flat_volumes_stay_flat():
    flat = np.broadcast_to(np.array([0, 1, 255], np.uint8)[:, None, None, None], (3, 9, 7, 8))
    resized = resize_volumes(flat, (5, 11, 3))
    assert [np.unique(volume).tolist() for volume in resized] == [[0], [1], [255]]


# --- scanners -------------------------------------------------------------------------------------


def test_a_scanner_is_the_seeds_and_the_clients():
    scans = np.stack([ball(), ball(value=90)])
    one = scanner_shift(scans, seed=3, client=1)
    assert one.shape == scans.shape and one.dtype == np.uint8
    assert np.array_equal(one, scanner_shift(scans, seed=3, client=1))
    assert not np.array_equal(one, scanner_shift(scans, seed=4, client=1))
    assert not np.array_equal(one, scanner_shift(scans, seed=3, client=2))
    assert np.array_equal(scans[0], ball()), "the argument was written to"


def test_the_noise_of_a_volume_depends_on_its_place_alone():
    scans = np.stack([ball(), ball(), ball(value=90)])
    shifted = scanner_shift(scans, seed=0, client=0)
    assert not np.array_equal(shifted[0], shifted[1])
    assert np.array_equal(shifted[:2], scanner_shift(scans[:2], seed=0, client=0))


@pytest.mark.parametrize("client", range(8))
def test_what_a_scanner_does_is_mild(client):
    scan = ball()
    shifted = scanner_shift(scan[None], seed=0, client=client)[0].astype(float)
    assert np.all(shifted[scan == 0] == 0)
    inside = shifted[scan > 0]
    assert 60 < inside.mean() < 230
    # The ball is still what is bright, and the parts of the bias field stay bounded.
    assert np.quantile(inside, 0.02) > 20


def test_clients_differ_in_contrast_bias_and_noise():
    scans = np.stack([ball(value=value) for value in (100, 100, 180)])
    found = []
    for client in range(12):
        shifted = scanner_shift(scans, seed=0, client=client).astype(float)
        inside = [volume[ball() > 0] for volume in shifted]
        # The same noiseless scan twice: their difference is noise, their mean the smooth field.
        noise = np.std(inside[0] - inside[1]) / np.sqrt(2)
        smooth = (inside[0] + inside[1]) / 2
        field = np.sqrt(max(np.var(smooth) - noise**2 / 2, 0)) / smooth.mean()
        found.append((inside[2].mean() / smooth.mean(), field, noise))
    contrast, field, noise = np.array(found).T
    # 1.8 ** gamma, gamma from 0.67 to 1.49; less where the brightest voxels are cut off.
    assert contrast.min() > 1.1 and contrast.max() < 1.8**1.5 + 0.05 and np.ptp(contrast) > 0.3
    assert field.min() > 0.02 and np.ptp(field) > 0.05
    assert 0.01 * 255 < noise.min() + 0.5 and noise.max() < 0.06 * 255 + 0.5 and np.ptp(noise) > 3


def test_the_bias_is_smooth():
    scan = np.full((24, 28, 20), 120, np.uint8)
    field = scanner_shift(np.repeat(scan[None], 40, 0), seed=1, client=0).astype(float).mean(0)
    steps = [np.abs(np.diff(field, axis=axis)).max() for axis in range(3)]
    assert max(steps) < 0.35 * np.ptp(field)


def test_voxels_that_are_no_numbers_are_refused():
    volumes = np.ones((2, 4, 4, 4), np.float32)
    volumes[1, 2, 3, 0] = np.nan
    for size in ((2, 2, 2), (4, 4, 4)):
        with pytest.raises(UserError, match="1 of 128 voxels are NaN or infinite"):
            resize_volumes(volumes, size)
