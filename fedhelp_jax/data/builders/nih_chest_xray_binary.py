"""NIH ChestX-ray14 with two classes: pneumonia and no finding."""

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present, check_unique
from fedhelp_jax.data.builders.radiographs import grey_png
from fedhelp_jax.data.builders.resumable_map import Example

_TABLE = "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"
_PATTERN = "Data_Entry_2017*.csv"
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_NONE, _PNEUMONIA = "No Finding", "Pneumonia"
_FINDINGS = frozenset(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration "
    "Mass Nodule Pleural_Thickening Pneumonia Pneumothorax".split()
)
_TEST_PERCENT = 20


class NihChestXrayBinary(Builder):
    """Frontal chest radiographs, pneumonia or no finding: official split, grouped by patient."""

    about = About(
        description="61,792 of the 112,120 frontal chest radiographs of NIH ChestX-ray14: those "
        "with No Finding (label 0) and those with Pneumonia among their findings, whatever else "
        "they show (label 1; in 322 of 1,431 it is the only one). Images with other findings alone "
        "are left out. The labels were mined from radiologists' reports. Train and test are the "
        "official lists; without these, 20 % of the patients, by a hash of their number, are "
        "test.",
        homepage="https://nihcc.app.box.com/v/ChestXray-NIHCC",
        licence='"The usage of the data set is unrestricted. But you should provide the link to '
        "our original download site, acknowledge the NIH Clinical Center and provide a citation "
        'to our CVPR 2017 paper." (FAQ_CHESTXRAY.pdf)',
        citation="""\
@inproceedings{wang2017chestxray8, title={{ChestX-ray8}: Hospital-scale Chest X-ray Database and
  Benchmarks on Weakly-Supervised Classification and Localization of Common Thorax Diseases},
  author={Wang, Xiaosong and Peng, Yifan and Lu, Le and Lu, Zhiyong and Bagheri, Mohammadhadi and
  Summers, Ronald M.}, booktitle={CVPR}, year={2017}}""",
        download="""\
One folder with, from https://nihcc.app.box.com/v/ChestXray-NIHCC,
- Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, one of them;
- images_001.tar.gz to images_012.tar.gz, as they are, or unpacked: images/<image>.png, or
  images_001/images/<image>.png and so on;
- for the official split: train_val_list.txt and test_list.txt.""",
        sizes={"no_finding": 60361, "pneumonia": 1431},
    )

    part_size = 16  # radiographs take several megabytes each

    def features(self) -> dict[str, Any]:
        """Returns the features: a grey PNG image, whether it shows pneumonia, and the patient."""
        return {
            "image": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["no_finding", "pneumonia"]),
            "group": tfds.features.Text(),
        }

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the official split or, without its lists, a split by patient."""
        found = {PurePosixPath(name).name for name in download.names}
        others = sorted(name for name in found if fnmatchcase(name, _PATTERN))
        name, rows = download.table(
            tuple(dict.fromkeys((*_TABLE, *others))),
            ("Image Index", "Finding Labels", "Patient ID"),
        )
        where = f"{name} in {download.folder}"
        check_unique((row["Image Index"] for row in rows), "image", where)
        for number, row in enumerate(rows, start=2):
            _check(row, f"{KEY}: {where} line {number} ({row['Image Index']})")
        used = {row["Image Index"]: row for row in rows if _label(row) is not None}
        if not used:
            raise UserError(f"{KEY}: {where} has no image with {_NONE} or {_PNEUMONIA}")
        folds = self._folds(download, rows, sorted(used))
        images = download.by_stem((".png",), "images")
        images = {f"{stem}.png": place for stem, place in images.items()}
        check_present(images, sorted(used), "image", download.folder)
        items: dict[str, list[Item]] = {"train": [], "test": []}
        for image in sorted(used):
            fields = {"label": _label(used[image]), "group": _patient(used[image])}
            item = Item(image.removesuffix(".png"), (images[image],), fields)
            items[folds[image]].append(item)
        for split in [split for split in items if not items[split]]:
            self.say(f"no image in {split}: left out")
            del items[split]
        return items

    def _folds(
        self, download: Download, rows: Sequence[dict[str, str]], used: Sequence[str]
    ) -> dict[str, str]:
        """Returns train or test for each image."""
        present = {PurePosixPath(name).name for name in download.names}
        absent = [name for name in _LISTS.values() if name not in present]
        if absent:
            self.say(
                f"no {' and no '.join(absent)}: {_TEST_PERCENT} % of the patients are test, "
                "by a hash of their number"
            )
            return {row["Image Index"]: _fold(_patient(row)) for row in rows}
        both = " and ".join(_LISTS.values())
        folds: dict[str, str] = {}
        for split, name in _LISTS.items():
            for image in _lines(download, download.find(name)):
                if folds.setdefault(image, split) != split:
                    raise UserError(f"{KEY}={download.folder}: {image} is in both {both}")
        unlisted = [image for image in used if image not in folds]
        if unlisted:
            raise UserError(
                f"{KEY}={download.folder}: {len(unlisted)} of {len(used)} images are neither in "
                f"{' nor in '.join(_LISTS.values())}: {', '.join(unlisted[:3])}"
            )
        sides: dict[str, str] = {}
        for row in rows:
            side = folds.get(row["Image Index"])
            if side and sides.setdefault(_patient(row), side) != side:
                raise UserError(
                    f"{KEY}={download.folder}: patient {_patient(row)} has images in both {both}"
                )
        return folds

    def make(self, download: Download, item: Item) -> Example:
        """Returns the image, converted to grey if it is stored in another mode."""
        (name,) = item.files
        return {"image": grey_png(download.read(name), name)[0]}


def _findings(row: dict[str, str]) -> list[str]:
    return [finding.strip() for finding in row["Finding Labels"].split("|")]


def _label(row: dict[str, str]) -> int | None:
    findings = _findings(row)
    return 1 if _PNEUMONIA in findings else 0 if findings == [_NONE] else None


def _patient(row: dict[str, str]) -> str:
    return str(int(row["Patient ID"]))


def _fold(patient: str) -> str:
    number = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big")
    return "test" if number % 100 < _TEST_PERCENT else "train"


def _lines(download: Download, name: str) -> list[str]:
    try:
        return download.read(name).decode("utf-8-sig").split()
    except UnicodeDecodeError:
        raise UserError(f"{KEY}: {name} in {download.folder} is no text file") from None


def _check(row: dict[str, str], where: str) -> None:
    for finding in _findings(row):
        if finding != _NONE and finding not in _FINDINGS:
            raise UserError(
                f"{where}: Finding Labels must be {_NONE} or of the 14 findings of ChestX-ray14, "
                f"got {finding!r}"
            )
    if _NONE in _findings(row) and len(_findings(row)) > 1:
        raise UserError(f"{where}: Finding Labels has {_NONE} beside others")
    if not (row["Patient ID"].isascii() and row["Patient ID"].isdigit()):
        raise UserError(f"{where}: Patient ID must be a number, got {row['Patient ID']!r}")
