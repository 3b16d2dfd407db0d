import time

import numpy as np
import pytest
from scipy import ndimage

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.synthetic import phantom_volumes
from fedhelp_jax.data.synthetic.phantom_volumes import (
    load_phantom_volume_public,
    load_phantom_volumes,
    phantom_organs,
    phantom_scanner,
)
from fedhelp_jax.data.synthetic.procedural import blurred_3d, grid_3d, waves_3d
from fedhelp_jax.data.types import check_federated, image_sha256

SIZE = (24, 32, 24)


def load(num_examples=30, fractions=(0.5, 0.3, 0.2), seed=0, volume_size=(12, 16, 12), **changes):
    settings = {"validation_fraction": 0.1, "test_fraction": 0.25, "max_train": None}
    return load_phantom_volumes(
        num_examples=num_examples,
        fractions=fractions,
        volume_size=volume_size,
        seed=seed,
        **(settings | changes),
    )


@pytest.fixture(scope="module")
def organs():
    """Volumes uint8 [80, 24, 32, 24] of four clients and their masks."""
    data = load(80, (0.25,) * 4, volume_size=SIZE)
    return data.images[..., 0], data.labels


@pytest.fixture(scope="module")
def rings():
    public = load_phantom_volume_public(None, SIZE, 0)
    assert public.labels is not None
    return public.images[..., 0], public.labels


def dice(predicted, truth):
    """The mean over volumes."""
    axes = (1, 2, 3)
    both = (predicted & truth).sum(axes)
    return np.mean(2 * both / np.maximum(1, predicted.sum(axes) + truth.sum(axes)))


# --- what comes back -------------------------------------------------------------------------


def test_private():
    data = check_federated(load())
    assert data.name == "phantom_volumes" and data.synthetic
    assert data.label_names == ("background", "phantom_front", "phantom_back")
    assert data.images.shape == (30, 12, 16, 12, 1) and data.images.dtype == np.uint8
    assert data.labels.shape == (30, 12, 16, 12) and data.labels.dtype == np.uint8
    sizes = [(len(c.train), len(c.validation), len(c.test)) for c in data.clients]
    assert sizes == [(10, 1, 4), (7, 0, 2), (4, 0, 2)]
    assert [client.name for client in data.clients] == ["client_0", "client_1", "client_2"]
    everyone = np.concatenate([part for client in data.clients for part in client[1:]])
    assert np.array_equal(np.sort(everyone), np.arange(30))


def test_public():
    public = load_phantom_volume_public(10, (12, 16, 12), 0)
    assert public.name == "phantom_volumes" and public.synthetic
    assert public.label_names == ("phantom_ring",)
    assert public.images.shape == (10, 12, 16, 12, 1) and public.images.dtype == np.uint8
    assert public.labels is not None and public.labels.dtype == np.uint8
    assert public.labels.shape == (10, 12, 16, 12)
    assert np.array_equal(public.originals, public.images[..., 0])
    assert public.sha256 == tuple(image_sha256(volume) for volume in public.originals)
    assert len(set(public.sha256)) == 10


def test_seed_decides_everything():
    one, again, other = load(), load(), load(seed=1)
    assert np.array_equal(one.images, again.images) and np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.images, other.images)
    assert not np.array_equal(one.labels, other.labels)
    first, second, third = (load_phantom_volume_public(4, (8, 8, 8), s) for s in (0, 0, 1))
    assert first.sha256 == second.sha256 != third.sha256


def test_a_client_does_not_depend_on_the_others():
    alone, among = load(15, (1.0,)), load(30)
    assert np.array_equal(alone.images, among.images[:15])
    assert np.array_equal(alone.labels, among.labels[:15])
    assert all(map(np.array_equal, alone.clients[0][1:], among.clients[0][1:]))


def test_caps_and_too_few():
    assert [len(client.train) for client in load(max_train=5).clients] == [5, 5, 4]
    with pytest.raises(UserError, match="5 examples are too few for 3 clients of at least 2"):
        load(5)


@pytest.mark.parametrize("size", [(8, 8, 8), SIZE, (48, 60, 48), (10, 40, 17)])
def test_sizes(size):
    # More than a block of volumes of the largest size.
    data, public = load(8, (1.0,), volume_size=size), load_phantom_volume_public(8, size, 0)
    assert public.labels is not None
    assert data.labels.shape == public.labels.shape == (8, *size)
    for masks, classes in ((data.labels, 2), (public.labels, 1)):
        assert np.unique(masks).tolist() == list(range(classes + 1))
        for number in range(1, classes + 1):
            share = (masks == number).mean((1, 2, 3))
            assert share.min() > 0.001 and share.max() < 0.15


def test_no_organ_is_cut_off_or_in_pieces(organs):
    _, masks = organs
    inner = masks[:, 1:-1, 1:-1, 1:-1] > 0
    assert inner.sum() == (masks > 0).sum()
    for mask in masks:
        pieces = np.zeros(mask.shape, np.int32)
        ndimage.label(mask > 0, output=pieces)
        assert np.bincount(pieces.ravel())[1:].max() > 0.98 * (mask > 0).sum()


# --- difficulty ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["organs", "rings"])
def test_a_threshold_does_not_solve_it(kind, request):
    volumes, masks = request.getfixturevalue(kind)
    limits = range(0, 256, 5)
    truths = {"all": masks > 0, "front": masks == 1, "back": masks == 2}
    for name, truth in truths.items() if kind == "organs" else [("all", masks > 0)]:
        best = max(dice(volumes >= limit, truth) for limit in limits)
        between = max(
            dice((volumes >= low) & (volumes < low + width), truth)
            for low in limits
            for width in (15, 30, 60)
        )
        print(f"{kind}, {name}: Dice {best:.2f} above the best limit, {between:.2f} between two")
        assert 0.01 < best < 0.5 and between < 0.5


@pytest.mark.parametrize("kind", ["organs", "rings"])
def test_parts_are_visible(kind, request):
    volumes, masks = request.getfixturevalue(kind)
    contrasts, deviations = [], []
    for volume, mask in zip(volumes.astype(np.float64), masks > 0, strict=True):
        around = ndimage.binary_dilation(mask, iterations=4) & ~mask
        contrasts.append(volume[mask].mean() - volume[around].mean())
        deviations.append(np.sqrt((volume[mask].var() + volume[around].var()) / 2))
    ratio = np.mean(np.array(contrasts) / deviations)
    print(f"{kind}: {np.mean(contrasts):.0f} grey levels, {ratio:.1f} standard deviations")
    assert np.mean(contrasts) > 25 and ratio > 1
    assert np.mean(np.array(contrasts) > 8) > 0.95


def test_front_and_back_differ(organs):
    volumes, masks = organs
    front = np.array([v[m == 1].mean() for v, m in zip(volumes, masks, strict=True)])
    back = np.array([v[m == 2].mean() for v, m in zip(volumes, masks, strict=True)])
    assert np.mean(front - back) > 15 and np.mean(front > back) > 0.9
    # The front points towards row 0.
    rows = np.arange(SIZE[1])[:, None]
    masks = np.stack([masks == 1, masks == 2])
    centres = (rows * masks).sum((2, 3, 4)) / masks.sum((2, 3, 4))
    assert np.all(centres[0] < centres[1])


def features(volumes):
    """Place and blurred brightness, and their products: float32 [n, D, H, W, F]."""
    volumes = volumes.astype(np.float32)
    volumes = volumes - volumes.mean((1, 2, 3), keepdims=True)
    volumes /= volumes.std((1, 2, 3), keepdims=True)
    lines = [np.linspace(-1, 1, side, dtype=np.float32) for side in volumes.shape[1:]]
    place = [np.broadcast_to(a, volumes.shape) for a in np.meshgrid(*lines, indexing="ij")]
    place += [a * b for i, a in enumerate(place) for b in place[i:]]
    blurs = [ndimage.gaussian_filter(volumes, (0, s, s, s)) for s in (0.7, 1.5, 3)]
    mixed = [a * b for a in blurs for b in (*place, *blurs)]
    return np.stack([np.ones_like(volumes), *place, *blurs, *mixed], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["organs", "rings"])
def test_place_and_surroundings_help(kind, request):
    """Least squares on them does far better, on unseen volumes, than any threshold."""
    volumes, masks = request.getfixturevalue(kind)
    truth = masks > 0
    x = features(volumes)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = np.split(order, [len(x) * 3 // 4])
    rows = x[train].reshape(-1, x.shape[-1])
    weights = np.linalg.lstsq(rows.T @ rows, rows.T @ truth[train].reshape(-1), rcond=None)[0]
    score = x @ weights
    limit = max(np.linspace(0.1, 0.5, 9), key=lambda t: dice(score[train] > t, truth[train]))
    threshold = max(dice(volumes >= t, truth) for t in range(0, 256, 5))
    reached = dice(score[test] > limit, truth[test])
    print(f"{kind}: Dice {reached:.2f} of least squares, {threshold:.2f} of a threshold")
    assert reached > threshold + 0.2


def test_every_client_has_a_scanner_of_its_own():
    scanners = [phantom_scanner(0, client) for client in range(4)]
    assert np.array_equal(phantom_scanner(0, 2).bias, scanners[2].bias)
    assert not np.array_equal(phantom_scanner(1, 2).bias, scanners[2].bias)
    # The same scenes, other scanners.
    taken = [phantom_organs(6, s, (12, 16, 12), np.random.default_rng(0)) for s in scanners]
    assert all(np.array_equal(masks, taken[0][1]) for _, masks in taken)
    levels = [volumes.mean() for volumes, _ in taken]
    assert np.ptp(levels) > 10 and len(set(levels)) == 4


def test_one_scanner_per_volume_or_one_for_all(monkeypatch):
    monkeypatch.setattr(phantom_volumes, "_BLOCK_VOXELS", 2 * 8**3)  # several blocks
    scanner = phantom_scanner(0, 1)
    each = phantom_volumes.Scanners(*(np.repeat(leaf, 5, axis=0) for leaf in scanner))
    one, _ = phantom_organs(5, scanner, (8, 8, 8), np.random.default_rng(0))
    many, _ = phantom_organs(5, each, (8, 8, 8), np.random.default_rng(0))
    assert np.array_equal(one, many)


# --- the fields they are drawn with ----------------------------------------------------------


def test_grid_and_waves():
    z, y, x = grid_3d((2, 4, 5))
    assert z.shape == y.shape == x.shape == (1, 2, 4, 5)
    np.testing.assert_allclose(z[0, :, 0, 0], [-0.5, 0.5])
    np.testing.assert_allclose(y[0, 1, :, 2], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(x[0, 1, 2], [-0.8, -0.4, 0, 0.4, 0.8], atol=1e-7)
    field = waves_3d(grid_3d((16, 16, 16)), 9, np.random.default_rng(0), 40)
    assert field.shape == (40, 16, 16, 16) and field.dtype == np.float32
    assert abs(field.mean()) < 0.05 and abs(field.std() - 1) < 0.1


def test_blur():
    volumes = np.random.default_rng(0).random((2, 14, 17, 15)).astype(np.float32)
    widths = np.array([0.9, 1.4])
    got = blurred_3d(volumes, widths[:, None, None, None])
    for ours, volume, width in zip(got, volumes, widths, strict=True):
        # "mirror" is what NumPy calls "reflect".
        expected = ndimage.gaussian_filter(volume, width, mode="mirror", truncate=6)
        np.testing.assert_allclose(ours, expected, atol=5e-3)
    np.testing.assert_allclose(blurred_3d(volumes, np.zeros((1, 1, 1, 1))), volumes, atol=1e-5)


def test_a_hundred_take_a_second():
    start = time.perf_counter()
    load(100, (0.25,) * 4, volume_size=SIZE)
    seconds = time.perf_counter() - start
    print(f"100 phantom volumes of 24x32x24: {seconds:.1f} s")
    assert seconds < 15  # 0.6 s alone on one core; room for a busy machine
