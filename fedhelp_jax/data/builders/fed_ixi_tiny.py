"""Fed-IXITiny: brain MRI of healthy people from three London hospitals, as in FLamby."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import nifti
from fedhelp_jax.data.builders.base import About, Builder, Item
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present, check_unique
from fedhelp_jax.data.builders.resumable_map import Example

# In the order of FLamby's centre numbers, spelt as in the names of the subjects' folders.
_SITES = ("Guys", "HH", "IOP")
_SIZES = ((249, 62), (145, 36), (59, 15))
_SHAPE = (48, 60, 48)
_FILE = re.compile(r"(?:.*/)?((IXI(\d+)-([^-/]+)-[^-/]+)/(T1|label)/[^/]+\.nii\.gz)")


class FedIxiTiny(Builder):
    """T1-weighted volumes with brain masks, with one client per hospital and FLamby's split."""

    about = About(
        description="566 small T1-weighted MRI volumes of healthy subjects from Guy's Hospital, "
        "Hammersmith Hospital and the Institute of Psychiatry with masks of the brain, at 48 x 60 "
        "x 48 and normalised as FLamby does it, and by its split. Masks are resized by averaging, "
        "and a voxel is brain only if all that it averages is: they are thinner than their source.",
        homepage="https://github.com/owkin/FLamby/tree/main/flamby/datasets/fed_ixi",
        licence="CC BY-SA 3.0",
        citation="""\
@misc{ixi, title={{IXI} -- Information eXtraction from Images, {EPSRC} {GR/S21533/02}},
  howpublished={https://brain-development.org/ixi-dataset/}}
@article{perezgarcia2020torchio, title={{TorchIO}: a {Python} library for efficient loading,
  preprocessing, augmentation and patch-based sampling of medical images in deep learning},
  author={P{\\'e}rez-Garc{\\'i}a, Fernando and Sparks, Rachel and Ourselin, S{\\'e}bastien},
  journal={arXiv:2003.04696}, year={2020}}
@inproceedings{duterrail2022flamby, title={{FLamby}: Datasets and Benchmarks for Cross-Silo
  Federated Learning in Realistic Healthcare Settings}, author={Ogier du Terrail, Jean and others},
  booktitle={NeurIPS}, year={2022}}""",
        download="""\
One folder with
- 7kd5wj7v7p-3.zip, the "IXI Sample Dataset" in its version 3, as it is or unpacked: files
  IXI_sample/IXI002-Guys-0828/T1/IXI002-Guys-0828_image.nii.gz and
  IXI_sample/IXI002-Guys-0828/label/IXI002-Guys-0828_label.nii.gz for each subject
  (https://data.mendeley.com/datasets/7kd5wj7v7p/3, or as FLamby downloads it);
- metadata_tiny.csv from FLamby's repository, in flamby/datasets/fed_ixi/metadata/.""",
        sizes={
            f"{split} {site.lower()}": sizes[i]
            for site, sizes in zip(_SITES, _SIZES, strict=True)
            for i, split in enumerate(("train", "test"))
        },
    )

    mask_names = ("brain",)

    def features(self) -> dict[str, Any]:
        """Returns the features: a normalised volume, its brain mask, hospital and subject."""
        return {
            "volume": tfds.features.Tensor(shape=_SHAPE, dtype=np.float32, encoding="zlib"),
            "mask": tfds.features.Tensor(shape=_SHAPE, dtype=np.uint8, encoding="zlib"),
            "site": tfds.features.ClassLabel(names=[site.lower() for site in _SITES]),
            "group": tfds.features.Text(),
        }

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns FLamby's split; subjects that it does not name are left out."""
        nifti.check_installed()
        table, rows = download.table(
            ("metadata_tiny.csv",), ("Patient ID", "Manufacturer", "Split")
        )
        where = f"{table} in {download.folder}"
        for number, row in enumerate(rows, start=2):
            _check(row, f"{KEY}: {where} line {number} ({row['Patient ID']})")
            row["Patient ID"] = f"IXI{int(row['Patient ID']):03}"
        check_unique((row["Patient ID"] for row in rows), "Patient ID", where)
        subjects, volumes, masks = _files(download)
        wanted = [row["Patient ID"] for row in rows]
        check_present(volumes, wanted, "T1 volume", download.folder)
        check_present(masks, wanted, "mask", download.folder)
        items: dict[str, list[Item]] = {"train": [], "test": []}
        for row in sorted(rows, key=lambda row: row["Patient ID"]):
            number = row["Patient ID"]
            subject, site = subjects[number], int(row["Manufacturer"])
            if _site(subject) != _SITES[site]:
                raise UserError(
                    f"{KEY}: {where} has Manufacturer {site} ({_SITES[site]}) for {number}, "
                    f"but its folder is called {subject}"
                )
            files = volumes[number], masks[number]
            items[row["Split"]].append(Item(subject, files, {"site": site, "group": subject}))
        return items

    def make(self, download: Download, item: Item) -> Example:
        """Returns volume and mask after FLamby's transforms."""
        volume, mask = item.files
        pair = (volume, download.read(volume)), (mask, download.read(mask))
        values, labels = nifti.read_pair(*pair, (0, 1))
        return {
            "volume": normalise(area_resize(values, _SHAPE)),
            "mask": area_resize(labels, _SHAPE).astype(np.uint8),
        }


def area_resize(volume: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns a volume resized by adaptive average pooling, PyTorch's mode "area".

    Along an axis of length n that is resized to ``out``, voxel i is the mean of voxels
    ``floor(i n / out)`` (inclusive) to ``ceil((i + 1) n / out)`` (exclusive). Windows overlap if n
    is not a multiple of ``out``, and axes may grow.

    Args:
      volume: ``[D, H, W]``.
      shape: Sides of the result.

    Returns:
      float32 of that shape.

    Example:
      >>> area_resize(np.array([[[0, 1, 2]]]), (1, 1, 2))
      array([[[0.5, 1.5]]], dtype=float32)
    """
    resized = np.asarray(volume, np.float32)
    counts = np.ones((), np.float32)
    for axis, size in enumerate(shape):
        side = resized.shape[axis]
        windows = [slice(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
        moved = np.moveaxis(resized, axis, 0)
        resized = np.moveaxis(np.stack([moved[w].sum(0) for w in windows]), 0, axis)
        widths = np.array([w.stop - w.start for w in windows], np.float32)
        counts = counts[..., None] * widths
    # Divided once, as in PyTorch, so that a window of ones has a mean of exactly 1.
    return resized / counts


def normalise(volume: np.ndarray) -> np.ndarray:
    """Returns ``(x - mean) / std`` over all voxels, float32; a constant volume becomes 0.

    The standard deviation is that of the population, as in MONAI's ``NormalizeIntensity``.
    """
    centred = volume - np.float32(volume.mean(dtype=np.float64))
    std = np.float32(np.sqrt(np.square(centred, dtype=np.float64).mean()))
    return centred / (std or np.float32(1))


def _site(subject: str) -> str:
    return subject.split("-")[1]


def _files(download: Download) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Returns the subject's name, its T1 volume and its mask, each by ``IXI###``."""
    subjects: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {"T1": {}, "label": {}}
    tails = set()
    for name in download.names:
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        tail, subject, number, site, kind = match.groups()
        # FLamby keeps the archive next to its unpacked files, so that each file is found twice.
        if tail in tails:
            continue
        tails.add(tail)
        if site not in _SITES:
            raise UserError(f"{KEY}: {name} is of site {site}; sites are {', '.join(_SITES)}")
        key = f"IXI{int(number):03}"
        if subjects.setdefault(key, subject) != subject:
            raise UserError(f"{KEY}: {subjects[key]} and {subject} are both subject {key}")
        if key in found[kind]:
            raise UserError(f"{KEY}: {found[kind][key]} and {name} are both of {subject}")
        found[kind][key] = name
    return subjects, found["T1"], found["label"]


def _check(row: dict[str, str], where: str) -> None:
    if not (row["Patient ID"].isascii() and row["Patient ID"].isdigit()):
        raise UserError(f"{where}: Patient ID must be a number, got {row['Patient ID']!r}")
    if row["Manufacturer"] not in map(str, range(len(_SITES))):
        raise UserError(f"{where}: Manufacturer must be in 0..2, got {row['Manufacturer']!r}")
    if row["Split"] not in ("train", "test"):
        raise UserError(f"{where}: Split must be train or test, got {row['Split']!r}")
