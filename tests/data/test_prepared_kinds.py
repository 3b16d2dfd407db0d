"""Prepared sets of every kind, as private and as public data."""

import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from toy_sets import write_set

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.prepare import prepare
from fedhelp_jax.data.readers.volumes import resize_mask, resize_volume, resize_volumes
from fedhelp_jax.data.sources import load_federated, load_public
from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.settings.schema import DataConfig, PublicConfig

FRACTIONS = (0.5, 0.3, 0.2)


def private(folder, name, *, masks=False, seed=0, **settings):
    common = {"image_size": 8, "cache_dir": str(folder / "cache"), "fractions": FRACTIONS}
    config = DataConfig(name=name, **({"path": str(folder / "data")} | common | settings))
    return load_federated(config, seed, masks=masks)


def public(folder, name, *, masks=False, num_examples=None, volume_size=(8, 8, 8)):
    config = PublicConfig(name=name, path=str(folder / "data"), num_examples=num_examples)
    cache = str(folder / "cache")
    return load_public(config, 8, 0, masks=masks, volume_size=volume_size, cache_dir=cache)


def ids(dataset):
    return {client.name: set(np.concatenate(client[1:]).tolist()) for client in dataset.clients}


# --- MedMNIST: equal to its file ------------------------------------------------------------------


@pytest.fixture
def pneumonia(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {}
    for part, size in {"train": 90, "val": 20, "test": 40}.items():
        arrays[f"{part}_images"] = draw.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = draw.integers(0, 2, (size, 1), dtype=np.uint8)
    (tmp_path / "download").mkdir()
    np.savez(tmp_path / "download/pneumoniamnist.npz", **arrays)
    prepare(
        "medmnist/pneumoniamnist_28",
        str(tmp_path / "download"),
        str(tmp_path / "data"),
        say=lambda text: None,
        allow_repacked=True,
    )
    return tmp_path


@pytest.mark.parametrize(
    "by", ["fractions", "iid", "quantity", "dirichlet", "shards", "clusters", None]
)
def test_a_prepared_medmnist_is_its_file(pneumonia, by):
    settings = {"split_by": by, "num_clients": 3, "seed": 4, "dirichlet_alpha": 5.0}
    file = str(pneumonia / "download/pneumoniamnist.npz")
    raw = private(pneumonia, "medmnist", path=file, **settings)
    for _ in range(2):  # the second time from the cache
        made = private(pneumonia, "tfds:medmnist/pneumoniamnist_28", **settings)
        assert made.name == "medmnist_pneumoniamnist_28" and made.label_names == raw.label_names
        np.testing.assert_array_equal(made.images, raw.images)
        np.testing.assert_array_equal(made.labels, raw.labels)
        for ours, theirs in zip(made.clients, raw.clients, strict=True):
            assert ours.name == theirs.name
            for mine, other in zip(ours[1:], theirs[1:], strict=True):
                np.testing.assert_array_equal(mine, other)


# --- masks ----------------------------------------------------------------------------------------


def lesions(count=24):
    """Images with masks, two patients' images beside each other, at two hospitals."""
    draw = np.random.default_rng(3)
    examples = []
    for i in range(count):
        mask = np.zeros((14, 20), np.uint8)
        mask[2 : 4 + i % 9, 3:11] = 255
        image = draw.integers(0, 256, (14, 20, 3), dtype=np.uint8)
        examples.append(
            {
                "id": f"i{i:02}",
                "image": image,
                "mask": mask[..., None],
                "site": i % 2,
                "group": f"p{i // 4}",
            }
        )
    return examples


MASK_FEATURES = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
    "site": tfds.features.ClassLabel(names=["north", "south"]),
    "group": tfds.features.Text(),
}


@pytest.mark.parametrize("spelled", ["", "nan", "N/A"])
def test_an_unknown_patient_is_of_one_example(tmp_path, spelled):
    examples = with_grey_masks(lesions())
    for number, example in enumerate(examples):
        example["group"] = spelled if number % 3 else f"p{number}"
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": examples})
    by_name = private(tmp_path, "tfds:lesions", masks=True)
    for number, example in enumerate(examples):
        example["group"] = f"p{number}"
    write_set(tmp_path / "data", "other", MASK_FEATURES, {"train": examples})
    alone = private(tmp_path, "tfds:other", masks=True)
    for one, two in zip(by_name.clients, alone.clients, strict=True):
        assert [len(part) for part in one[1:]] == [len(part) for part in two[1:]]


def test_an_unknown_site_is_refused_unless_clients_are_others(tmp_path):
    features = MASK_FEATURES | {"site": tfds.features.Text()}
    examples = with_grey_masks(lesions())
    for number, example in enumerate(examples):
        example["site"] = "NaN" if number in (5, 7) else f"h{number % 2}"
    write_set(tmp_path / "data", "lesions", features, {"train": examples})
    with pytest.raises(UserError, match="2 of 24 examples are of unknown site, such as i05; name"):
        private(tmp_path, "tfds:lesions", masks=True)
    shared = private(tmp_path, "tfds:lesions", masks=True, split_by="iid", num_clients=2)
    assert sum(len(part) for client in shared.clients for part in client[1:]) == 24


def with_grey_masks(examples):
    return [example | {"mask": example["mask"][..., 0]} for example in examples]


def test_masks_without_an_official_split_are_split_by_patient(tmp_path):
    examples = lesions()
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": with_grey_masks(examples)})
    data = private(tmp_path, "tfds:lesions", masks=True)
    assert [client.name for client in data.clients] == ["north", "south"]
    assert data.label_names == ("foreground",) and data.name == "lesions"
    # In the order of sites, then of names.
    order = sorted(range(24), key=lambda i: (i % 2, i))
    places = (np.arange(8) * 2 + 1) * np.array([[14], [20]]) // 16
    for row, i in enumerate(order):
        mask = examples[i]["mask"][..., 0] > 0
        np.testing.assert_array_equal(data.labels[row], mask[np.ix_(*places)])
    for client in data.clients:
        sides = [{order[row] // 4 for row in part} for part in client[1:]]
        assert not sides[0] & sides[2] and not sides[1] & sides[2] and not sides[0] & sides[1]
    with pytest.raises(UserError, match="lesions has no classes to learn.*it has .*mask"):
        private(tmp_path, "tfds:lesions")


def test_public_masks_come_with_native_images(tmp_path):
    examples = lesions()
    splits = {"train": with_grey_masks(examples[:20]), "test": with_grey_masks(examples[20:])}
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, splits)
    data = public(tmp_path, "tfds:lesions", masks=True)
    natives = {image_sha256(example["image"]): example for example in examples}
    assert set(data.sha256) == set(natives) and len(data.originals) == 24
    for sha, original, label in zip(data.sha256, data.originals, data.labels, strict=True):
        np.testing.assert_array_equal(original, natives[sha]["image"])
        expected = resize_mask(natives[sha]["mask"][..., 0] > 0, (8, 8))
        np.testing.assert_array_equal(label, expected)
    assert [image.shape for image in data.originals[3:5]] == [(14, 20, 3)] * 2
    some, more = (public(tmp_path, "tfds:lesions", num_examples=n) for n in (5, 9))
    assert some.labels is None and some.label_names is None
    assert set(some.sha256) < set(more.sha256) < set(data.sha256)
    again = public(tmp_path, "tfds:lesions", num_examples=5)
    assert again.sha256 == some.sha256
    with pytest.raises(UserError, match=r"public.num_examples must be in 1..24"):
        public(tmp_path, "tfds:lesions", num_examples=25)


# --- volumes --------------------------------------------------------------------------------------


def volumes(modalities=None):
    draw = np.random.default_rng(5)
    found = []
    for i in range(12):
        sides = tuple(draw.integers(9, 14, 3).tolist()) if i else (8, 10, 12)
        shape = sides if modalities is None else (*sides, modalities)
        volume = draw.normal(100, 50, shape).astype(np.float32)
        mask = draw.integers(0, 3, sides, dtype=np.uint8)
        found.append({"id": f"v{i:02}", "volume": volume, "mask": mask, "group": f"v{i:02}"})
    return found


def volume_features(modalities=None):
    sides = (None, None, None)
    shape = sides if modalities is None else (*sides, modalities)
    return {
        "id": tfds.features.Text(),
        "volume": tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib"),
        "mask": tfds.features.Tensor(shape=sides, dtype=np.uint8, encoding="zlib"),
        "group": tfds.features.Text(),
    }


@pytest.mark.parametrize("modalities", [None, 2])
def test_volumes_stay_floats_and_classes_keep_their_names(tmp_path, modalities):
    examples = volumes(modalities)
    names = {"0": "background", "2": "posterior", "1": "anterior"}
    write_set(
        tmp_path / "data",
        "brains",
        volume_features(modalities),
        {"train": examples},
        {"labels": names},
    )
    size = (8, 10, 12)
    data = private(tmp_path, "tfds:brains", masks=True, volume_size=size)
    channels = modalities or 1
    assert data.images.dtype == np.float32 and data.images.shape == (12, *size, channels)
    assert data.label_names == ("background", "anterior", "posterior")
    assert [client.name for client in data.clients] == ["client_0", "client_1", "client_2"]
    for row, example in enumerate(examples):
        volume = example["volume"].reshape(*example["mask"].shape, channels)
        np.testing.assert_array_equal(data.labels[row], resize_mask(example["mask"], size))
        for channel in range(channels):
            alone = resize_volumes(volume[None, ..., channel], size)[0, ..., 0]
            np.testing.assert_array_equal(data.images[row, ..., channel], alone)
    # One has the size already: nothing is done to it.
    np.testing.assert_array_equal(data.images[0].ravel(), examples[0]["volume"].ravel())

    seen = public(tmp_path, "tfds:brains", masks=True, volume_size=size)
    by_sha = {image_sha256(example["volume"]): example for example in examples}
    assert set(seen.sha256) == set(by_sha)
    for sha, image in zip(seen.sha256, seen.images, strict=True):
        np.testing.assert_array_equal(image, resize_volume(by_sha[sha]["volume"], size))
    with pytest.raises(UserError, match="brains holds volumes, and no network here tells classes"):
        private(tmp_path, "tfds:brains")


def test_the_hash_of_floats_tells_their_type_and_shape():
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = hashlib.sha256(b"(2, 3, 4)float32" + volume.tobytes()).hexdigest()
    assert image_sha256(volume) == expected != image_sha256(volume.astype(np.uint8))
    assert image_sha256(np.asfortranarray(volume)) == expected
    with pytest.raises(TypeError, match="uint8 or float32 pixels, got float64"):
        image_sha256(volume.astype(float))


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_other_numbers_become_float32(tmp_path, dtype):
    features = volume_features() | {
        "volume": tfds.features.Tensor(shape=(None, None, None), dtype=dtype, encoding="zlib")
    }
    examples = [one | {"volume": one["volume"].astype(dtype)} for one in volumes()]
    write_set(tmp_path / "data", "scans", features, {"train": examples})
    for data in (
        private(tmp_path, "tfds:scans", masks=True, volume_size=(8, 10, 12)),
        public(tmp_path, "tfds:scans", masks=True, volume_size=(8, 10, 12)),
    ):
        assert data.images.dtype == np.float32
        expected = resize_volume(examples[3]["volume"].astype(np.float32), (8, 10, 12))
        assert any(np.array_equal(image, expected) for image in data.images)
        # Classes that nobody has named.
        assert data.label_names == ("background", "1", "2")
    few = public(tmp_path, "tfds:scans", masks=True, volume_size=(8, 10, 12), num_examples=2)
    assert few.label_names == ("background", "1", "2") and len(few.images) == 2
    assert len(few.originals) == 2
    for sha, original in zip(few.sha256, few.originals, strict=True):
        assert image_sha256(original) == sha


# --- numbers for sites and patients, labels that nobody gave --------------------------------------


def numbered(count=40):
    draw = np.random.default_rng(7)
    return [
        {
            "image": draw.integers(0, 256, (9, 9, 3), dtype=np.uint8),
            "label": i % 2,
            "site": 7 + i % 2,
            "group": i // 4,
        }
        for i in range(count)
    ]


NUMBERED = {
    "image": tfds.features.Image(shape=(9, 9, 3), encoding_format="png"),
    "label": tfds.features.ClassLabel(names=["no", "yes"]),
    "site": tfds.features.Scalar(np.int64),
    "group": tfds.features.Scalar(np.int64),
}


def test_sites_and_patients_may_be_numbers(tmp_path):
    examples = numbered()
    write_set(tmp_path / "data", "numbers", NUMBERED, {"train": examples})
    data = private(tmp_path, "tfds:numbers", split="official")
    assert [client.name for client in data.clients] == ["7", "8"]
    patient = {examples[i]["image"].tobytes(): i // 4 for i in range(40)}
    natives = private(tmp_path, "tfds:numbers", image_size=9)
    group = np.array([patient[image.tobytes()] for image in natives.images])
    tested = np.concatenate([client.test for client in natives.clients])
    trained = np.concatenate([client.train for client in natives.clients])
    assert not set(group[tested]) & set(group[trained])
    kinds = NUMBERED | {"group": tfds.features.Tensor(shape=(2,), dtype=np.int64)}
    odd = [one | {"group": np.array([1, 2])} for one in examples]
    write_set(tmp_path / "data", "odd", kinds, {"train": odd})
    with pytest.raises(UserError, match="group of odd must be a class, a text or a whole number"):
        private(tmp_path, "tfds:odd")


def test_public_images_that_nobody_labelled_bring_no_labels(tmp_path, caplog):
    examples = numbered(8)
    unlabelled = [one | {"label": -1} for one in numbered(12)[8:]]
    write_set(tmp_path / "data", "half", NUMBERED, {"train": examples, "test": unlabelled})
    data = public(tmp_path, "tfds:half")
    assert data.labels is None and data.label_names is None and len(data.images) == 12
    assert "some images have no label" in caplog.text
    with pytest.raises(UserError, match="label -1 of example"):
        private(tmp_path, "tfds:half", split="official")


@pytest.mark.parametrize(
    ("feature", "kind", "pixels", "words"),
    [
        (
            "image",
            tfds.features.Image(shape=(9, 9, 1), dtype=np.uint16, encoding_format="png"),
            np.full((9, 9), 30000, np.uint16),
            "image of numbers must be an image of 8 bits, got",
        ),
        (
            "image",
            tfds.features.Tensor(shape=(9, 9, 3), dtype=np.uint8),
            np.zeros((9, 9, 3), np.uint8),
            "image of numbers must be an image of 8 bits, got",
        ),
        (
            "mask",
            tfds.features.Image(shape=(9, 9, 3), encoding_format="png"),
            np.zeros((9, 9, 3), np.uint8),
            "mask of numbers must be an image of 8 bits and one channel, got",
        ),
    ],
)
def test_pictures_of_another_kind_are_refused(tmp_path, feature, kind, pixels, words):
    examples = [one | {feature: pixels} for one in numbered()]
    write_set(tmp_path / "data", "numbers", NUMBERED | {feature: kind}, {"train": examples})
    with pytest.raises(UserError, match=words) as caught:
        private(tmp_path, "tfds:numbers")
    assert "\n" not in str(caught.value)


# --- the catalogue --------------------------------------------------------------------------------


def test_a_set_of_the_catalogue_serves_as_public_images(tmp_path):
    """colorectal_histology's features, which no builder of ours knows."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (10, 15, 15, 3), dtype=np.uint8)
    features = {
        "image": tfds.features.Image(shape=(15, 15, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["tumor", "stroma", "complex"]),
        "filename": tfds.features.Text(),
    }
    examples = [
        {"image": image, "label": i % 3, "filename": f"{i}.tif"} for i, image in enumerate(images)
    ]
    write_set(tmp_path / "data", "colorectal_histology", features, {"train": examples})
    data = public(tmp_path, "tfds:colorectal_histology")
    assert data.label_names == ("tumor", "stroma", "complex") and not data.synthetic
    rows = [data.sha256.index(image_sha256(image)) for image in images]
    np.testing.assert_array_equal(data.labels[rows], np.arange(10) % 3)
    assert data.images.shape == (10, 8, 8, 3)
    # As private data too, by any column that it has.
    mine = private(tmp_path, "tfds:colorectal_histology", split_by="column:label")
    assert [client.name for client in mine.clients] == ["tumor", "stroma", "complex"]
    assert ids(mine)["tumor"] == set(np.flatnonzero(mine.labels == 0).tolist())


# --- what cannot be read --------------------------------------------------------------------------


def test_what_is_not_there_is_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"public.name: cifar100 is not prepared in .*data, and is"):
        public(tmp_path, "tfds:cifar100")
    with pytest.raises(UserError, match="skin_masks needs a configuration"):
        private(tmp_path, "tfds:skin_masks", masks=True)
    for name in ("My Set", "a/b/c", "../x", "/"):
        with pytest.raises(
            UserError, match="data.name: .* (cannot be opened|not prepared)"
        ) as found:
            private(tmp_path, f"tfds:{name}")
        assert "\n" not in str(found.value)
    features = {"id": tfds.features.Text(), "words": tfds.features.Text()}
    write_set(tmp_path / "data", "texts", features, {"train": [{"id": "a", "words": "b"}]})
    with pytest.raises(UserError, match="texts has no image or volume; it has id, words"):
        private(tmp_path, "tfds:texts")


def test_a_damaged_file_is_one_line(tmp_path):
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": with_grey_masks(lesions())})
    file = next((tmp_path / "data/lesions/1.0.0").glob("*array_record*"))
    data = bytearray(file.read_bytes())
    place = data.index(b"\x89PNG") + 20  # within a record, which has a checksum
    data[place : place + 8] = bytes(8)
    file.write_bytes(data)
    with pytest.raises(
        UserError, match="lesions in .* cannot be read: .*prepare it anew"
    ) as caught:
        private(tmp_path, "tfds:lesions", masks=True)
    assert "\n" not in str(caught.value)
    info = tmp_path / "data/lesions/1.0.0/dataset_info.json"
    info.write_text(info.read_text()[:40])
    with pytest.raises(UserError, match="lesions cannot be opened") as caught:
        private(tmp_path, "tfds:lesions", masks=True)
    assert "\n" not in str(caught.value)


def test_an_original_that_is_damaged_later_is_one_line(tmp_path):
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": with_grey_masks(lesions())})
    public(tmp_path, "tfds:lesions")
    data = public(tmp_path, "tfds:lesions")  # resized ones are from the cache
    file = next((tmp_path / "data/lesions/1.0.0").glob("*array_record*"))
    stored = bytearray(file.read_bytes())
    place = stored.index(b"\x89PNG") + 20
    stored[place : place + 8] = bytes(8)
    file.write_bytes(stored)
    with pytest.raises(UserError, match="public.name: lesions in .* cannot be read"):
        list(data.originals)


def test_files_that_need_tensorflow_are_refused(tmp_path, monkeypatch):
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": with_grey_masks(lesions())})
    folder = tmp_path / "data/lesions/1.0.0"
    for file in folder.glob("*array_record*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="lesions .* is not in array_record files"):
        private(tmp_path, "tfds:lesions", masks=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_is_refused_by_name(tmp_path, value):
    examples = volumes()
    examples[4]["volume"][1, 2, 3] = value
    write_set(tmp_path / "data", "brains", volume_features(None), {"train": examples})
    said = "example v04 of brains: 1 of [0-9]+ voxels are NaN or infinite"
    with pytest.raises(UserError, match=f"^data.name: {said}"):
        private(tmp_path, "tfds:brains", masks=True, volume_size=(8, 10, 12))
    with pytest.raises(UserError, match=f"^public.name: {said}"):
        public(tmp_path, "tfds:brains", masks=True)


def test_a_mask_of_another_aspect_is_refused_by_name(tmp_path):
    examples = with_grey_masks(lesions())
    examples[6]["image"] = examples[6]["image"].transpose(1, 0, 2)
    write_set(tmp_path / "data", "lesions", MASK_FEATURES, {"train": examples})
    with pytest.raises(UserError, match="example i06 of lesions has a mask of 14 x 20, of another"):
        private(tmp_path, "tfds:lesions", masks=True)
