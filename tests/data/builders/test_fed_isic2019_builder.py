"""Fed-ISIC2019 prepared from FLamby's layout and from the raw download, without TensorFlow."""

import csv
import io
import sys
import zipfile

import numpy as np
import pytest
from commands import fedhelp, refusal
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import base
from fedhelp_jax.data.builders import prepare as preparing
from fedhelp_jax.data.builders.fed_isic2019 import FedIsic2019, preprocess
from fedhelp_jax.data.builders.prepare import builder, names, prepare

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
# Image, diagnosis, centre, fold, lesion.
ROWS = [
    ("ISIC_0065613", 1, 0, "train", "BCN_0000001"),
    ("ISIC_0024306", 0, 1, "train", "HAM_0000550"),
    ("ISIC_0024307", 7, 1, "test", "HAM_0000550"),
    ("ISIC_0012669_downsampled", 4, 4, "test", "MSK4_0001"),
    ("ISIC_0024400", 2, 5, "train", ""),
]
RAW, DONE = "ISIC_2019_Training_Input", "ISIC_2019_Training_Input_preprocessed"


def jpeg(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tables(folder, rows=ROWS, lesions=True):
    """FLamby's split file, and the challenge's metadata."""
    with (folder / "train_test_split").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["image", *CLASSES, "target", "center", "fold", "fold2"])
        for image, target, centre, fold, _ in rows:
            one_hot = [float(i == target) for i in range(len(CLASSES))]
            out.writerow([image, *one_hot, target, centre, fold, f"{fold}_{centre}"])
    if lesions:
        with (folder / "ISIC_2019_Training_Metadata.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["image", "age_approx", "anatom_site_general", "lesion_id", "sex"])
            out.writerows([image, "45.0", "torso", lesion, ""] for image, *_, lesion in rows)


def write_images(folder, name=DONE, rows=ROWS, size=(40, 30)):
    (folder / name).mkdir()
    for seed, (image, *_) in enumerate(rows):
        (folder / name / f"{image}.jpg").write_bytes(jpeg(seed, size))


@pytest.fixture
def download(tmp_path):
    (tmp_path / "download").mkdir()
    return tmp_path / "download"


def prepared(download):
    """What the prepared set holds, by split and image."""
    data = download.parent / "data"
    prepare("fed_isic2019", str(download), str(data), say=lambda text: None)
    made = builder("fed_isic2019", str(data))
    found = {}
    for split in made.info.splits:
        examples = list(made.as_data_source(split=split))
        found[split] = {example["id"].decode(): example for example in examples}
        assert len(found[split]) == len(examples) == made.info.splits[split].num_examples
    return found


def test_a_preprocessed_folder_is_read_back_equal(download):
    write_tables(download)
    write_images(download)
    found = prepared(download)
    for seed, (image, target, centre, fold, lesion) in enumerate(ROWS):
        example = found[fold].pop(image)
        stored = np.asarray(Image.open(io.BytesIO(jpeg(seed))))
        np.testing.assert_array_equal(example["image"], stored)
        assert (example["label"], example["site"]) == (target, centre)
        assert example["group"].decode() == (lesion or f"image {image}")
    assert found == {"train": {}, "test": {}}
    assert not (download.parent / "data" / ".unfinished" / "fed_isic2019").exists()
    assert "tensorflow" not in sys.modules
    info = builder("fed_isic2019", str(download.parent / "data")).info
    assert "FLamby" in info.citation and "CC BY-NC 4.0" in info.as_proto.redistribution_info.license
    assert info.features["label"].names == list(CLASSES[:8])


def test_the_raw_download_is_preprocessed_as_flamby_does(download):
    write_tables(download)
    with zipfile.ZipFile(download / f"{RAW}.zip", "w") as archive:
        archive.writestr(f"{RAW}/LICENSE.txt", "CC BY-NC 4.0")
        for seed, (image, *_) in enumerate(ROWS):
            archive.writestr(f"{RAW}/{image}.jpg", jpeg(seed, (60, 48)))
    found = prepared(download)
    for seed, (image, _, _, fold, _) in enumerate(ROWS):
        raw = Image.open(io.BytesIO(jpeg(seed, (60, 48))))
        file = io.BytesIO()
        preprocess(raw).save(file, "JPEG")
        np.testing.assert_array_equal(found[fold][image]["image"], np.asarray(Image.open(file)))
        assert found[fold][image]["image"].shape == (224, 280, 3)


@pytest.mark.parametrize("size", [(600, 450), (1024, 767), (300, 300)])
def test_shades_of_gray_against_float64(size):
    rng = np.random.default_rng(0)
    tint = np.array([1.0, 0.6, 0.4])  # a yellow light, so that values pass 255
    pixels = (rng.uniform(0, 255, (size[1], size[0], 3)) * tint).astype(np.uint8)
    pixels[:80, :80] = 250
    image = Image.fromarray(pixels)
    ratio = 224 / min(size)
    small = image.resize((int(size[0] * ratio), int(size[1] * ratio)), Image.Resampling.BILINEAR)
    x = np.asarray(small).astype(np.float64)
    light = (x**6).mean((0, 1)) ** (1 / 6)
    exact = x * np.linalg.norm(light) / (np.sqrt(3) * light)
    assert (exact > 256).any()
    found = np.asarray(preprocess(image)).astype(np.float64)
    assert found.shape == exact.shape and min(found.shape[:2]) == (223 if 767 in size else 224)
    # Rounded down, and past 255 from 0 again; float32 may end on the other side of a whole number.
    away = np.abs(found - np.floor(exact) % 256)
    near = np.abs(exact - np.round(exact)) < 0.02
    assert (away[~near] == 0).all() and (np.minimum(away, 256 - away)[near] <= 1).all()


def test_a_channel_that_is_black_everywhere_stays_black():
    pixels = np.full((224, 224, 3), 100, np.uint8)
    pixels[..., 2] = 0
    assert (np.asarray(preprocess(Image.fromarray(pixels)))[..., 2] == 0).all()


def test_centres_without_images_are_left_out_and_said(download):
    write_tables(download)
    write_images(download, rows=[row for row in ROWS if row[2] in (0, 1)])
    said: list[str] = []
    prepare("fed_isic2019", str(download), str(download.parent / "data"), say=said.append)
    assert "no image of centres 4, 5: left out" in said
    assert "(train 2, test 1)" in said[-1]
    prepare("fed_isic2019", str(download), str(download.parent / "data"), say=said.append)
    assert "is there already" in said[-1]


def test_without_metadata_every_image_is_a_lesion_of_its_own(download):
    write_tables(download, lesions=False)
    write_images(download)
    assert {e["group"].decode() for e in prepared(download)["test"].values()} == {
        "image ISIC_0024307",
        "image ISIC_0012669_downsampled",
    }


def changed(number, **values):
    names = ("image", "target", "center", "fold", "lesion")
    row = dict(zip(names, ROWS[number], strict=True)) | values
    return [*ROWS[:number], tuple(row.values()), *ROWS[number + 1 :]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (changed(0, target=8), r"line 2 \(ISIC_0065613\): target must be in 0..7, got '8'"),
        (changed(1, center=6), r"line 3 \(ISIC_0024306\): center must be in 0..5, got '6'"),
        (changed(2, fold="val"), r"line 4 \(ISIC_0024307\): fold must be train or test"),
        (changed(1, image="ISIC_0065613"), "has image ISIC_0065613 2 times"),
    ],
)
def test_bad_tables_are_one_line(download, rows, words):
    write_tables(download, rows)
    write_images(download)
    with pytest.raises(UserError, match=words):
        prepared(download)


def test_missing_files_are_one_line(download):
    write_images(download)
    with pytest.raises(UserError, match="needs a file train_test_split or train_test_split.csv"):
        prepared(download)
    write_tables(download)
    (download / DONE / "ISIC_0024307.jpg").unlink()
    with pytest.raises(UserError, match="1 of 5 images are missing: ISIC_0024307"):
        prepared(download)


def test_an_image_that_cannot_be_decoded_is_named(download):
    write_tables(download)
    write_images(download)
    path = download / DONE / "ISIC_0024400.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"{DONE}/ISIC_0024400.jpg cannot be decoded"):
        prepared(download)
    path.write_bytes(jpeg(4))
    assert set(prepared(download)["train"]) == {"ISIC_0065613", "ISIC_0024306", "ISIC_0024400"}


def test_what_was_made_of_files_that_changed_since_is_made_anew(download, monkeypatch):
    """The others are gone on from: here one image to a part."""
    write_tables(download)
    write_images(download)
    monkeypatch.setattr(FedIsic2019, "part_size", 1)
    made, make = [], FedIsic2019.make

    def make_some(self, download, item):
        made.append(item.key)
        if item.key == stop:
            raise UserError("stopped")
        return make(self, download, item)

    monkeypatch.setattr(FedIsic2019, "make", make_some)
    stop = "ISIC_0065613"  # the last of train
    with pytest.raises(UserError, match="stopped"):
        prepared(download)
    made.clear()
    stop = ""
    (download / DONE / "ISIC_0024306.jpg").write_bytes(jpeg(99, (20, 10)))
    found = prepared(download)
    assert "ISIC_0024306" in made and "ISIC_0024400" not in made
    assert found["train"]["ISIC_0024306"]["image"].shape == (10, 20, 3)


def test_a_full_disk_is_one_line_and_what_is_made_is_kept(download, monkeypatch):
    write_tables(download)
    write_images(download)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base.io, "BytesIO", full)
        patch.setattr(FedIsic2019, "make", lambda self, download, item: {"image": b"x"})
        with pytest.raises(
            UserError, match="No space left on device; what is made so far is kept in"
        ):
            prepared(download)
    assert list((download.parent / "data" / ".unfinished" / "fed_isic2019").rglob("*.npz"))


def test_the_command(download, capsys, tmp_path):
    write_tables(download)
    write_images(download)
    assert fedhelp("data list") == 0
    assert capsys.readouterr().out.splitlines() == names() and "fed_isic2019" in names()
    assert fedhelp("data describe fed_isic2019") == 0
    out = capsys.readouterr().out
    assert "CC BY-NC 4.0" in out and "train_test_split" in out and "center_0 9930" in out
    assert fedhelp(f"data prepare fed_isic2019 --manual_dir={download} --data_dir={tmp_path}") == 0
    assert "(train 3, test 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("data", "takes one of list, describe, prepare, check"),
        ("data remove fed_isic2019", "takes one of list, describe, prepare, check"),
        ("data describe fed_isic", "not a data set; did you mean fed_isic2019?"),
        ("data describe fed_isic2019/x", "has no configurations"),
        ("data describe msd", "msd needs a configuration; it is one of task01_braintumour"),
        (
            "data describe medmnist/pneumonia_28",
            "did you mean pneumoniamnist_28? (written medmnist/pathmnist_28)",
        ),
        ("data prepare fed_isic2019 --data_dir=x", "--manual_dir is missing"),
        ("data prepare fed_isic2019 --manual_dir=x --data_dir=x", "no such folder"),
    ],
)
def test_bad_use_of_the_command(capsys, command, words):
    assert words in refusal(capsys, fedhelp(command))


def test_progress_tells_the_time_left(monkeypatch):
    said: list[str] = []
    progress = preparing._Progress(said.append)
    progress.begin(100)
    progress.add(10)
    monkeypatch.setattr(preparing, "_EVERY", 0)
    progress.add(10)
    assert said[0] == "100 examples" and said[1].startswith("20 of 100 examples  left ")


def test_the_official_sizes_on_real_data(real, tmp_path):
    """Centres 1, 2, 3 and 5, whose images HAM10000 has."""
    (tmp_path / "download").mkdir()
    for file, name in [
        ("ham10000_200x150.zip", "images.zip"),
        ("fed_isic2019_ham_split.csv", "train_test_split.csv"),
    ]:
        (tmp_path / "download" / name).symlink_to(real / file)
    found = prepared(tmp_path / "download")
    counts = {
        f"{split} center_{site}": sum(example["site"] == site for example in examples.values())
        for split, examples in found.items()
        for site in (1, 2, 3, 5)
    }
    assert counts == {name: FedIsic2019.about.sizes[name] for name in counts}
