"""Tasks of the Medical Segmentation Decathlon in small copies, prepared and read back."""

import contextlib
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile

import nibabel
import numpy as np
import pytest
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import resumable_map
from fedhelp_jax.data.builders.msd import Msd
from fedhelp_jax.data.builders.prepare import describe, prepare

CASES = ("hippocampus_367", "hippocampus_304", "hippocampus_204", "hippocampus_003")
# As published, with its spelling of licence and release.
HIPPOCAMPUS = {
    "name": "Hippocampus",
    "description": "Left and right hippocampus segmentation",
    "reference": " Vanderbilt University Medical Center",
    "licence": "CC-BY-SA 4.0",
    "relase": "1.0 04/05/2018",
    "tensorImageSize": "3D",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
    "numTraining": 260,
    "numTest": 130,
    "training": [
        {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"}
        for case in CASES
    ],
    "test": ["./imagesTs/hippocampus_267.nii.gz"],
}
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


def source(case, modalities=1):
    """Volume and mask, of a size of its own; one is stored as floats, one at a scale."""
    rng = np.random.default_rng(int(case[-3:]))
    sides = tuple(int(n) for n in rng.integers(4, 9, 3))
    shape = (*sides, modalities) if modalities > 1 else sides
    volume = rng.integers(0, 2000, shape).astype(np.int16 if case.endswith("4") else np.float32)
    if volume.dtype == np.float32:
        volume += np.float32(0.125)
    return volume, rng.integers(0, 3, sides).astype(np.uint8)


def scale_of(case):
    return (0.7, -1024) if case == CASES[1] else (1, 0)


def packed(array, slope=1.0, intercept=0.0):
    # Turned and sheared on purpose: axes are left as they are.
    affine = np.array([[0, -1, 0.2, 9], [1, 0, 0, -5], [0, 0, -3, 1], [0, 0, 0, 1]])
    data = bytearray(nibabel.Nifti1Image(array, affine).to_bytes())
    data[112:120] = np.array([slope, intercept], "<f4").tobytes()  # scl_slope, scl_inter
    return gzip.compress(bytes(data), 1)


class Manual:
    """A task's archive or folder, as the publisher lays it out, Mac litter and all."""

    def __init__(self, tmp_path, folder="Task04_Hippocampus", listed=HIPPOCAMPUS, modalities=1):
        self.folder, self.data_dir = tmp_path / "manual", str(tmp_path / "data")
        self.task, self.listed = folder, json.loads(json.dumps(listed))
        self.files = {"imagesTs/hippocampus_267.nii.gz": b"of no use here", ".DS_Store": b"\0"}
        for case in CASES:
            volume, mask = source(case, modalities)
            self.files[f"imagesTr/{case}.nii.gz"] = packed(volume, *scale_of(case))
            self.files[f"labelsTr/{case}.nii.gz"] = packed(mask)
            self.files[f"imagesTr/._{case}.nii.gz"] = APPLE
            self.files[f"labelsTr/._{case}.nii.gz"] = APPLE
        self.files["._dataset.json"] = APPLE

    def write(self, how="folder"):
        files = {"dataset.json": json.dumps(self.listed).encode(), **self.files}
        self.folder.mkdir()
        (self.folder / "notes.txt").write_text("what a user keeps there")
        if how == "tar":
            with tarfile.open(self.folder / f"{self.task}.tar", "w") as archive:
                for name, data in {"._x": APPLE, **files}.items():
                    member = tarfile.TarInfo(f"{self.task}/{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            return self
        for name, data in files.items():
            path = self.folder / self.task / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self

    def prepare(self, folder=None):
        said = []
        name = f"msd/{self.task.lower()}"
        prepare(name, str(folder or self.folder), self.data_dir, said.append)
        return said

    def builder(self):
        config = self.task.lower()
        return Msd(config=config, data_dir=self.data_dir, file_format="array_record")

    def refused(self, message):
        self.write()
        with pytest.raises(UserError, match=re.escape(message)) as error:
            self.prepare()
        assert "\n" not in str(error.value)


@pytest.fixture
def manual(tmp_path):
    return Manual(tmp_path)


def check(read, modalities=1):
    assert set(read) == set(CASES)
    for case, example in read.items():
        volume, mask = source(case, modalities)
        slope, intercept = np.float32(scale_of(case)).astype(np.float64)
        assert example["volume"].dtype == np.float32 and example["mask"].dtype == np.uint8
        np.testing.assert_array_equal(
            example["volume"], (volume * slope + intercept).astype(np.float32)
        )
        np.testing.assert_array_equal(example["mask"], mask)
        assert example["group"].decode() == case


def by_id(data_source):
    return {example["id"].decode(): example for example in data_source}


@pytest.mark.parametrize("how", ["folder", "tar", "within"])
def test_hippocampi_are_as_stored(manual, how):
    manual.write(how)
    said = manual.prepare(manual.folder / manual.task if how == "within" else None)
    assert said[-1].endswith("(train 4)")
    made = manual.builder()
    check(by_id(made.as_data_source(split="train")))
    assert made.info.metadata["labels"] == HIPPOCAMPUS["labels"]
    # Also for who has the files only, and not this package.
    alone = tfds.builder_from_directory(made.data_path)
    check(by_id(alone.as_data_source(split="train")))
    assert alone.info.metadata["labels"] == HIPPOCAMPUS["labels"]
    assert alone.info.metadata["modality"] == {"0": "MRI"}
    assert "tensorflow" not in sys.modules


BRAIN = {
    **HIPPOCAMPUS,
    "name": "BRATS",
    "tensorImageSize": "4D",
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {
        "0": "background",
        "1": "edema",
        "2": "non-enhancing tumor",
        "3": "enhancing tumour",
    },
}
PROSTATE = {
    **HIPPOCAMPUS,
    "modality": {"0": "T2", "1": "ADC"},
    "labels": {"0": "background", "1": "any", "2": "names"},
}


@pytest.mark.parametrize(
    ("folder", "listed"), [("Task01_BrainTumour", BRAIN), ("Task05_Prostate", PROSTATE)]
)
def test_modalities_are_the_last_axis(tmp_path, folder, listed):
    count = len(listed["modality"])
    manual = Manual(tmp_path, folder, listed, count).write()
    manual.prepare()
    made = manual.builder()
    assert made.info.features["volume"].shape == (None, None, None, count)
    check(by_id(made.as_data_source(split="train")), count)
    assert made.info.metadata["modality"] == listed["modality"]


def test_the_other_tasks_of_a_folder_are_left_alone(manual):
    manual.write()
    (manual.folder / "Task09_Spleen").mkdir()
    (manual.folder / "Task09_Spleen" / "dataset.json").write_text("{}")
    assert manual.prepare()[-1].endswith("(train 4)")


def test_another_archive_than_the_published_one_is_said(manual, monkeypatch):
    manual.write("tar")
    (line,) = [text for text in manual.prepare() if "MD5" in text]
    data = (manual.folder / "Task04_Hippocampus.tar").read_bytes()
    md5 = hashlib.md5(data).hexdigest()
    assert md5 in line and "not the published 9d24dba78a72977dbd1d2e110310f31b" in line
    manual.data_dir += "_again"
    monkeypatch.setattr(Msd.BUILDER_CONFIGS[3], "md5", md5)
    assert not [text for text in manual.prepare() if "MD5" in text]


@pytest.mark.parametrize("fails", [False, True])
def test_archives_are_closed(manual, monkeypatch, fails):
    opened, init = [], tarfile.TarFile.__init__

    def spy(self, *args, **options):
        init(self, *args, **options)
        opened.append(self)

    if fails:
        manual.files[VOLUME] = APPLE
    manual.write("tar")
    monkeypatch.setattr(tarfile.TarFile, "__init__", spy)
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        manual.prepare()
    assert opened and all(archive.closed for archive in opened)


def test_only_a_few_cases_lie_in_memory(manual, monkeypatch):
    sizes, write = [], resumable_map._write

    def spy(path, examples):
        sizes.append(len(examples))
        write(path, examples)

    monkeypatch.setattr(resumable_map, "_write", spy)
    manual.write().prepare()
    assert sizes == [2, 2]


def test_ten_tasks_are_described():
    names = [config.name for config in Msd.BUILDER_CONFIGS]
    assert names[0] == "task01_braintumour" and names[-1] == "task10_colon" and len(names) == 10
    assert len({config.md5 for config in Msd.BUILDER_CONFIGS}) == 10
    assert Msd.about.sizes["task04_hippocampus train"] == 260
    for name in names:
        text = describe(f"msd/{name}")
        assert "CC BY-SA 4.0" in text and "1902.09063" in text and "dataset.json" in text


# --- bad downloads ---


def test_no_such_task(manual):
    manual.task = "Task04_Other"
    manual.write()
    manual.task = "Task04_Hippocampus"
    message = "needs one Task04_Hippocampus.tar or Task04_Hippocampus/dataset.json, has none"
    with pytest.raises(UserError, match=message):
        manual.prepare()


def test_a_task_twice(manual):
    manual.files["more/Task04_Hippocampus/dataset.json"] = b"{}"
    manual.refused("has Task04_Hippocampus and Task04_Hippocampus/more/Task04_Hippocampus")


def test_a_list_that_is_no_json(manual):
    manual.write()
    (manual.folder / manual.task / "dataset.json").write_bytes(b'{"name": ')
    with pytest.raises(UserError, match=r"dataset\.json in .* is no JSON file"):
        manual.prepare()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", {"0": "background", "1": "liver"}, "they are background, Anterior, Posterior"),
        ("labels", {"1": "background", "2": "Anterior", "3": "Posterior"}, "has labels {1: "),
        ("labels", ["background"], "needs labels as {\"0\": name, ...}, has ['background']"),
        ("labels", {"a": "b"}, "needs labels as"),
        ("modality", None, 'needs modality as {"0": name, ...}, has None'),
        ("modality", {"0": "T2", "1": "ADC"}, "has 2 modalities; Task04_Hippocampus has 1"),
        ("training", None, "has no list training"),
        ("training", [], "has no cases in training"),
        ("training", ["./imagesTr/a.nii.gz"], "it should name image and label"),
        ("training", [{"image": "./imagesTr/a.nii.gz"}], "it should name image and label"),
        ("training", HIPPOCAMPUS["training"] * 2, "has case hippocampus_367 2 times"),
    ],
)
def test_a_bad_list(manual, key, value, message):
    manual.listed[key] = value
    manual.refused(message)


@pytest.mark.parametrize(("folder", "what"), [("imagesTr", "volume"), ("labelsTr", "mask")])
def test_missing_files(manual, folder, what):
    manual.files = {name: data for name, data in manual.files.items() if folder not in name}
    first = f"Task04_Hippocampus/{folder}/hippocampus_367.nii.gz, "
    manual.refused(f"4 of 4 {what}s are missing: {first}")


VOLUME, MASK = (f"{folder}/{CASES[0]}.nii.gz" for folder in ("imagesTr", "labelsTr"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (VOLUME, lambda data: data[:-20], "367.nii.gz is damaged: Compressed file ended before"),
        (VOLUME, lambda data: APPLE, "367.nii.gz is no NIfTI file"),
        (VOLUME, lambda data: packed(np.zeros((2, 3, 4, 2), "f4")), "is 2 x 3 x 4 x 2; it should"),
        (MASK, lambda data: packed(np.zeros((2, 3, 4), "u1")), "367.nii.gz is 2 x 3 x 4, but its"),
        (
            MASK,
            lambda data: packed(source(CASES[0])[1] + np.uint8(1)),
            "367.nii.gz has label 3; labels are 0, 1, 2",
        ),
    ],
)
def test_a_bad_case(manual, name, data, message):
    manual.files[name] = data(manual.files[name])
    manual.refused(message)


def test_a_volume_of_other_modalities(tmp_path):
    manual = Manual(tmp_path, "Task05_Prostate", PROSTATE, 3)
    manual.refused("; it should be D x H x W x 2")


def test_without_nibabel(manual, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    manual.refused("needs nibabel: pip install 'fedhelp_jax[nifti]'")
