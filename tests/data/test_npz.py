import hashlib

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.partition.clients import Splitting
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.medmnist import load_medmnist
from fedhelp_jax.data.readers.npz import load_npz_public
from fedhelp_jax.data.readers.volumes import resize_volumes
from fedhelp_jax.data.types import check_federated

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (30, 10, 12), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (30, 10, 10, 3), dtype=np.uint8)
LABELS = (np.arange(30) % 3).astype(np.uint8)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def medmnist(**changes):
    sizes = {"train": 60, "val": 20, "test": 24}
    arrays = {}
    for seed, (part, size) in enumerate(sizes.items()):
        rng = np.random.default_rng(seed)
        arrays[f"{part}_images"] = rng.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (size, 1), dtype=np.uint8)
    arrays |= changes
    return {name: array for name, array in arrays.items() if array is not None}


def load(path, fractions=(0.6, 0.3, 0.1), seed=0, **changes):
    splitting = Splitting("grouped", changes.pop("validation_fraction", 0.1), 0.25, None, seed)
    splitting = splitting._replace(max_train=changes.pop("max_train", None))
    sharing = changes.pop("sharing", Sharing(fractions=fractions))
    settings = {"image_size": 8} | changes
    return load_medmnist(path, sharing=sharing, splitting=splitting, **settings)


# --- public ---------------------------------------------------------------------------------------


def test_public_hash_is_of_the_native_grey_pixels(tmp_path):
    public = load_npz_public(saved(tmp_path / "p.npz", images=GREY, labels=LABELS), None, 16)
    assert public.images.shape == (30, 16, 16, 3) and not public.synthetic
    assert public.sha256[4] == hashlib.sha256(b"(10, 12)" + GREY[4].tobytes()).hexdigest()
    assert public.labels is not None and np.array_equal(public.labels, LABELS)
    assert public.label_names == ("0", "1", "2")
    bigger = load_npz_public(str(tmp_path / "p.npz"), None, 32)
    assert bigger.sha256 == public.sha256


def test_public_native_size_is_kept_and_labels_may_be_absent(tmp_path):
    public = load_npz_public(saved(tmp_path / "p.npz", images=COLOUR), None, 10)
    assert np.array_equal(public.images, COLOUR)
    assert public.labels is None and public.label_names is None


@pytest.mark.parametrize("key", ["label_names", "fine_label_names"])
@pytest.mark.parametrize("kind", ["U", "S"])
def test_public_label_names(tmp_path, key, kind):
    names = np.array(["x", "y", "z"]).astype(kind)
    path = saved(tmp_path / "p.npz", images=COLOUR, labels=LABELS[:, None], **{key: names})
    assert load_npz_public(path, None, 10).label_names == ("x", "y", "z")


def test_public_subset_is_the_same_for_all(tmp_path):
    path = saved(tmp_path / "p.npz", images=COLOUR, labels=LABELS)
    whole, some = load_npz_public(path, None, 10), load_npz_public(path, 7, 10)
    assert len(some.images) == len(some.sha256) == 7
    kept = [whole.sha256.index(digest) for digest in some.sha256]
    assert kept == sorted(set(kept))
    assert some.labels is not None and np.array_equal(some.labels, LABELS[kept])
    assert np.array_equal(some.images, COLOUR[kept])


def test_public_from_medmnist_joins_all_splits(tmp_path):
    arrays = medmnist()
    public = load_npz_public(saved(tmp_path / "pneumoniamnist.npz", **arrays), None, 8)
    joined = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
    assert np.array_equal(public.images[..., 0], joined)
    assert public.label_names == ("normal", "pneumonia")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "has no array 'images'; it has \\['labels'\\]"),
        ({"images": GREY / 255}, "images must be uint8, got float64"),
        ({"images": GREY[0]}, "images must be \\[N, H, W\\] .* got shape \\(10, 12\\)"),
        ({"images": GREY[:0]}, "and not empty, got shape \\(0, 10, 12\\)"),
        ({"images": GREY, "labels": LABELS / 1.0}, "labels must be integers, got float64"),
        ({"images": GREY, "labels": LABELS[1:]}, "labels must be one label per image"),
        ({"images": GREY, "labels": np.eye(30, dtype=int)}, "got \\(30, 30\\)"),
        (
            {"images": GREY, "labels": LABELS.astype(int) - 1},
            "labels holds -1; labels count from 0",
        ),
        (
            {"images": GREY, "labels": LABELS, "label_names": np.array(["a", "b"])},
            "label 2 is out of range; the 2 classes are 0..1",
        ),
        (
            {"images": GREY, "labels": LABELS, "label_names": np.arange(3)},
            "label names must be a list of strings",
        ),
        ({"images": np.array([None, "x"], dtype=object)}, "cannot be read as an .npz file"),
    ],
)
def test_public_bad_files(tmp_path, arrays, message):
    with pytest.raises(UserError, match=f"^public.path: .*p.npz.*{message}"):
        load_npz_public(saved(tmp_path / "p.npz", **arrays), None, 8)


def test_public_bad_settings(tmp_path):
    path = saved(tmp_path / "p.npz", images=GREY)
    with pytest.raises(UserError, match="public.num_examples must be in 1..30 for .* got 31"):
        load_npz_public(path, 31, 8)
    with pytest.raises(UserError, match="public.path is not set"):
        load_npz_public(None, None, 8)
    with pytest.raises(UserError, match="public.path: /no/p.npz does not exist"):
        load_npz_public("/no/p.npz", None, 8)


@pytest.mark.parametrize("content", [b"", b"text", "cut", "flip", "npy"])
def test_damaged_files(tmp_path, content):
    file = tmp_path / "p.npz"
    saved(file, images=GREY)
    whole = bytearray(file.read_bytes())
    if content == "npy":
        with file.open("wb") as opened:
            np.save(opened, GREY)
    elif content == "flip":
        whole[1000] ^= 1
        file.write_bytes(whole)
    else:
        file.write_bytes(bytes(whole[:500]) if content == "cut" else content)
    with pytest.raises(UserError, match="public.path: .*p.npz cannot be read as an .npz file"):
        load_npz_public(str(file), None, 8)


# --- public masks ---------------------------------------------------------------------------------

MASKS = RNG.integers(0, 2, (30, 20, 24), dtype=np.uint8)
VOLUMES = RNG.integers(0, 256, (30, 6, 4, 8), dtype=np.uint8)
LABEL_VOLUMES = RNG.integers(0, 3, (30, 6, 4, 8), dtype=np.uint8)


@pytest.mark.parametrize("key", ["masks", "labels"])
def test_public_masks_keep_their_size(tmp_path, key):
    path = saved(tmp_path / "lung_128.npz", images=GREY, **{key: 255 * MASKS})
    public = load_npz_public(path, None, 16, masks=True)
    plain = load_npz_public(saved(tmp_path / "p.npz", images=GREY), None, 16)
    assert np.array_equal(public.images, plain.images) and public.sha256 == plain.sha256
    assert public.labels is not None and public.labels.dtype == np.uint8
    assert np.array_equal(public.labels, MASKS) and public.label_names == ("lung",)


def test_public_volumes(tmp_path):
    path = saved(tmp_path / "p.npz", volumes=VOLUMES, labels=LABEL_VOLUMES)
    public = load_npz_public(path, None, 16, masks=True, volume_size=(3, 4, 4))
    assert np.array_equal(public.images, resize_volumes(VOLUMES, (3, 4, 4)))
    assert public.labels is not None and np.array_equal(public.labels, LABEL_VOLUMES)
    assert public.label_names == ("background", "1", "2")
    assert np.array_equal(public.originals, VOLUMES)
    assert public.sha256[7] == hashlib.sha256(b"(6, 4, 8)" + VOLUMES[7].tobytes()).hexdigest()
    native = load_npz_public(path, None, 16, masks=True)
    assert np.array_equal(native.images, VOLUMES[..., None])


def test_public_masks_go_with_their_images(tmp_path):
    path = saved(tmp_path / "p.npz", images=COLOUR, masks=MASKS[:, :, :20])
    plain = load_npz_public(saved(tmp_path / "q.npz", images=COLOUR), 7, 10)
    some = load_npz_public(path, 7, 10, masks=True)
    assert some.sha256 == plain.sha256
    kept = [image.tobytes() for image in COLOUR]
    places = [kept.index(image.tobytes()) for image in some.images]
    assert some.labels is not None and np.array_equal(some.labels, MASKS[places, :, :20])


@pytest.mark.parametrize("labels", [None, LABELS, LABELS[:, None]])
def test_public_images_may_have_no_masks(tmp_path, labels):
    more = {} if labels is None else {"labels": labels}
    public = load_npz_public(saved(tmp_path / "p.npz", images=COLOUR, **more), None, 10, masks=True)
    assert public.labels is None and public.label_names is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"masks": MASKS}, "must have one array images or volumes"),
        ({"images": GREY, "masks": MASKS[1:]}, "masks must be one mask for each of 30 images"),
        ({"images": GREY, "masks": 3 * MASKS}, "masks hold the values 0, 3;"),
        ({"images": GREY, "masks": 0 * MASKS}, "masks: all 30 masks are empty"),
    ],
)
def test_public_bad_masks(tmp_path, arrays, message):
    with pytest.raises(UserError, match=f"^public.path: .*p.npz.*{message}"):
        load_npz_public(saved(tmp_path / "p.npz", **arrays), None, 8, masks=True)


# --- MedMNIST -------------------------------------------------------------------------------------


def test_medmnist_pools_train_and_validation_and_keeps_test_apart(tmp_path):
    arrays = medmnist()
    data = check_federated(load(saved(tmp_path / "pneumoniamnist_64.npz", **arrays)))
    assert data.label_names == ("normal", "pneumonia") and not data.synthetic
    sizes = [(len(c.train) + len(c.validation), len(c.test)) for c in data.clients]
    assert sizes == [(48, 14), (24, 7), (8, 3)]
    assert [len(client.validation) for client in data.clients] == [4, 2, 0]
    assert sorted(i for c in data.clients for i in c.test) == list(range(80, 104))
    assert sorted(i for c in data.clients for i in (*c.train, *c.validation)) == list(range(80))
    joined = np.concatenate([arrays[f"{part}_labels"][:, 0] for part in ("train", "val", "test")])
    assert np.array_equal(data.labels, joined)


def test_medmnist_is_seeded(tmp_path):
    path = saved(tmp_path / "m.npz", **medmnist())
    one, again, other = load(path), load(path), load(path, seed=1)
    assert all(map(np.array_equal, one.clients[0][1:], again.clients[0][1:]))
    assert not np.array_equal(one.clients[0].train, other.clients[0].train)
    assert one.label_names == ("0", "1")


def test_medmnist_colour_flat_labels_resized_and_capped(tmp_path):
    arrays = medmnist()
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = np.repeat(arrays[f"{part}_images"][..., None], 3, -1)
        arrays[f"{part}_labels"] = arrays[f"{part}_labels"][:, 0]
    data = load(saved(tmp_path / "m.npz", **arrays), image_size=12, max_train=5)
    assert data.images.shape == (104, 12, 12, 3)
    assert [len(client.train) for client in data.clients] == [5, 5, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, "has no array 'val_labels'"),
        ({"test_images": None}, "has no array 'test_images'"),
        ({"train_images": np.zeros((60, 8, 8))}, "train_images must be uint8, got float64"),
        ({"val_labels": np.zeros(20)}, "val_labels must be integers, got float64"),
        ({"val_labels": np.full(20, 2)}, "label 2 is out of range; the 2 classes are 0..1"),
        ({"val_labels": np.full(20, -1)}, "val_labels holds -1; labels count from 0"),
        ({"val_images": np.zeros((20, 9, 9), np.uint8)}, "splits hold images of different shapes"),
    ],
)
def test_medmnist_bad_files(tmp_path, changes, message):
    path = saved(tmp_path / "pneumoniamnist.npz", **medmnist(**changes))
    with pytest.raises(UserError, match=f"^data.path: .*pneumoniamnist.npz.*{message}"):
        load(path)


def test_medmnist_bad_settings(tmp_path):
    path = saved(tmp_path / "m.npz", **medmnist())
    with pytest.raises(UserError, match="data.fractions: 24 examples are too few for 25 clients"):
        load(path, fractions=(0.04,) * 25)
    with pytest.raises(UserError, match="data.path is not set; it must name a MedMNIST .npz file"):
        load(None)
