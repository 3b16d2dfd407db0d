"""The builder of skin lesion masks, on downloads laid out as their publishers do."""

import csv
import io
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.prepare import builder, prepare

COLUMNS = (
    "lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset",
)  # fmt: skip
SITES = ("vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias")
IDS = [f"ISIC_{24306 + i:07}" for i in range(6)]
MASKS = "HAM10000_segmentations_lesion_tschandl"
STUB = b"\0\5\x16\7\0\2\0\0Mac OS X        "


def number(ident):
    return int(ident.removeprefix("ISIC_"))


def jpeg(ident):
    pixels = np.random.default_rng(number(ident)).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def mask_of(ident, shape=(9, 12)):
    mask = np.zeros(shape, np.uint8)
    mask[2:6, number(ident) % 6 : 8] = 255
    return mask


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


class Files:
    def __init__(self, path, config):
        self.config = config
        self.folder, self.data_dir, self.said = path / "download", path / "prepared", []
        self.folder.mkdir()

    def prepare(self):
        name = f"skin_masks/{self.config}"
        return prepare(name, str(self.folder), str(self.data_dir), self.said.append)

    def read(self, split):
        source = builder(f"skin_masks/{self.config}", str(self.data_dir)).as_data_source(
            split=split
        )
        return {example["id"].decode(): example for example in source}

    def refusal(self):
        with pytest.raises(UserError) as caught:
            self.prepare()
        assert "\n" not in str(caught.value)
        return str(caught.value)


class Ham10000(Files):
    def __init__(self, path):
        super().__init__(path, "ham10000")
        self.rows = [
            [f"HAM_{i // 2:07}", ident, "bkl", "histo", "80.0", "male", "scalp", SITES[i % 4]]
            for i, ident in enumerate(IDS)
        ]
        self.masks = {f"{MASKS}/{i}_segmentation.png": png(mask_of(i)) for i in IDS}

    def write(self, metadata="HAM10000_metadata", columns=COLUMNS, inner=""):
        tabs = metadata.endswith(".tab")
        with (self.folder / metadata).open("w", newline="") as file:
            quoting = csv.QUOTE_NONNUMERIC if tabs else csv.QUOTE_MINIMAL
            writer = csv.writer(file, delimiter="\t" if tabs else ",", quoting=quoting)
            writer.writerows([columns, *(row[: len(columns)] for row in self.rows)])
        for part, ids in enumerate((IDS[:3], IDS[3:]), start=1):
            members = {f"{inner.format(part)}{i}.jpg": jpeg(i) for i in ids}
            write_zip(self.folder / f"HAM10000_images_part_{part}.zip", members)
        litter = {f"__MACOSX/{MASKS}/._{IDS[0]}_segmentation.png": STUB}
        write_zip(self.folder / f"{MASKS}.zip", {f"{MASKS}/": b"", **self.masks, **litter})

    def check(self):
        found = self.read("train")
        assert sorted(found) == IDS
        for i, ident in enumerate(IDS):
            expected = np.asarray(Image.open(io.BytesIO(jpeg(ident))))
            # Decoders of JPEG differ by rounding.
            np.testing.assert_allclose(found[ident]["image"].astype(int), expected, atol=3)
            np.testing.assert_array_equal(found[ident]["mask"][..., 0], mask_of(ident))
            assert found[ident]["group"].decode() == f"HAM_{i // 2:07}"
        return [found[ident]["site"] for ident in IDS]


@pytest.fixture
def ham(tmp_path):
    return Ham10000(tmp_path)


@pytest.fixture
def isic(tmp_path):
    return Files(tmp_path, "isic2018_task1")


@pytest.mark.parametrize("inner", ["", "HAM10000_images_part_{}/"])
@pytest.mark.parametrize("metadata", ["HAM10000_metadata", "HAM10000_metadata.tab"])
def test_ham10000_of_the_publisher(ham, metadata, inner):
    ham.write(metadata, inner=inner)
    ham.prepare()
    assert ham.check() == [0, 1, 2, 3, 0, 1]
    assert "train has 6 examples, officially 10015" in ham.said
    assert "tensorflow" not in sys.modules


def test_ham10000_in_folders_without_sites(ham):
    ham.write("HAM10000_metadata.csv", COLUMNS[:-1])
    for path in ham.folder.glob("*.zip"):
        path.unlink()
    for folder in ("images", "masks"):
        (ham.folder / folder).mkdir()
    for ident in IDS:
        (ham.folder / "images" / f"{ident}.jpg").write_bytes(jpeg(ident))
        (ham.folder / "masks" / f"{ident}.png").write_bytes(png(mask_of(ident)))
    (ham.folder / "images" / "ISIC_0099999.jpg").write_bytes(jpeg("ISIC_0099999"))
    ham.prepare()
    assert ham.check() == [4] * 6
    assert any("no column dataset" in line for line in ham.said)
    assert "1 images that HAM10000_metadata.csv does not name: left out" in ham.said


def test_the_greys_of_a_mask_are_cut(ham):
    grey = mask_of(IDS[1])
    grey[0, :2] = 127, 128
    ham.masks[f"{MASKS}/{IDS[1]}_segmentation.png"] = png(grey)
    ham.write()
    ham.prepare()
    found = ham.read("train")[IDS[1]]["mask"][..., 0]
    assert found[0, :2].tolist() == [0, 255]


def test_isic2018(isic):
    counts = {"Training": 4, "Validation": 1}
    for start, (split, count) in enumerate(counts.items()):
        ids = [f"ISIC_{100 * start + i:07}" for i in range(count)]
        images, masks = f"ISIC2018_Task1-2_{split}_Input", f"ISIC2018_Task1_{split}_GroundTruth"
        members = {f"{images}/{i}.jpg": jpeg(i) for i in ids}
        write_zip(isic.folder / f"{images}.zip", members | {f"{images}/LICENSE.txt": b"terms"})
        (isic.folder / masks / masks).mkdir(parents=True)  # nested, as some unpack it
        for i in ids:
            (isic.folder / masks / masks / f"{i}_segmentation.png").write_bytes(png(mask_of(i)))
    isic.prepare()
    train, validation = isic.read("train"), isic.read("validation")
    assert (len(train), list(validation)) == (4, ["ISIC_0000100"])
    for ident, example in (train | validation).items():
        np.testing.assert_array_equal(example["mask"][..., 0], mask_of(ident))
        assert example["group"].decode() == ident
        assert "site" not in example
    assert "no test images: left out" in isic.said
    assert "train has 4 examples, officially 2594" in isic.said


def write_isic(isic, split, ids):
    for kind, end, data in (
        ("1-2_{}_Input", ".jpg", jpeg),
        ("1_{}_GroundTruth", "_segmentation.png", lambda i: png(mask_of(i))),
    ):
        folder = isic.folder / f"ISIC2018_Task{kind.format(split)}"
        folder.mkdir()
        for i in ids:
            (folder / f"{i}{end}").write_bytes(data(i))


def test_isic2018_with_an_image_in_two_splits(isic):
    write_isic(isic, "Training", IDS)
    write_isic(isic, "Test", IDS[2:3])
    assert f"has image {IDS[2]} 2 times" in isic.refusal()


def test_isic2018_without_some_files(isic):
    write_isic(isic, "Training", IDS)
    write_isic(isic, "Validation", [])
    mask = isic.folder / "ISIC2018_Task1_Training_GroundTruth" / f"{IDS[2]}_segmentation.png"
    mask.unlink()
    assert f"1 of 6 training masks are missing: {IDS[2]}" in isic.refusal()
    for image in (isic.folder / "ISIC2018_Task1-2_Training_Input").iterdir():
        image.unlink()
    said = f"5 of 5 training images are missing: {IDS[0]}, {IDS[1]}, {IDS[3]}, ..."
    assert said in isic.refusal()


def test_isic2018_without_training_images(isic):
    write_isic(isic, "Test", IDS)
    assert "no .jpg file in ISIC2018_Task1-2_Training_Input" in isic.refusal()


def test_missing_metadata(ham):
    ham.write()
    (ham.folder / "HAM10000_metadata").unlink()
    assert "needs a file HAM10000_metadata or" in ham.refusal()


def test_missing_masks(ham):
    for ident in IDS[:4]:
        del ham.masks[f"{MASKS}/{ident}_segmentation.png"]
    ham.write()
    assert f"4 of 6 masks are missing: {IDS[0]}, {IDS[1]}, {IDS[2]}, ..." in ham.refusal()


def test_missing_images(ham):
    ham.write()
    (ham.folder / "HAM10000_images_part_2.zip").unlink()
    assert f"3 of 6 images are missing: {', '.join(IDS[3:])}" in ham.refusal()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (1, IDS[0], f"has image_id {IDS[0]} 2 times"),
        (7, "vidir", f"line 4 ({IDS[2]}): dataset must be one of vidir_molemax, "),
        (7, "nan", f"line 4 ({IDS[2]}): dataset must be one of vidir_molemax, "),
    ],
)
def test_bad_rows(ham, column, value, said):
    ham.rows[2][column] = value
    ham.write()
    assert said in ham.refusal()


def test_images_of_unknown_lesions_have_one_each(ham):
    ham.rows[1][0], ham.rows[2][0], ham.rows[3][0] = "", "nan", "nan"
    ham.write()
    ham.prepare()
    examples = builder("skin_masks/ham10000", str(ham.data_dir)).as_data_source(split="train")
    groups = {example["id"].decode(): example["group"].decode() for example in examples}
    assert [groups[i] for i in IDS[1:4]] == [f"image {i}" for i in IDS[1:4]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(mask_of(IDS[0], (12, 9))), "is 9x12, its image ISIC_0024307.jpg 12x9"),
        (png(np.full((9, 12), 100, np.uint8)), "_segmentation.png holds 100"),
        (png(mask_of(IDS[0]))[:60], "_segmentation.png cannot be decoded"),
    ],
)
def test_bad_masks(ham, data, said):
    ham.masks[f"{MASKS}/{IDS[1]}_segmentation.png"] = data
    ham.write()
    assert said in ham.refusal()


def test_a_truncated_image(ham):
    ham.write()
    (ham.folder / "images").mkdir()
    for ident in IDS:
        (ham.folder / "images" / f"{ident}.jpg").write_bytes(jpeg(ident)[:-200])
    assert f"images/{IDS[0]}.jpg cannot be decoded" in ham.refusal()


def test_unusable_examples_are_left_out_and_listed_where_asked(ham, monkeypatch):
    ham.masks[f"{MASKS}/{IDS[1]}_segmentation.png"] = png(np.full((9, 12), 100, np.uint8))
    ham.masks[f"{MASKS}/{IDS[4]}_segmentation.png"] = png(mask_of(IDS[0]))[:60]
    ham.write()
    said, folders = [], (str(ham.folder), str(ham.data_dir))
    with monkeypatch.context() as patch:  # the first attempt ends after all parts are made
        patch.setattr("tensorflow_datasets.core.DatasetInfo.write_to_directory", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("skin_masks/ham10000", *folders, said.append, on_bad_example="skip")
    with pytest.raises(UserError, match="_segmentation.png holds 100"):
        prepare("skin_masks/ham10000", *folders, said.append)
    folder = prepare("skin_masks/ham10000", *folders, said.append, on_bad_example="skip")
    assert said[-2].startswith("2 examples that cannot be used are left out, listed in ")
    assert "(train 4)" in said[-1]
    with (folder / "quarantine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["example"]) for row in rows] == [
        ("train", IDS[1]),
        ("train", IDS[4]),
    ]
    assert all(row["client"] for row in rows)
    assert all(f"{row['example']}_segmentation.png" in row["files"] for row in rows)
    assert "holds 100" in rows[0]["reason"] and "cannot be decoded" in rows[1]["reason"]
    examples = builder("skin_masks/ham10000", str(ham.data_dir)).as_data_source(split="train")
    kept = {example["id"].decode() for example in examples}
    assert kept == set(IDS) - {IDS[1], IDS[4]}


def test_more_than_half_unusable_is_refused_all_the_same(ham):
    for ident in IDS[:4]:
        ham.masks[f"{MASKS}/{ident}_segmentation.png"] = b"-"
    ham.write()
    folders = str(ham.folder), str(ham.data_dir)
    with pytest.raises(UserError, match="4 of 6 train examples cannot be used: too many"):
        prepare("skin_masks/ham10000", *folders, lambda text: None, on_bad_example="skip")


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_truncated_archive(ham):
    ham.write()
    path = ham.folder / f"{MASKS}.zip"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{MASKS}.zip is damaged" in ham.refusal()


def test_real_images(real, ham):
    (ham.folder / "ham10000.zip").symlink_to(real / "ham10000_200x150.zip")
    ham.prepare()
    assert "train 10015" in ham.said[-1]
    source = builder("skin_masks/ham10000", str(ham.data_dir)).as_data_source(split="train")
    assert len(source) == 10015
    example = source[0]
    assert (example["image"].shape, example["mask"].shape) == ((150, 200, 3), (150, 200, 1))
    assert set(np.unique(example["mask"])) == {0, 255}
    assert example["group"].startswith(b"HAM_")
