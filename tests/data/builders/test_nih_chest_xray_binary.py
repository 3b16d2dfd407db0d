import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import BUILDERS
from fedhelp_jax.data.builders.prepare import builder, describe, prepare

NAME = "nih_chest_xray_binary"
V2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
V2017 = V2020.replace("Gender", "Sex") + ","
# image, findings, patient; the patients of one line after the other as NIH numbers them.
ROWS = [
    ("00000001_000.png", "Cardiomegaly", 1),
    ("00000001_001.png", "Pneumonia", 1),
    ("00000002_000.png", "No Finding", 2),
    ("00000002_001.png", "Edema|Pneumonia|Hernia", 2),
    ("00000003_000.png", "Hernia|Infiltration", 3),
    ("00000004_000.png", "No Finding", 4),
    ("00000005_000.png", "No Finding", 5),
    ("00000006_000.png", "Pneumonia|Pneumothorax", 6),
    ("00000006_001.png", "Pleural_Thickening", 6),
]
LABELS = {
    "00000001_001": 1,
    "00000002_000": 0,
    "00000002_001": 1,
    "00000004_000": 0,
    "00000005_000": 0,
    "00000006_000": 1,
}
TEST = (4, 5, 6)


def pixels(image, channels=1):
    seed = int(image[:8]) * 100 + int(image[9:12])
    shape = (10, 8) if channels == 1 else (10, 8, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", compress_level=1)  # told apart from one of ours
    return file.getvalue()


def files(rgba="00000005_000.png"):
    """The images; one of them is stored in colours, as a few of NIH's are."""
    return {image: png(pixels(image, 4 if image == rgba else 1)) for image, _, _ in ROWS}


def grey(rgba):
    """By the weights of ITU-R 601-2."""
    return np.asarray(rgba[..., :3], float) @ (0.299, 0.587, 0.114)


def table(rows=ROWS, header=V2020):
    end = "," if header.endswith(",") else ""
    lines = [f"{i},{f},0,{p},58,M,PA,2682,2749,0.143,0.143{end}" for i, f, p in rows]
    return "\n".join([header, *lines, ""])


def write_archive(path, images):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("images")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, data in images:
            for member, content in ((f"images/._{name}", b"litter"), (f"images/{name}", data)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_lists(folder, test=TEST, newline="\n"):
    for name, wanted in (("train_val_list.txt", False), ("test_list.txt", True)):
        lines = [image for image, _, patient in ROWS if (patient in test) is wanted]
        folder.joinpath(name).write_bytes(newline.join(lines).encode())


@pytest.fixture
def folder(tmp_path):
    """As NIH's box hands it out."""
    folder = tmp_path / "download"
    folder.mkdir()
    folder.joinpath("Data_Entry_2017_v2020.csv").write_text(table())
    folder.joinpath("._Data_Entry_2017_v2020.csv").write_bytes(b"litter")
    folder.joinpath("BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    )
    write_lists(folder)
    images = list(files().items())
    write_archive(folder / "images_001.tar.gz", images[:5][::-1])
    write_archive(folder / "images_002.tar.gz", images[5:])
    return folder


@pytest.fixture
def unpacked(folder):
    """As Kaggle hands it out: a folder for each archive, the older table."""
    images = list(files().items())
    for number, part in (("001", images[:5]), ("002", images[5:])):
        folder.joinpath(f"images_{number}.tar.gz").unlink()
        target = folder / f"images_{number}" / "images"
        target.mkdir(parents=True)
        for name, data in part:
            target.joinpath(name).write_bytes(data)
    folder.joinpath("Data_Entry_2017_v2020.csv").unlink()
    folder.joinpath("Data_Entry_2017.csv").write_text(table(header=V2017))
    return folder


def prepared(folder, tmp_path):
    """All that was written, by split and id; and what was said."""
    said = []
    prepare(NAME, str(folder), str(tmp_path / "data"), said.append)
    made = builder(NAME, str(tmp_path / "data"))
    sets = {split: made.as_data_source(split=split) for split in made.info.splits}
    for split, source in sets.items():
        assert len(source) == made.info.splits[split].num_examples
    found = {split: {row["id"]: row for row in source} for split, source in sets.items()}
    assert all(len(found[split]) == len(sets[split]) for split in sets)
    assert "tensorflow" not in sys.modules
    return {
        split: {i.decode(): row for i, row in rows.items()} for split, rows in found.items()
    }, said


def check(found, test):
    assert {split: sorted(rows) for split, rows in found.items()} == {
        split: [i for i in LABELS if (int(i[:8]) in test) is (split == "test")] for split in found
    }
    for rows in found.values():
        for name, row in rows.items():
            assert sorted(row) == ["group", "id", "image", "label"]
            assert row["label"] == LABELS[name] and row["group"].decode() == str(int(name[:8]))
            assert row["image"].shape == (10, 8, 1) and row["image"].dtype == np.uint8
            if name == "00000005_000":
                expected = grey(pixels(name, 4))
                assert np.abs(row["image"][..., 0] - expected).max() <= 0.51
            else:
                assert np.array_equal(row["image"][..., 0], pixels(name))


def test_archives_as_nih_hands_them_out(folder, tmp_path):
    found, _ = prepared(folder, tmp_path)
    check(found, TEST)
    assert list(found) == ["train", "test"]


def test_unpacked_archives_and_the_older_table(unpacked, tmp_path):
    write_lists(unpacked, newline="\r\n")
    found, _ = prepared(unpacked, tmp_path)
    check(found, TEST)


def test_grey_files_are_kept_as_they_are(folder, tmp_path):
    prepare(NAME, str(folder), str(tmp_path / "data"), lambda text: None)
    made = builder(NAME, str(tmp_path / "data"))
    assert made.info.features["label"].names == ["no_finding", "pneumonia"]
    raw = {"image": tfds.decode.SkipDecoding()}
    rows = [*made.as_data_source("train", decoders=raw), *made.as_data_source("test", decoders=raw)]
    images = {row["id"].decode(): row["image"] for row in rows}
    assert {i for i in images if images[i] == files()[f"{i}.png"]} == set(LABELS) - {"00000005_000"}


@pytest.mark.parametrize("lacking", [("test_list.txt",), ("train_val_list.txt", "test_list.txt")])
def test_without_both_lists_patients_are_split_by_hash(folder, tmp_path, lacking):
    for name in lacking:
        folder.joinpath(name).unlink()
    rows = [*ROWS, *((f"{p:08}_000.png", "No Finding", p) for p in range(7, 30))]
    folder.joinpath("Data_Entry_2017_v2020.csv").write_text(table(rows))
    more = [(image, png(pixels(image))) for image, _, _ in rows[len(ROWS) :]]
    write_archive(folder / "images_003.tar.gz", more)
    found, said = prepared(folder, tmp_path)
    start = f"no {' and no '.join(lacking)}: 20 % of the patients are test, by a hash"
    assert any(text.startswith(start) for text in said)
    patients = {
        split: {int(row["group"]) for row in rows.values()} for split, rows in found.items()
    }
    digest = {p: hashlib.sha256(str(p).encode()).digest() for p in range(1, 30) if p != 3}
    test = {p for p, d in digest.items() if int.from_bytes(d[:8], "big") % 100 < 20}
    assert test and patients == {"train": set(digest) - test, "test": test}


def test_a_split_without_images_is_left_out(folder, tmp_path):
    write_lists(folder, test=())
    found, said = prepared(folder, tmp_path)
    assert list(found) == ["train"] and "no image in test: left out" in said


def test_images_of_other_findings_need_not_be_there(unpacked, tmp_path):
    unpacked.joinpath("images_001/images/00000003_000.png").unlink()
    check(prepared(unpacked, tmp_path)[0], TEST)


def rows_with(old, new):
    return lambda folder: folder.joinpath("Data_Entry_2017.csv").write_text(
        table(header=V2017).replace(old, new)
    )


def without_images(folder):
    for name in ("00000001_001", "00000002_000", "00000002_001", "00000004_000"):
        next(folder.rglob(f"{name}.png")).unlink()


def overwrite(name, data):
    return lambda folder: next(folder.rglob(name)).write_bytes(data)


DEEP = png(np.arange(80, dtype=np.uint16).reshape(10, 8) * 50)
BAD = {
    "no table": (
        lambda f: f.joinpath("Data_Entry_2017.csv").unlink(),
        "needs a file Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, has none",
    ),
    "two tables": (
        lambda f: f.joinpath("Data_Entry_2017_v2020.csv").write_text(table()),
        "more than one, Data_Entry_2017.csv and Data_Entry_2017_v2020.csv",
    ),
    "no column": (rows_with("Finding Labels", "Labels"), "has no column Finding Labels; it has"),
    "unknown finding": (
        rows_with("Edema|", "Oedema|"),
        r"line 5 \(00000002_001.png\): Finding Labels must be .*, got 'Oedema'",
    ),
    "no finding beside others": (
        rows_with("Edema|", "No Finding|"),
        r"line 5 \(00000002_001.png\): Finding Labels has No Finding beside others",
    ),
    "no patient": (
        rows_with("Pneumonia,0,1,", "Pneumonia,0,,"),
        r"line 3 \(00000001_001.png\): Patient ID must be a number, got ''",
    ),
    "the same image twice": (
        rows_with("00000001_001.png", "00000001_000.png"),
        "has image 00000001_000.png 2 times",
    ),
    "neither class": (
        lambda f: f.joinpath("Data_Entry_2017.csv").write_text(table(ROWS[:1], V2017)),
        "has no image with No Finding or Pneumonia",
    ),
    "missing images": (
        without_images,
        "4 of 6 images are missing: 00000001_001.png, 00000002_000.png, 00000002_001.png, ...",
    ),
    "the same file twice": (
        lambda f: f.joinpath("images_002/images/00000001_000.png").write_bytes(b""),
        "are both called 00000001_000",
    ),
    "a patient on both sides": (
        lambda f: (
            f.joinpath("train_val_list.txt").write_text("\n".join(r[0] for r in ROWS[:-1])),
            f.joinpath("test_list.txt").write_text(ROWS[-1][0]),
        ),
        "patient 6 has images in both train_val_list.txt and test_list.txt",
    ),
    "an image in both lists": (
        lambda f: f.joinpath("train_val_list.txt").write_text("\n".join(r[0] for r in ROWS)),
        "00000004_000.png is in both train_val_list.txt and test_list.txt",
    ),
    "an image in no list": (
        lambda f: f.joinpath("test_list.txt").write_text("00000004_000.png"),
        "2 of 6 images are neither in train_val_list.txt nor in test_list.txt: 00000005_000.png",
    ),
    "a list that is no text": (overwrite("test_list.txt", b"\xff\xfe\x00"), "is no text file"),
    "no image": (overwrite("00000002_000.png", b"none"), "00000002_000.png cannot be decoded"),
    "half an image": (
        lambda f: overwrite("00000002_000.png", files()["00000002_000.png"][:-40])(f),
        "00000002_000.png cannot be decoded",
    ),
    "16 bits": (
        overwrite("00000002_000.png", DEEP),
        "00000002_000.png has 16 bits a channel",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_downloads(unpacked, tmp_path, case):
    spoil, message = BAD[case]
    spoil(unpacked)
    with pytest.raises(UserError, match=message) as error:
        prepare(NAME, str(unpacked), str(tmp_path / "data"), lambda text: None)
    assert "\n" not in str(error.value)


def test_about():
    assert "images_001.tar.gz" in describe(NAME) and BUILDERS[NAME].name == NAME
