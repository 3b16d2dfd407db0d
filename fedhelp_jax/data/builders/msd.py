"""The Medical Segmentation Decathlon: ten tasks of organs and tumours in CT and MRI."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import nifti
from fedhelp_jax.data.builders.base import About, Builder, Item
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present, check_unique, md5_of
from fedhelp_jax.data.builders.resumable_map import Example

_LIST = "dataset.json"


@dataclasses.dataclass(eq=False, kw_only=True)
class Task(tfds.core.BuilderConfig):
    """One of the ten tasks.

    Attributes:
      folder: Name of the folder in its archive, ``<folder>.tar``.
      md5: MD5 of the archive as distributed by MONAI.
      modalities: Number of modalities of a case; if there are several, they are on the last axis.
      labels: Names of the labels if they are known here; empty if only dataset.json has them.
    """

    folder: str
    md5: str
    modalities: int = 1
    labels: tuple[str, ...] = ()


def _task(folder: str, md5: str, description: str, **options: Any) -> Task:
    return Task(name=folder.lower(), folder=folder, md5=md5, description=description, **options)


class Msd(Builder):
    """A task of the decathlon: the cases with masks, as they are stored.

    The names of labels are in ``info.metadata["labels"]``, by label. The names of modalities are in
    ``info.metadata["modality"]``, by index on the last axis. Both come from dataset.json.
    """

    BUILDER_CONFIGS = [
        _task(
            "Task01_BrainTumour",
            "240a19d752f0d9e9101544901065d872",
            "Gliomas in MRI of four kinds.",
            modalities=4,
            labels=("background", "edema", "non-enhancing tumor", "enhancing tumour"),
        ),
        _task("Task02_Heart", "06ee59366e1e5124267b774dbd654057", "The left atrium in MRI."),
        _task("Task03_Liver", "a90ec6c4aa7f6a3d087205e23d4e6397", "Liver and tumours in CT."),
        _task(
            "Task04_Hippocampus",
            "9d24dba78a72977dbd1d2e110310f31b",
            "Both parts of the hippocampus in MRI.",
            labels=("background", "Anterior", "Posterior"),
        ),
        _task(
            "Task05_Prostate",
            "35138f08b1efaef89d7424d2bcc928db",
            "Two zones of the prostate in MRI of two kinds.",
            modalities=2,
        ),
        _task("Task06_Lung", "8afd997733c7fc0432f71255ba4e52dc", "Lung tumours in CT."),
        _task("Task07_Pancreas", "4f7080cfca169fa8066d17ce6eb061e4", "Pancreas and tumours in CT."),
        _task(
            "Task08_HepaticVessel",
            "641d79e80ec66453921d997fbf12a29c",
            "Vessels of the liver and tumours in CT.",
        ),
        _task("Task09_Spleen", "410d4a301da4e5b2f6f86ec3ddba524e", "The spleen in CT."),
        _task("Task10_Colon", "bad7a188931dc2f6acf72b08eb6202d0", "Colon tumours in CT."),
    ]

    about = About(
        description="The cases with masks of one task of the Medical Segmentation Decathlon, at "
        "their own sizes and intensities, on the axes of their files. dataset.json says which "
        "there are: 260 of the hippocampus, where papers say 263. Cases without masks are left "
        "out. No hospitals are published, so that sites must be made up.",
        homepage="http://medicaldecathlon.com/",
        licence="CC BY-SA 4.0",
        citation="""\
@article{simpson2019msd, title={A large annotated medical image dataset for the development and
  evaluation of segmentation algorithms}, author={Simpson, Amber L. and Antonelli, Michela and
  others}, journal={arXiv:1902.09063}, year={2019}}
@article{antonelli2022msd, title={The Medical Segmentation Decathlon}, author={Antonelli, Michela
  and others}, journal={Nature Communications}, volume={13}, year={2022},
  doi={10.1038/s41467-022-30695-9}}""",
        download="""\
One folder with the archive of the task, TaskNN_Name.tar, as it is or unpacked: a folder TaskNN_Name
with dataset.json, imagesTr and labelsTr. The folder may hold other tasks too, or be the task's own.
The archives are at https://msd-for-monai.s3-us-west-2.amazonaws.com/TaskNN_Name.tar, by name:
Task01_BrainTumour, Task02_Heart, Task03_Liver, Task04_Hippocampus, Task05_Prostate, Task06_Lung,
Task07_Pancreas, Task08_HepaticVessel, Task09_Spleen, Task10_Colon.""",
        sizes={"task01_braintumour train": 484, "task04_hippocampus train": 260},
    )

    # A case of the larger tasks takes half a gigabyte.
    part_size = 2

    @property
    def _config(self) -> Task:
        config = self.builder_config
        assert isinstance(config, Task)
        return config

    def features(self) -> dict[str, Any]:
        """Returns the features: a volume as stored, its mask of dataset.json's labels, the case."""
        sides = (None, None, None)
        several = self._config.modalities > 1
        shape = (*sides, self._config.modalities) if several else sides
        return {
            "volume": tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib"),
            "mask": tfds.features.Tensor(shape=sides, dtype=np.uint8, encoding="zlib"),
            "group": tfds.features.Text(),
        }

    def metadata(self) -> tfds.core.MetadataDict:
        """Returns metadata to be filled with the names of labels and modalities."""
        return tfds.core.MetadataDict()

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the cases of dataset.json that have a mask as one split."""
        nifti.check_installed()
        self._check_archive(download.folder)
        root, listed = self._list(download)
        where = f"{KEY}: {root / _LIST} in {download.folder}"
        labels, modality = _names(listed, "labels", where), _names(listed, "modality", where)
        config = self._config
        known = dict(enumerate(config.labels)) or labels
        if max(labels) > 255 or labels != known:
            said = ", ".join(config.labels) or "in 0..255"
            raise UserError(f"{where} has labels {labels}; of {config.folder} they are {said}")
        if len(modality) != config.modalities:
            raise UserError(
                f"{where} has {len(modality)} modalities; {config.folder} has {config.modalities}"
            )
        metadata = self.info.metadata
        assert isinstance(metadata, dict)
        for key, names in (("labels", labels), ("modality", modality)):
            metadata[key] = {str(number): name for number, name in names.items()}
        cases = _cases(listed, root, where)
        present = {name: name for name in download.names}
        volumes, masks = [v for _, v, _ in cases], [m for _, _, m in cases]
        check_present(present, volumes, "volume", download.folder)
        check_present(present, masks, "mask", download.folder)
        self._labels = tuple(labels)
        return {
            "train": [
                Item(case, (volume, mask), {"group": case}) for case, volume, mask in sorted(cases)
            ]
        }

    def make(self, download: Download, item: Item) -> Example:
        """Returns the volume as it is stored, and the mask on the volume's axes."""
        volume, mask = item.files
        pair = (volume, download.read(volume)), (mask, download.read(mask))
        values, labels = nifti.read_pair(*pair, self._labels, self._config.modalities)
        return {"volume": values, "mask": labels}

    def _list(self, download: Download) -> tuple[PurePosixPath, dict[str, Any]]:
        """Returns the task's folder in the download, and the contents of its dataset.json."""
        folder = self._config.folder
        found = [
            path.parent
            for path in map(PurePosixPath, download.names)
            if path.name == _LIST and (path.parent.name or download.folder.resolve().name) == folder
        ]
        if len(found) != 1:
            said = f"{found[0]} and {found[1]}" if found else "none"
            raise UserError(
                f"{KEY}={download.folder}: needs one {folder}.tar or {folder}/{_LIST}, has {said}"
            )
        name = (found[0] / _LIST).as_posix()
        try:
            listed = json.loads(download.read(name))
        except ValueError:
            raise UserError(f"{KEY}: {name} in {download.folder} is no JSON file") from None
        return found[0], listed if isinstance(listed, dict) else {}

    def _check_archive(self, folder: Path) -> None:
        """Reports if the archive does not have the known MD5, since it may have been repacked."""
        path = folder / f"{self._config.folder}.tar"
        if not path.is_file():
            return
        self.say(f"comparing the checksum of {path.name}")
        md5 = md5_of(path)
        if md5 != self._config.md5:
            self.say(
                f"{path.name} has the MD5 {md5}, not the published "
                f"{self._config.md5}: packed anew, or damaged"
            )


def _names(listed: Mapping[str, Any], key: str, where: str) -> dict[int, str]:
    """Returns names by number, from ``{"0": "background", ...}`` in dataset.json."""
    found = listed.get(key)
    if isinstance(found, dict) and found and all(k.isascii() and k.isdigit() for k in found):
        return dict(sorted((int(number), str(name)) for number, name in found.items()))
    raise UserError(f'{where} needs {key} as {{"0": name, ...}}, has {found!r}')


def _cases(
    listed: Mapping[str, Any], root: PurePosixPath, where: str
) -> list[tuple[str, str, str]]:
    """Returns case, volume and mask of each entry of ``training`` in dataset.json."""
    training = listed.get("training")
    if not isinstance(training, list):
        raise UserError(f"{where} has no list training")
    cases = []
    for entry in training:
        pair = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else ()
        if not pair or not all(isinstance(name, str) for name in pair):
            raise UserError(f"{where} has in training {entry!r}; it should name image and label")
        volume, mask = (root / str(name) for name in pair)
        if volume.name.startswith("."):
            continue  # macOS adds hidden files next to the real ones
        cases.append((volume.name.partition(".")[0], volume.as_posix(), mask.as_posix()))
    if not cases:
        raise UserError(f"{where} has no cases in training")
    check_unique((case for case, _, _ in cases), "case", where)
    return cases
