"""NCT-CRC-HE-100K and CRC-VAL-HE-7K: tiles of colorectal tissue in nine classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item, decoded, png
from fedhelp_jax.data.builders.downloads import KEY, Download
from fedhelp_jax.data.builders.resumable_map import Example

_FOLDERS = {"train": "NCT-CRC-HE-100K", "test": "CRC-VAL-HE-7K"}
_SPLITS = {
    **{folder: split for split, folder in _FOLDERS.items()},
    "NCT-CRC-HE-100K-NONORM": None,
}
# In the order of the labels, as in PathMNIST.
_CLASSES = {
    "ADI": "adipose",
    "BACK": "background",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal colon mucosa",
    "STR": "cancer-associated stroma",
    "TUM": "colorectal adenocarcinoma epithelium",
}
_SIDE = 224


class NctCrcHe(Builder):
    """Colour-normalised tiles of colorectal tissue in nine classes; test patients are different."""

    about = About(
        description="107,180 tiles of 224x224 pixels at 0.5 um of colorectal cancer and healthy "
        "tissue, stained with haematoxylin and eosin and colour-normalised, in nine classes. Train "
        "is NCT-CRC-HE-100K, test is CRC-VAL-HE-7K, of 50 other patients. Which tiles are of one "
        "patient is not published.",
        homepage="https://zenodo.org/records/1214456",
        licence="CC BY 4.0 by most accounts, see homepage",
        citation="""\
@article{kather2019predicting, title={Predicting survival from colorectal cancer histology slides
  using deep learning: A retrospective multicenter study}, author={Kather, Jakob Nikolas and
  Krisam, Johannes and Charoentong, Pornpimol and others}, journal={PLOS Medicine}, volume={16},
  number={1}, pages={e1002730}, year={2019}}
@misc{kather2018histological, title={100,000 histological images of human colorectal cancer and
  healthy tissue}, author={Kather, Jakob Nikolas and Halama, Niels and Marx, Alexander},
  howpublished={Zenodo}, doi={10.5281/zenodo.1214456}, year={2018}}""",
        download="""\
One folder with, from https://zenodo.org/records/1214456, as zip files or unpacked,
- NCT-CRC-HE-100K.zip: NCT-CRC-HE-100K/<class>/<image>.tif, for train;
- CRC-VAL-HE-7K.zip: CRC-VAL-HE-7K/<class>/<image>.tif, for test;
with the classes ADI, BACK, DEB, LYM, MUC, MUS, NORM, STR and TUM. Either is enough for its split.
NCT-CRC-HE-100K-NONORM is another set, and is not read.""",
        sizes={"train": 100_000, "test": 7_180},
    )

    def features(self) -> dict[str, Any]:
        """Returns the features: a PNG image and its class."""
        return {
            "image": tfds.features.Image(shape=(_SIDE, _SIDE, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(_CLASSES.values())),
        }

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns the tiles of each folder; a missing folder is left out."""
        tiles: dict[str, dict[str, str]] = {split: {} for split in _FOLDERS}
        seen: dict[str, str] = {}
        for name in sorted(download.names):
            *parents, file = name.split("/")
            # The innermost folder counts: a data set may be inside a folder named like another one.
            split = next((_SPLITS[f] for f in reversed(parents) if f in _SPLITS), None)
            if split is None or not file.lower().endswith(".tif"):
                continue
            if parents[-1] not in _CLASSES:
                raise UserError(
                    f"{KEY}: {name} in {download.folder} must lie in a folder of one of the "
                    f"classes {', '.join(_CLASSES)}"
                )
            stem = file[: -len(".tif")]
            if stem in seen:
                raise UserError(f"{KEY}: {seen[stem]} and {name} are both called {stem}")
            seen[stem] = tiles[split][stem] = name
        if not seen:
            raise UserError(
                f"{KEY}={download.folder}: there is no .tif in any folder "
                f"{' or '.join(_FOLDERS.values())}"
            )
        items: dict[str, list[Item]] = {}
        for split, names in tiles.items():
            if not names:
                self.say(f"no {_FOLDERS[split]}: no {split} images")
                continue
            classes = {stem: place.split("/")[-2] for stem, place in names.items()}
            absent = [name for name in _CLASSES if name not in classes.values()]
            if absent:
                raise UserError(
                    f"{KEY}={download.folder}: {_FOLDERS[split]} has no image of "
                    f"{', '.join(absent)}"
                )
            items[split] = [
                Item(stem, (names[stem],), {"label": list(_CLASSES).index(classes[stem])})
                for stem in sorted(names)
            ]
        return items

    def make(self, download: Download, item: Item) -> Example:
        """Returns the tile as a PNG file."""
        (name,) = item.files
        image = decoded(download.read(name), name)
        if image.size != (_SIDE, _SIDE):
            raise UserError(
                f"{KEY}: {name} must be {_SIDE}x{_SIDE}, is {image.width}x{image.height}"
            )
        return {"image": png(np.asarray(image.convert("RGB")))}
