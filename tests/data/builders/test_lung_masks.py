import io
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import BUILDERS
from fedhelp_jax.data.builders.prepare import builder, describe, prepare

NAME = "lung_masks"
SHENZHEN = ("CHNCXR_0001_0", "CHNCXR_0025_0", "CHNCXR_0340_1", "CHNCXR_0662_1")
UNMASKED = "CHNCXR_0025_0"
MONTGOMERY = ("MCUCXR_0001_0", "MCUCXR_0243_1")


def random(stem, what):
    return np.random.default_rng([*stem.encode(), *what.encode()])


def size(stem):
    """Rows and columns, as different as the publishers'."""
    return (12, 9) if stem in (SHENZHEN[0], MONTGOMERY[1]) else (10, 11)


def image(stem):
    return random(stem, "image").integers(0, 256, size(stem), dtype=np.uint8)


def mask(stem, side):
    return random(stem, side).integers(0, 2, size(stem), dtype=np.uint8) * np.uint8(255)


def png(array):
    file = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(file, "PNG", compress_level=1)  # told apart from one of ours
    return file.getvalue()


def palette(grey):
    """With a palette of greys in reverse, so that indices are no greys."""
    picture = Image.fromarray(255 - grey)
    picture = picture.convert("L")
    picture.putpalette([255 - i // 3 for i in range(768)])
    return picture


def stored(stem):
    """As files: a palette, grey, grey in three channels."""
    grey = image(stem)
    if stem == SHENZHEN[0]:
        return png(palette(grey))
    return png(np.stack([grey] * 3, -1)) if stem == SHENZHEN[2] else png(grey)


def shenzhen():
    files = {}
    for stem in SHENZHEN:
        files[f"ChinaSet_AllFiles/CXR_png/{stem}.png"] = stored(stem)
        files[f"ChinaSet_AllFiles/ClinicalReadings/{stem}.txt"] = b"male 45yrs\nnormal"
    files["ChinaSet_AllFiles/CXR_png/Thumbs.db"] = b"litter"
    files["ChinaSet_AllFiles/NLM-ChinaCXRSet-ReadMe.docx"] = b"read me"
    return files


def shenzhen_masks(folder="mask/mask"):
    masked = [stem for stem in SHENZHEN if stem != UNMASKED]
    return {f"{folder}/{stem}_mask.png": png(mask(stem, "both")) for stem in masked}


def montgomery():
    files = {"MontgomerySet/NLM-MontgomeryCXRSet-ReadMe.pdf": b"read me"}
    for stem in MONTGOMERY:
        files[f"MontgomerySet/CXR_png/{stem}.png"] = stored(stem)
        files[f"MontgomerySet/ClinicalReadings/{stem}.txt"] = b"Patient's Sex: F \n"
        for side in ("left", "right"):
            # Of one bit each, and of 0 and 1.
            lung = mask(stem, side)
            lung = Image.fromarray(lung).convert("1") if side == "left" else lung // 255
            files[f"MontgomerySet/ManualMask/{side}Mask/{stem}.png"] = png(lung)
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            parent, _, file = name.rpartition("/")
            archive.writestr(f"__MACOSX/{parent}/._{file}", b"litter")


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_name(f"._{path.name}").write_bytes(b"litter")


@pytest.fixture
def folder(tmp_path):
    """All three archives unpacked."""
    folder = tmp_path / "download"
    write(folder, shenzhen() | shenzhen_masks() | montgomery())
    return folder


def prepared(folder, tmp_path):
    said = []
    prepare(NAME, str(folder), str(tmp_path / "data"), said.append)
    made = builder(NAME, str(tmp_path / "data"))
    assert list(made.info.splits) == ["train"]
    rows = {row["id"].decode(): row for row in made.as_data_source(split="train")}
    assert len(rows) == made.info.splits["train"].num_examples
    assert "tensorflow" not in sys.modules
    return rows, said, made


def expected_mask(stem):
    if stem in SHENZHEN:
        return mask(stem, "both")
    return np.maximum(mask(stem, "left"), mask(stem, "right"))


def check(rows, stems):
    assert sorted(rows) == sorted(stems)
    for stem, row in rows.items():
        assert sorted(row) == ["group", "id", "image", "mask", "site", "tb"]
        assert np.array_equal(row["image"], image(stem)[..., None])
        assert np.array_equal(row["mask"], expected_mask(stem)[..., None])
        assert row["site"] == (stem in MONTGOMERY) and row["tb"] == int(stem[-1])
        assert row["group"].decode() == stem


MASKED = [stem for stem in (*SHENZHEN, *MONTGOMERY) if stem != UNMASKED]


def test_zips_as_they_are_downloaded(tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    write_zip(folder / "ChinaSet_AllFiles.zip", shenzhen())
    write_zip(folder / "shcxr-lung-mask.zip", shenzhen_masks())
    write_zip(folder / "NLM-MontgomeryCXRSet.zip", montgomery())
    rows, said, made = prepared(folder, tmp_path)
    check(rows, MASKED)
    assert "1 of 4 images of shenzhen have no mask: left out" in said
    assert "train shenzhen has 3 examples, officially 566" in said
    assert "train montgomery has 2 examples, officially 138" in said
    assert made.info.features["site"].names == ["shenzhen", "montgomery"]
    assert made.info.features["tb"].names == ["normal", "tuberculosis"]


def test_unpacked(folder, tmp_path):
    check(prepared(folder, tmp_path)[0], MASKED)


def test_grey_files_are_kept_as_they_are(folder, tmp_path):
    made = prepared(folder, tmp_path)[2]
    rows = made.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    kept = {row["id"].decode() for row in rows if row["image"] == stored(row["id"].decode())}
    assert kept == set(MASKED) - {SHENZHEN[0], SHENZHEN[2]}


def test_one_hospital_and_merged_masks(tmp_path):
    folder = tmp_path / "download"
    images = {k: v for k, v in montgomery().items() if "ManualMask" not in k}
    merged = {f"masks/{stem}.png": png(expected_mask(stem)) for stem in MONTGOMERY}
    write(folder, images | merged)
    rows, said, _ = prepared(folder, tmp_path)
    check(rows, MONTGOMERY)
    assert "no image of shenzhen" in said


CXR = "ChinaSet_AllFiles/CXR_png"
LEFT = "MontgomerySet/ManualMask/leftMask"
BAD = {
    "no images": (
        lambda f: [path.unlink() for path in f.rglob("CXR_png/*.png")],
        "there is no .png in any folder CXR_png",
    ),
    "missing images": (
        lambda f: [path.unlink() for path in f.rglob("CXR_png/CHNCXR_000*.png")],
        "1 of 3 shenzhen images are missing: CHNCXR_0001_0",
    ),
    "no masks": (
        lambda f: [path.unlink() for path in f.rglob("*ask/*.png")],
        "none of 6 images has a mask",
    ),
    "one lung": (
        lambda f: f.joinpath(LEFT, "MCUCXR_0243_1.png").unlink(),
        "MCUCXR_0243_1 has a mask in rightMask, but none in leftMask",
    ),
    "another name": (
        lambda f: write(f, {f"{CXR}/CHNCXR_0001_2.png": b""}),
        f"{CXR}/CHNCXR_0001_2.png in .* must be called CHNCXR_ or MCUCXR_",
    ),
    "the same image twice": (
        lambda f: write(f, {"MontgomerySet/CXR_png/CHNCXR_0001_0.png": b""}),
        "are both called CHNCXR_0001_0",
    ),
    "two masks of an image": (
        lambda f: write(f, {"masks/CHNCXR_0001_0.png": b""}),
        "are both masks of CHNCXR_0001_0",
    ),
    "another size": (
        lambda f: write(f, {f"{LEFT}/MCUCXR_0001_0.png": png(np.zeros((4, 5), np.uint8))}),
        f"mask {LEFT}/MCUCXR_0001_0.png is 5x4, its image MontgomerySet/CXR_png/MCUCXR_0001_0.png "
        "11x10",
    ),
    "more levels": (
        lambda f: write(f, {f"{LEFT}/MCUCXR_0001_0.png": png(image("MCUCXR_0001_0") // 64 * 64)}),
        f"mask {LEFT}/MCUCXR_0001_0.png must have 0 and one other value, has 0, 64, 128, 192",
    ),
    "no background": (
        lambda f: write(
            f, {"mask/mask/CHNCXR_0001_0_mask.png": png(mask("CHNCXR_0001_0", "both") // 2 + 1)}
        ),
        "mask mask/mask/CHNCXR_0001_0_mask.png must have 0 and one other value, has 1, 128",
    ),
    "no image": (
        lambda f: write(f, {f"{CXR}/CHNCXR_0001_0.png": b"none"}),
        f"{CXR}/CHNCXR_0001_0.png cannot be decoded",
    ),
    "half a mask": (
        lambda f: write(f, {f"{LEFT}/MCUCXR_0001_0.png": stored("MCUCXR_0001_0")[:-40]}),
        f"{LEFT}/MCUCXR_0001_0.png cannot be decoded",
    ),
    "16 bits": (
        lambda f: write(f, {f"{CXR}/CHNCXR_0001_0.png": png(np.zeros((12, 9), np.uint16))}),
        f"{CXR}/CHNCXR_0001_0.png has 16 bits a channel",
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
    assert "ChinaSet_AllFiles.zip" in describe(NAME) and BUILDERS[NAME].name == NAME
