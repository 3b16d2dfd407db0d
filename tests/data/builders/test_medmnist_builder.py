"""MedMNIST's builder, on small files with the names and arrays of the official ones."""

import hashlib
import shutil
import sys
import zipfile

import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.medmnist import SUBSETS
from fedhelp_jax.data.builders.prepare import builder, describe, prepare

COUNTS = {"train": 5, "val": 3, "test": 4}


def arrays_of(shape=(28, 28), classes=2, columns=1):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, classes, (count, columns), dtype=np.uint8)
    return arrays


class Files:
    def __init__(self, path):
        self.folder, self.data_dir, self.said = path / "download", path / "prepared", []
        self.folder.mkdir()

    def write(self, name, arrays):
        path = self.folder / name
        np.savez_compressed(path, **arrays)
        return path

    def prepare(self, name, allow_repacked=True):
        self.said.clear()
        return prepare(
            f"medmnist/{name}",
            str(self.folder),
            str(self.data_dir),
            self.said.append,
            allow_repacked=allow_repacked,
        )

    def read(self, name, split):
        made = builder(f"medmnist/{name}", str(self.data_dir))
        return {example["id"].decode(): example for example in made.as_data_source(split=split)}

    def refusal(self, name, allow_repacked=True):
        with pytest.raises(UserError) as caught:
            self.prepare(name, allow_repacked)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "shape", "classes"),
    [
        ("pneumoniamnist_28", "pneumoniamnist.npz", (28, 28), 2),
        ("pathmnist_64", "pathmnist_64.npz", (64, 64, 3), 9),
        ("organmnist3d_28", "organmnist3d.npz", (28, 28, 28), 11),
    ],
)
def test_pictures_and_classes_come_back(files, name, file, shape, classes):
    arrays = arrays_of(shape, classes)
    files.write(file, arrays)
    (files.folder / f"._{file}").write_bytes(b"what macOS leaves beside it")
    files.prepare(name)
    key = "volume" if "3d" in name else "image"
    for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = files.read(name, split)
        assert sorted(found) == [f"{split}_{i:06}" for i in range(COUNTS[theirs])]
        for i, (ident, example) in enumerate(sorted(found.items())):
            picture = arrays[f"{theirs}_images"][i]
            np.testing.assert_array_equal(example[key].reshape(shape), picture)
            assert example["label"] == arrays[f"{theirs}_labels"][i, 0]
            assert example["group"].decode() == ident
    assert any("train has 5 examples, officially" in line for line in files.said)
    assert any("not the official file" in line for line in files.said)
    assert "tensorflow" not in sys.modules


def test_chestmnist_has_many_labels(files):
    arrays = arrays_of(columns=14)
    files.write("chestmnist.npz", arrays)
    files.prepare("chestmnist_28")
    found = files.read("chestmnist_28", "validation")
    assert "label" not in found["validation_000001"]
    np.testing.assert_array_equal(found["validation_000001"]["labels"], arrays["val_labels"][1])


def test_the_official_file_needs_no_flag(files, monkeypatch):
    path = files.write("breastmnist.npz", arrays_of())
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(SUBSETS["breastmnist"]["md5"], "28", md5)
    files.prepare("breastmnist_28", allow_repacked=False)
    assert not any("official file" in line for line in files.said)
    assert len(files.read("breastmnist_28", "test")) == COUNTS["test"]


def test_another_checksum_is_refused_with_what_to_do(files):
    files.write("breastmnist.npz", arrays_of())
    said = files.refusal("breastmnist_28", allow_repacked=False)
    assert SUBSETS["breastmnist"]["md5"]["28"] in said
    assert "--allow_repacked" in said


def test_an_exchanged_file_is_not_mixed_with_an_earlier_attempt(files, monkeypatch):
    """Labels and places are the same in both files: only the images differ."""
    arrays = arrays_of()
    files.write("breastmnist.npz", arrays)
    module = sys.modules["fedhelp_jax.data.builders.prepare"]
    with monkeypatch.context() as stopped:
        stopped.setattr(module.shutil, "rmtree", lambda folder: None)  # what is made stays
        folder = files.prepare("breastmnist_28")
    shutil.rmtree(folder)
    arrays["test_images"] = 255 - arrays["test_images"]
    files.write("breastmnist.npz", arrays)
    files.prepare("breastmnist_28")
    image = files.read("breastmnist_28", "test")["test_000002"]["image"]
    np.testing.assert_array_equal(image[..., 0], arrays["test_images"][2])


def test_a_missing_file_is_named(files):
    files.write("breastmnist.npz", arrays_of())  # of size 28
    assert "breastmnist_64.npz, has none" in files.refusal("breastmnist_64")


def test_a_file_in_an_archive_is_to_be_unpacked(files):
    path = files.write("breastmnist.npz", arrays_of())
    with zipfile.ZipFile(files.folder / "all.zip", "w") as archive:
        archive.write(path, "breastmnist.npz")
    path.unlink()
    assert "breastmnist.npz lies in an archive; unpack it" in files.refusal("breastmnist_28")


def test_a_truncated_file_is_refused(files):
    path = files.write("breastmnist.npz", arrays_of())
    path.write_bytes(path.read_bytes()[:-2000])
    said = files.refusal("breastmnist_28", allow_repacked=False)
    assert "breastmnist.npz cannot be read; the file is damaged" in said


def test_damaged_images_are_refused(files):
    path = files.write("breastmnist.npz", arrays_of())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("val_images.npy").header_offset
    data[start + 1000 : start + 1100] = bytes(100)
    path.write_bytes(data)
    said = files.refusal("breastmnist_28")
    assert "array val_images" in said
    assert "damaged" in said


class Pickled:
    """Whoever unpickles it is caught."""

    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


@pytest.mark.parametrize("name", ["train_labels", "test_images"])
def test_pickled_objects_are_refused_unread(files, name):
    pickled = np.empty((COUNTS[name.split("_")[0]], 1), object)
    pickled[:] = Pickled()
    files.write("breastmnist.npz", arrays_of() | {name: pickled})
    assert name in files.refusal("breastmnist_28")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_labels": None}, "array val_labels"),
        ({"val_images": None}, "array val_images"),
        ({"val_labels": [[0], [2], [1]]}, "val_labels must be in 0..1, got 2 at 1"),
        ({"val_labels": [[0], [-1], [1]]}, "val_labels must be in 0..1, got -1 at 1"),
        ({"val_labels": [[0], [1]]}, "val_labels must be integers of shape (3, 1)"),
        ({"val_labels": [[0.0], [1.0], [0.0]]}, "got float64"),
        ({"val_images": np.zeros((3, 28, 28), np.float32)}, "val_images must be uint8"),
        ({"val_images": np.zeros((3, 64, 64), np.uint8)}, "of shape ('N', 28, 28)"),
    ],
)
def test_arrays_of_another_kind_are_refused(files, changes, said):
    arrays = {name: np.asarray(a) for name, a in (arrays_of() | changes).items() if a is not None}
    files.write("breastmnist.npz", arrays)
    assert said in files.refusal("breastmnist_28")


def test_every_set_is_described():
    assert len(SUBSETS) == 18
    for subset, facts in SUBSETS.items():
        assert len(facts["md5"]) == (2 if facts["dimensions"] == 3 else 4)
        said = describe(f"medmnist/{subset}_64")
        assert f"official sizes: train {facts['counts'][0]}, validation " in said
        assert f"licence: {facts['licence']}" in said
        assert f"{subset}_64.npz (md5 {facts['md5']['64']})" in said


def test_real_images(real, files):
    shutil.copy(real / "pneumoniamnist_rebuilt.npz", files.folder / "pneumoniamnist.npz")
    assert "--allow_repacked" in files.refusal("pneumoniamnist_28", allow_repacked=False)
    files.prepare("pneumoniamnist_28")
    assert "train 4708, validation 524, test 624" in files.said[-1]
    with np.load(files.folder / "pneumoniamnist.npz") as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"]
    found = files.read("pneumoniamnist_28", "test")
    for i in range(0, 624, 100):
        np.testing.assert_array_equal(found[f"test_{i:06}"]["image"][..., 0], images[i])
        assert found[f"test_{i:06}"]["label"] == labels[i, 0]
