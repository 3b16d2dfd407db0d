import io
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import BUILDERS
from fedhelp_jax.data.builders.prepare import builder, describe, prepare

NAME = "nct_crc_he"
TRAIN, TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
# Two of each class in train, one in test, named as the publisher names them.
STEMS = {
    "train": [f"{c}-{letters}" for c in CLASSES for letters in ("AAAFLCLY", "YYYYQFVN")],
    "test": [f"{c}-TCGA-AAICEQFN" for c in CLASSES],
}


def pixels(stem, side=224):
    """Of few grey levels, so that tests are quick."""
    small = np.random.default_rng([*stem.encode()]).integers(0, 256, (side // 28, 28, 3), np.uint8)
    return np.repeat(np.repeat(small, 28, 0), side // 28, 1)


def tif(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def files(split, nested=""):
    folder = {"train": TRAIN, "test": TEST}[split]
    return {
        f"{folder}/{nested}{stem.split('-')[0]}/{stem}.tif": tif(pixels(stem))
        for stem in STEMS[split]
    }


def write(folder, contents):
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
            parent, _, file = name.rpartition("/")
            archive.writestr(f"__MACOSX/{parent}/._{file}", b"litter")


@pytest.fixture
def folder(tmp_path):
    """The small set alone, unpacked."""
    folder = tmp_path / "download"
    write(folder, files("test"))
    write(folder, {f"{TEST}/ADI/._ADI-TCGA-AAICEQFN.tif": b"litter", f"{TEST}/.DS_Store": b""})
    return folder


def check(folder, tmp_path, splits):
    """Prepares, compares all, and returns what was said."""
    said = []
    prepare(NAME, str(folder), str(tmp_path / "data"), said.append)
    made = builder(NAME, str(tmp_path / "data"))
    assert list(made.info.splits) == splits
    for split in splits:
        rows = {row["id"].decode(): row for row in made.as_data_source(split=split)}
        assert sorted(rows) == sorted(STEMS[split])
        assert made.info.splits[split].num_examples == len(STEMS[split])
        for stem, row in rows.items():
            assert sorted(row) == ["id", "image", "label"]
            assert np.array_equal(row["image"], pixels(stem))
            assert row["label"] == CLASSES.index(stem.split("-")[0])
    assert "tensorflow" not in sys.modules
    return said


def test_zips_as_they_are_downloaded(tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    write_zip(folder / f"{TRAIN}.zip", files("train"))
    write_zip(folder / f"{TEST}.zip", files("test"))
    said = check(folder, tmp_path, ["train", "test"])
    assert "train has 18 examples, officially 100000" in said
    assert not any("no images" in text for text in said)


def test_test_alone(folder, tmp_path):
    write(folder, {f"{TRAIN}-NONORM/ADI/ADI-AAAFLCLY.tif": b"of another set"})
    assert f"no {TRAIN}: no train images" in check(folder, tmp_path, ["test"])


def test_train_alone_nested_in_itself(tmp_path):
    folder = tmp_path / "download"
    write(folder, files("train", nested=f"{TRAIN}/"))
    assert f"no {TEST}: no test images" in check(folder, tmp_path, ["train"])


def test_one_set_inside_a_folder_called_like_the_other(tmp_path):
    folder = tmp_path / "download"
    write(folder / TRAIN, files("train") | files("test"))
    write(folder / TRAIN, {f"{TRAIN}-NONORM/ADI/ADI-AAAFLCLY.tif": b"of another set"})
    check(folder, tmp_path, ["train", "test"])


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


ADI = f"{TEST}/ADI/ADI-TCGA-AAICEQFN.tif"
BAD = {
    "no images": (
        lambda f: (remove(f, "*/*/*.tif"), write(f, {f"{TEST}/README.txt": b""})),
        f"there is no .tif in any folder {TRAIN} or {TEST}",
    ),
    "no image of two classes": (
        lambda f: (remove(f, "*/DEB/*.tif"), remove(f, "*/TUM/*.tif")),
        f"{TEST} has no image of DEB, TUM",
    ),
    "unknown class": (
        lambda f: write(f, {f"{TEST}/TUMOR/TUMOR-TCGA-AAICEQFN.tif": b""}),
        "TUMOR-TCGA-AAICEQFN.tif in .* must lie in a folder of one of the classes ADI, BACK",
    ),
    "no class": (
        lambda f: write(f, {f"{TEST}/ADI-TCGA-AAICEQFN.tif": b""}),
        f"{TEST}/ADI-TCGA-AAICEQFN.tif in .* must lie in a folder of one of the classes ADI",
    ),
    "the same image twice": (
        lambda f: write(f, {f"{TEST}/{ADI}": b""}),
        "are both called ADI-TCGA-AAICEQFN",
    ),
    "an image in both sets": (
        lambda f: write(f, files("train") | {f"{TRAIN}/ADI/ADI-TCGA-AAICEQFN.tif": b""}),
        "are both called ADI-TCGA-AAICEQFN",
    ),
    "another size": (
        lambda f: write(f, {ADI: tif(pixels("")[:200])}),
        f"{ADI} must be 224x224, is 224x200",
    ),
    "no image": (lambda f: write(f, {ADI: b"none"}), f"{ADI} cannot be decoded"),
    "half an image": (
        lambda f: write(f, {ADI: tif(pixels(""))[:9000]}),
        f"{ADI} cannot be decoded",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_downloads(folder, tmp_path, case):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        prepare(NAME, str(folder), str(tmp_path / "data"), lambda text: None)
    assert "\n" not in str(error.value)


def test_about():
    assert f"{TRAIN}.zip" in describe(NAME) and BUILDERS[NAME].name == NAME
    assert builder(NAME).features()["label"].names == [
        *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle"),
        *("normal colon mucosa", "cancer-associated stroma"),
        "colorectal adenocarcinoma epithelium",
    ]
