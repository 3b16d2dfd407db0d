import re
from typing import Any

import numpy as np
import pytest
from helpers import refusal

from fedhelp_jax.data.readers.images import resize_arrays
from fedhelp_jax.data.readers.npz_masks import load_npz_masks
from fedhelp_jax.data.readers.volumes import resize_volumes, scanner_shift
from fedhelp_jax.data.types import check_federated

RNG = np.random.default_rng(0)
N = 40
IMAGES = RNG.integers(0, 256, (N, 10, 12), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (N, 10, 12, 3), dtype=np.uint8)
VOLUMES = RNG.integers(1, 256, (N, 6, 8, 4), dtype=np.uint8)
BINARY = RNG.integers(0, 2, (N, 20, 24), dtype=np.uint8)
LABELS = RNG.integers(0, 3, (N, 9, 12, 6), dtype=np.uint8)
SITE = np.array([2, 0] * 15 + [0] * 10)
FRACTIONS = (0.6, 0.3, 0.1)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def load(path, seed=0, **changes):
    settings = {
        "fractions": FRACTIONS,
        "split_by": "fractions",
        "image_size": 8,
        "volume_size": (3, 4, 4),
        "validation_fraction": 0.2,
        "test_fraction": 0.25,
        "max_train": None,
        "scanner_shift": False,
    }
    return load_npz_masks(path, seed=seed, **(settings | changes))


def members(client):
    return sorted(np.concatenate(client[1:]).tolist())


def same_splits(one, two):
    pairs = zip(one.clients, two.clients, strict=True)
    return all(np.array_equal(a, b) for c, d in pairs for a, b in zip(c[1:], d[1:], strict=True))


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [IMAGES, COLOUR])
@pytest.mark.parametrize("white", [1, 255])
def test_images_are_resized_and_masks_are_not(tmp_path, images, white):
    path = saved(tmp_path / "lung_2.npz", images=images, masks=white * BINARY)
    data = check_federated(load(path))
    assert np.array_equal(data.images, resize_arrays(images, 8))
    assert data.labels.dtype == np.uint8 and np.array_equal(data.labels, BINARY)
    assert (data.name, data.label_names, data.synthetic) == ("lung_2", ("lung",), False)


def test_volumes(tmp_path):
    path = saved(tmp_path / "brain.npz", volumes=VOLUMES, labels=LABELS)
    data = check_federated(load(path))
    assert np.array_equal(data.images, resize_volumes(VOLUMES, (3, 4, 4)))
    assert data.labels.dtype == np.uint8 and np.array_equal(data.labels, LABELS)
    assert data.label_names == ("background", "1", "2")


@pytest.mark.parametrize(
    ("masks", "stored", "names"),
    [
        (BINARY, None, ("foreground",)),
        (BINARY, ["heart"], ("heart",)),
        (BINARY, ["background", "heart"], ("background", "heart")),
        (BINARY, [b"heart"], ("heart",)),
        (LABELS[..., 0], ["background", "a", "b"], ("background", "a", "b")),
        (LABELS[..., 0], ["background", "a", "b", "c"], ("background", "a", "b", "c")),
    ],
)
def test_label_names(tmp_path, masks, stored, names):
    more = {} if stored is None else {"label_names": np.array(stored)}
    data = load(saved(tmp_path / "x.npz", images=IMAGES, masks=masks, **more))
    assert data.label_names == names
    assert np.array_equal(data.labels, masks)


def test_masks_are_taken_before_labels_of_whole_images(tmp_path):
    path = saved(tmp_path / "x.npz", images=IMAGES, masks=BINARY, labels=np.arange(N) % 5)
    assert np.array_equal(load(path).labels, BINARY)


# --- how it is split ------------------------------------------------------------------------------


def test_fractions_deal_every_example_out_once(tmp_path):
    path = saved(tmp_path / "x.npz", images=IMAGES, masks=BINARY)
    data = check_federated(load(path))
    assert [client.name for client in data.clients] == ["client_0", "client_1", "client_2"]
    sizes = [tuple(map(len, client[1:])) for client in data.clients]
    # Of 24, 12, 4: a quarter for testing, a fifth of the rest (rounded down) for validation.
    assert sizes == [(15, 3, 6), (8, 1, 3), (3, 0, 1)]
    assert sorted(i for client in data.clients for i in members(client)) == list(range(N))
    assert members(data.clients[0]) != list(range(24)), "not dealt out at random"
    assert all(part.dtype == np.int32 for client in data.clients for part in client[1:])
    assert same_splits(data, load(path)) and not same_splits(data, load(path, seed=1))


def test_a_client_of_two_trains_on_one_and_tests_on_one(tmp_path):
    path = saved(tmp_path / "x.npz", images=IMAGES[:4], masks=BINARY[:4])
    for fraction in (0.01, 0.99):
        data = check_federated(load(path, fractions=(0.9, 0.1), test_fraction=fraction))
        assert [(len(c.train), len(c.test)) for c in data.clients] == [(1, 1), (1, 1)]


def test_the_cap_leaves_test_and_validation_alone(tmp_path):
    path = saved(tmp_path / "x.npz", images=IMAGES, masks=BINARY)
    whole, few = load(path), load(path, max_train=2)
    for one, two in zip(whole.clients, few.clients, strict=True):
        assert len(two.train) == 2 and set(two.train) <= set(one.train)
        assert np.array_equal(one.validation, two.validation)
        assert np.array_equal(one.test, two.test)


@pytest.mark.parametrize(
    ("more", "names"),
    [({}, ["site_0", "site_2"]), ({"site_names": np.array(["a", "b", "c"])}, ["a", "c"])],
)
def test_a_client_is_a_site(tmp_path, more, names):
    path = saved(tmp_path / "x.npz", images=IMAGES, masks=BINARY, site=SITE, **more)
    data = check_federated(load(path, split_by="site"))
    assert [client.name for client in data.clients] == names
    for number, client in zip((0, 2), data.clients, strict=True):
        assert members(client) == np.flatnonzero(SITE == number).tolist()
    assert [len(client.test) for client in data.clients] == [6, 4]
    # A site does not depend on the others.
    other = np.where(SITE == 0, 1, SITE)
    path = saved(tmp_path / "y.npz", images=IMAGES, masks=BINARY, site=other, **more)
    again = load(path, split_by="site").clients[1]
    assert all(map(np.array_equal, data.clients[1][1:], again[1:]))


# --- scanners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_by", ["fractions", "site"])
def test_each_client_gets_a_scanner_before_resizing(tmp_path, split_by):
    path = saved(tmp_path / "x.npz", volumes=VOLUMES, labels=LABELS, site=SITE)
    plain = load(path, split_by=split_by)
    data = check_federated(load(path, split_by=split_by, scanner_shift=True))
    assert data.name == "x_simulated_scanners" and same_splits(plain, data)
    assert np.array_equal(plain.labels, data.labels)
    numbers = (0, 2) if split_by == "site" else (0, 1, 2)
    for number, client in zip(numbers, data.clients, strict=True):
        own = members(client)
        expected = resize_volumes(scanner_shift(VOLUMES[own], 0, number), (3, 4, 4))
        assert np.array_equal(data.images[own], expected)
        assert not np.array_equal(data.images[own], plain.images[own])


# --- what is refused ------------------------------------------------------------------------------

GOOD = {"images": IMAGES, "masks": BINARY}
NAMES = np.array([f"scan_{i}.png" for i in range(N)])
ODD = BINARY.copy()
ODD[7, 2, 2] = 9


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"masks": BINARY}, "must have one array images or volumes; it has \\['masks'\\]"),
        (GOOD | {"volumes": VOLUMES}, "must have one array images or volumes; it has \\['images'"),
        ({"images": IMAGES}, "has no masks; it must have one per example, as masks or labels"),
        ({"images": IMAGES, "labels": np.arange(N)}, "has no masks"),
        (GOOD | {"images": IMAGES / 1.0}, "images must be uint8, got float64"),
        ({"volumes": VOLUMES * 1.0, "masks": LABELS}, "volumes must be uint8, got float64"),
        ({"volumes": COLOUR[0], "masks": LABELS}, "volumes must be \\[N, D, H, W\\] and not empty"),
        (GOOD | {"masks": BINARY[1:]}, "masks must be one mask for each of 40 images, \\[N, H, W]"),
        (GOOD | {"masks": LABELS}, "masks must be .*\\[N, H, W\\], got shape \\(40, 9, 12, 6\\)"),
        ({"volumes": VOLUMES, "labels": BINARY}, "labels must be .* 40 volumes, \\[N, D, H, W\\]"),
        (GOOD | {"masks": BINARY / 1.0}, "masks must be integers or bools, got float64"),
        (GOOD | {"masks": 0 * BINARY}, "masks: all 40 masks are empty"),
        (GOOD | {"masks": ODD}, "masks hold the values 0, 1, 9; without label_names they must"),
        (GOOD | {"masks": 254 * BINARY}, "masks hold the values 0, 254; without label_names"),
        (GOOD | {"masks": IMAGES}, "masks hold the values 0, 1, 2, 3, 4, 5, 6, 7, \\.\\.\\.;"),
        (
            GOOD | {"masks": ODD, "label_names": np.array(["heart"])},
            "mask of example 7 holds 9; masks of one foreground class hold 0 and 1",
        ),
        (
            GOOD | {"masks": ODD, "label_names": np.array(["x", "y"]), "names": NAMES},
            "mask scan_7.png holds 9; masks of 2 classes hold 0..1",
        ),
        (GOOD | {"label_names": np.array(["x", "x"])}, "label_names must be different names"),
        (GOOD | {"label_names": np.arange(2)}, "label names must be a list of strings"),
        (GOOD | {"names": NAMES[1:]}, "names must be 40 names, got 39"),
        (GOOD | {"names": np.array([None] * N)}, "cannot be read as an .npz file without pickles"),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    path = saved(tmp_path / "x.npz", **arrays)
    line = refusal(lambda: load(path))
    assert re.search(f"^data.path: .*x.npz.*{message}", line), line


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no array site, which data.split_by=site needs"),
        ({"site": SITE[1:]}, "site must be one label per image"),
        ({"site": SITE - 1}, "site holds -1; labels count from 0"),
        ({"site": SITE / 1.0}, "site must be integers"),
        ({"site": np.arange(N) // 39}, "site site_1 has one example; a client needs at least two"),
        ({"site": SITE, "site_names": np.array(["a", "b"])}, "different names of the sites 0..2"),
        ({"site": SITE, "site_names": np.array(["a", "b", "a"])}, "site_names must be different"),
        ({"site": SITE, "site_names": np.arange(3)}, "site names must be a list of strings"),
    ],
)
def test_bad_sites(tmp_path, arrays, message):
    path = saved(tmp_path / "x.npz", **GOOD, **arrays)
    line = refusal(lambda: load(path, split_by="site"))
    assert re.search(f"^data.path: .*x.npz.*{message}", line), line


def test_bad_settings(tmp_path):
    path = saved(tmp_path / "x.npz", **GOOD)
    changes: dict[str, Any]
    for changes, start in (
        ({"split_by": "hospital"}, "data.split_by must be fractions or site, got 'hospital'"),
        ({"scanner_shift": True}, f"data.scanner_shift is for volumes; {path} has images"),
        ({"fractions": (0.02,) * 50}, "data.fractions: 40 examples are too few for 50 clients of"),
    ):
        assert refusal(lambda changes=changes: load(path, **changes)).startswith(start)
    assert refusal(lambda: load(None)).startswith("data.path is not set; it must name an .npz file")
    assert refusal(lambda: load(str(tmp_path))).startswith(f"data.path: {tmp_path} cannot be read")


# --- real data ------------------------------------------------------------------------------------


def test_real_lungs(real):
    data = check_federated(load(str(real / "lung_cxr_seg_128.npz"), split_by="site", image_size=64))
    assert {client.name: len(members(client)) for client in data.clients} == {
        "shenzhen": 566,
        "montgomery": 138,
    }
    assert data.label_names == ("lung",) and data.labels.shape == (704, 128, 128)
    # Lungs are darker than what is around them, if image and mask lie on each other.
    pixels, masks = data.images[..., 0], data.labels[:, ::2, ::2] == 1
    inside = np.array([image[mask].mean() for image, mask in zip(pixels, masks, strict=True)])
    beside = np.roll(masks, 32, axis=1) & ~masks
    around = np.array([image[mask].mean() for image, mask in zip(pixels, beside, strict=True)])
    assert np.mean(inside < around) > 0.9
    assert all(mask.any() for mask in masks)


def test_real_hippocampi(real):
    path = str(real / "hippocampus_3d_48x64x48.npz")
    plain = load(path, volume_size=(24, 32, 24))
    data = check_federated(load(path, volume_size=(24, 32, 24), scanner_shift=True))
    assert data.images.shape == (260, 24, 32, 24, 1)
    assert data.labels.shape == (260, 48, 64, 48)
    assert data.label_names == ("background", "anterior", "posterior")
    assert all(np.array_equal(np.unique(mask), [0, 1, 2]) for mask in data.labels)
    # The padding around a scan stays black on every scanner.
    black = plain.images == 0
    assert black.mean() > 0.3 and data.images[black].max() <= 3
    # Volumes and masks lie on each other: the hippocampus is not where the padding is.
    masks = plain.labels[:, ::2, ::2, ::2, None] > 0
    assert np.mean(black[masks]) < 0.01


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": IMAGES, "masks": BINARY.transpose(0, 2, 1)},
        {"volumes": VOLUMES, "labels": LABELS.transpose(0, 3, 2, 1)},
    ],
)
def test_masks_of_another_aspect_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    line = refusal(lambda: load(tmp_path / "x.npz"))
    assert re.search("^data.path: .*x.npz: (masks|labels) of shape .* are of another aspect", line)
