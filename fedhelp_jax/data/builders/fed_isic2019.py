"""Fed-ISIC2019: dermoscopy images of the ISIC 2019 challenge from six centres, as in FLamby."""

import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item, decoded, upright
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present, check_unique
from fedhelp_jax.data.builders.resumable_map import Example
from fedhelp_jax.data.readers.tables import group_of

LABEL_NAMES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
_RAW = "ISIC_2019_Training_Input"
_PREPROCESSED = ("ISIC_2019_Training_Input_preprocessed", "images")
_SIZES = ((9930, 2483), (3163, 791), (2691, 672), (1807, 452), (655, 164), (351, 88))
_SHORTER_SIDE = 224
_POWER = 6


class FedIsic2019(Builder):
    """Skin lesions of eight diagnoses: one client per centre, official folds, grouped by lesion."""

    about = About(
        description="23,247 dermoscopy images of the ISIC 2019 challenge with one of eight "
        "diagnoses, by the six centres and the folds that FLamby gave them. 696 lesions have "
        "images in both folds: a property of the official split.",
        homepage="https://github.com/owkin/FLamby/tree/main/flamby/datasets/fed_isic2019",
        licence="CC BY-NC 4.0",
        citation="""\
@article{tschandl2018ham10000, title={The {HAM10000} dataset, a large collection of multi-source
  dermatoscopic images of common pigmented skin lesions}, author={Tschandl, Philipp and Rosendahl,
  Cliff and Kittler, Harald}, journal={Scientific Data}, volume={5}, year={2018}}
@article{codella2017isic, title={Skin Lesion Analysis Toward Melanoma Detection}, author={Codella,
  Noel and others}, journal={arXiv:1710.05006}, year={2017}}
@article{combalia2019bcn20000, title={{BCN20000}: Dermoscopic Lesions in the Wild},
  author={Combalia, Marc and others}, journal={arXiv:1908.02288}, year={2019}}
@inproceedings{duterrail2022flamby, title={{FLamby}: Datasets and Benchmarks for Cross-Silo
  Federated Learning in Realistic Healthcare Settings}, author={Ogier du Terrail, Jean and others},
  booktitle={NeurIPS}, year={2022}}""",
        download="""\
One folder with
- ISIC_2019_Training_Input_preprocessed/<image>.jpg, as FLamby makes it, or else the raw images
  ISIC_2019_Training_Input/<image>.jpg, which are then preprocessed as FLamby does; either may be
  in a zip or tar file (https://challenge.isic-archive.com/data/#2019);
- train_test_split, the file of the official folds, from FLamby's repository, in
  flamby/datasets/fed_isic2019/dataset_creation_scripts/;
- for the lesions, unless that file has a column lesion_id: ISIC_2019_Training_Metadata.csv.""",
        sizes={
            f"{fold} center_{centre}": sizes[i]
            for centre, sizes in enumerate(_SIZES)
            for i, fold in enumerate(("train", "test"))
        },
    )

    def features(self) -> dict[str, Any]:
        """Returns the features: a JPEG image, its diagnosis, centre and lesion."""
        return {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(LABEL_NAMES)),
            "site": tfds.features.ClassLabel(names=[f"center_{k}" for k in range(len(_SIZES))]),
            "group": tfds.features.Text(),
        }

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the official folds; a centre without any image in the download is left out."""
        name, rows = download.table(
            ("train_test_split", "train_test_split.csv"),
            ("image|image_id", "target", "center", "fold"),
        )
        where = f"{name} in {download.folder}"
        check_unique((row["image"] for row in rows), "image", where)
        for number, row in enumerate(rows, start=2):
            _check(row, f"{KEY}: {where} line {number} ({row['image']})")
        images = next(
            filter(None, (download.by_stem((".jpg",), f) for f in (*_PREPROCESSED, _RAW))), {}
        )
        centres = {row["center"] for row in rows if row["image"] in images}
        absent = sorted({row["center"] for row in rows} - centres)
        if centres and absent:
            self.say(f"no image of centres {', '.join(absent)}: left out")
            rows = [row for row in rows if row["center"] in centres]
        check_present(images, [row["image"] for row in rows], "image", download.folder)
        lesions = self._lesions(download, rows)
        items: dict[str, list[Item]] = {"train": [], "test": []}
        for row in sorted(rows, key=lambda row: row["image"]):
            fields = {
                "label": int(row["target"]),
                "site": int(row["center"]),
                "group": lesions[row["image"]],
            }
            items[row["fold"]].append(Item(row["image"], (images[row["image"]],), fields))
        return items

    def _lesions(self, download: Download, rows: Sequence[dict[str, str]]) -> dict[str, str]:
        """Returns the lesion of each image; images without a known lesion get one of their own."""
        metadata, known = "ISIC_2019_Training_Metadata.csv", rows
        if "lesion_id" not in rows[0]:
            known = []
            if any(PurePosixPath(name).name == metadata for name in download.names):
                known = download.table((metadata,), ("image", "lesion_id"))[1]
            else:
                self.say(f"no {metadata}: every image counts as a lesion of its own")
        found = {row["image"]: row["lesion_id"] for row in known}
        images = [row["image"] for row in rows]
        return {image: group_of(found.get(image, ""), image) for image in images}

    def make(self, download: Download, item: Item) -> Example:
        """Returns the image, which is preprocessed if it is a raw one."""
        (name,) = item.files
        data = download.read(name)
        image = decoded(data, name)
        if PurePosixPath(name).parent.name == _RAW:
            file = io.BytesIO()
            preprocess(image.convert("RGB")).save(file, "JPEG")
            return {"image": file.getvalue()}
        return {"image": upright(data, image)}


def preprocess(image: Image.Image) -> Image.Image:
    """Returns a raw image as preprocessed by FLamby: shorter side 224, then Shades of Gray.

    ``e_c = (mean_p x_pc^6)^(1/6)``, ``out_pc = x_pc / (sqrt(3) e_c / |e|)``. As in FLamby's code,
    sides are rounded down, so that some images have a side of 223, and values above 255 wrap around
    to 0. Both are kept, since results are compared with those on FLamby's images.

    Args:
      image: RGB image of any size.

    Returns:
      RGB image whose shorter side is 224 or 223.

    References:
      Finlayson and Trezzi, Shades of Gray and Colour Constancy, CIC 2004; FLamby,
      ``fed_isic2019/dataset_creation_scripts``.
    """
    ratio = float(_SHORTER_SIDE) / min(image.size)
    size = int(image.width * ratio), int(image.height * ratio)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    light = np.power(np.mean(np.power(pixels, _POWER), (0, 1)), 1 / _POWER)
    light /= np.sqrt(np.sum(np.square(light)))
    with np.errstate(divide="ignore", invalid="ignore"):  # if a channel is black everywhere
        balanced = np.nan_to_num(pixels * (1 / (light * np.sqrt(np.float32(3)))))
    return Image.fromarray((balanced.astype(np.int64) % 256).astype(np.uint8))


def _check(row: dict[str, str], where: str) -> None:
    if row["target"] not in map(str, range(len(LABEL_NAMES))):
        raise UserError(f"{where}: target must be in 0..7, got {row['target']!r}")
    if row["center"] not in map(str, range(len(_SIZES))):
        raise UserError(f"{where}: center must be in 0..5, got {row['center']!r}")
    if row["fold"] not in ("train", "test"):
        raise UserError(f"{where}: fold must be train or test, got {row['fold']!r}")
