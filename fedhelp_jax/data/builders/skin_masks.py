"""Lesion masks of dermoscopy images: HAM10000, and task 1 of the ISIC 2018 challenge."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item, decoded, png, upright
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present, check_unique
from fedhelp_jax.data.builders.resumable_map import Example
from fedhelp_jax.data.readers.masks import decode_mask
from fedhelp_jax.data.readers.tables import group_of

_METADATA = ("HAM10000_metadata", "HAM10000_metadata.csv", "HAM10000_metadata.tab")
# Values of the column `dataset`, which the oldest release of the table lacks.
_SITES = ("vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias", "unknown")
_IMAGES, _MASKS = (".jpg",), ("_segmentation.png", ".png")
_ISIC2018 = {"train": "Training", "validation": "Validation", "test": "Test"}

_HAM10000_CITATION = """\
@article{tschandl2018ham10000, title={The {HAM10000} dataset, a large collection of multi-source
  dermatoscopic images of common pigmented skin lesions}, author={Tschandl, Philipp and Rosendahl,
  Cliff and Kittler, Harald}, journal={Scientific Data}, volume={5}, year={2018},
  doi={10.1038/sdata.2018.161}}"""

_ABOUT = {
    "ham10000": About(
        description="10,015 dermoscopy images of 7,470 lesions with a mask of the lesion, four "
        "sources as sites, lesions as groups, one split. A mask's greys, of which resized ones "
        "have some, are foreground above 127.",
        homepage="https://doi.org/10.7910/DVN/DBW86T",
        licence="CC BY-NC 4.0",
        citation=f"""\
{_HAM10000_CITATION}
@article{{tschandl2020human, title={{Human--computer collaboration for skin cancer recognition}},
  author={{Tschandl, Philipp and others}}, journal={{Nature Medicine}}, volume={{26}},
  pages={{1229--1234}}, year={{2020}}, doi={{10.1038/s41591-020-0942-0}}}}""",
        download="""\
One folder with, from https://doi.org/10.7910/DVN/DBW86T,
- HAM10000_images_part_1.zip and HAM10000_images_part_2.zip, or folders of these names or a folder
  images, with <image_id>.jpg;
- HAM10000_segmentations_lesion_tschandl.zip, or a folder of this name or a folder masks, with
  <image_id>_segmentation.png or <image_id>.png;
- HAM10000_metadata, also as .csv or .tab, with the columns image_id, lesion_id and, for the sites,
  dataset.
All may be in zip or tar files.""",
        sizes={"train": 10015},
    ),
    "isic2018_task1": About(
        description="3,694 dermoscopy images of the ISIC 2018 challenge with a mask of the lesion, "
        "in its three splits. Lesions are not published: each image is a group of its own.",
        homepage="https://challenge.isic-archive.com/data/#2018",
        licence="as its publisher states at the homepage",
        citation=f"""\
@article{{codella2019isic2018, title={{Skin Lesion Analysis Toward Melanoma Detection 2018: A
  Challenge Hosted by the International Skin Imaging Collaboration ({{ISIC}})}}, author={{Codella,
  Noel and others}}, journal={{arXiv:1902.03368}}, year={{2019}}}}
{_HAM10000_CITATION}""",
        download="""\
One folder with, as zip files or unpacked, from https://challenge.isic-archive.com/data/#2018,
- ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth;
- for the other splits: ISIC2018_Task1-2_Validation_Input and
  ISIC2018_Task1_Validation_GroundTruth; ISIC2018_Task1-2_Test_Input and
  ISIC2018_Task1_Test_GroundTruth.""",
        sizes={"train": 2594, "validation": 100, "test": 1000},
    ),
}


class SkinMasks(Builder):
    """Unmodified dermoscopy images with masks of the lesions at the same size."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=about.description)
        for name, about in _ABOUT.items()
    ]

    about = About(
        description="Dermoscopy images with a mask of the lesion.",
        homepage="https://www.isic-archive.com/",
        licence="HAM10000 CC BY-NC 4.0; ISIC 2018 as its publisher states",
        citation="\n".join(about.citation for about in _ABOUT.values()),
        download="\n".join(about.download for about in _ABOUT.values()),
        sizes={},
    )

    mask_names = ("lesion",)

    def __init__(self, *, config: str | tfds.core.BuilderConfig | None = None, **options: Any):
        if config is not None:
            name = config if isinstance(config, str) else config.name
            self.about = _ABOUT.get(name, self.about)
        super().__init__(config=config, **options)

    def features(self) -> dict[str, Any]:
        """Returns the features: JPEG image, mask of 0 and 255, lesion, and source (HAM10000)."""
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "group": tfds.features.Text(),
        }
        if self._is_ham10000:
            features["site"] = tfds.features.ClassLabel(names=list(_SITES))
        return features

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns HAM10000 as the split train, or the splits of ISIC 2018 in the download."""
        plan = {"train": _ham10000(download, self.say)} if self._is_ham10000 else {}
        if not self._is_ham10000:
            for split, name in _ISIC2018.items():
                items = _isic2018(download, name)
                if items:
                    plan[split] = items
                elif split == "train":
                    raise UserError(
                        f"{KEY}={download.folder}: no .jpg file in ISIC2018_Task1-2_{name}_Input"
                    )
                else:
                    self.say(f"no {split} images: left out")
            keys = [item.key for items in plan.values() for item in items]
            check_unique(keys, "image", f"{download.folder}, over all splits,")
        return plan

    def make(self, download: Download, item: Item) -> Example:
        """Returns the unmodified image, and the mask as 0 and 255."""
        name, mask_name = item.files
        data = download.read(name)
        image = decoded(data, name)
        mask = decode_mask(decoded(download.read(mask_name), mask_name), mask_name, KEY)
        if mask.shape != (image.height, image.width):
            raise UserError(
                f"{KEY}: {mask_name} is {mask.shape[1]}x{mask.shape[0]}, its image {name} "
                f"{image.width}x{image.height}"
            )
        return {"image": upright(data, image), "mask": png(mask.astype(np.uint8) * 255)}

    @property
    def _is_ham10000(self) -> bool:
        assert self.builder_config is not None
        return self.builder_config.name == "ham10000"


def _ham10000(download: Download, say: Any) -> list[Item]:
    name, rows = download.table(_METADATA, ("image_id", "lesion_id"))
    where = f"{name} in {download.folder}"
    check_unique((row["image_id"] for row in rows), "image_id", where)
    if "dataset" not in rows[0]:
        say(f"{name} has no column dataset: the site of all images is unknown")
    for number, row in enumerate(rows, start=2):
        row.setdefault("dataset", "unknown")
        said = f"{KEY}: {where} line {number} ({row['image_id']})"
        if row["dataset"] not in _SITES:
            raise UserError(
                f"{said}: dataset must be one of {', '.join(_SITES[:-1])}, got {row['dataset']!r}"
            )
    ids = sorted(row["image_id"] for row in rows)
    parts = ("HAM10000_images_part_1", "HAM10000_images_part_2")
    images = _first(download, _IMAGES, ("images",), parts)
    masks = _first(download, _MASKS, ("HAM10000_segmentations_lesion_tschandl",), ("masks",))
    check_present(images, ids, "image", download.folder)
    check_present(masks, ids, "mask", download.folder)
    more = len(images.keys() - set(ids))
    if more:
        say(f"{more} images that {name} does not name: left out")
    known = {row["image_id"]: row for row in rows}
    return [
        Item(
            i,
            (images[i], masks[i]),
            {
                "group": group_of(known[i]["lesion_id"], i),
                "site": _SITES.index(known[i]["dataset"]),
            },
        )
        for i in ids
    ]


def _isic2018(download: Download, name: str) -> list[Item]:
    images = download.by_stem(_IMAGES, f"ISIC2018_Task1-2_{name}_Input")
    masks = download.by_stem(_MASKS, f"ISIC2018_Task1_{name}_GroundTruth")
    check_present(images, sorted(masks), f"{name.lower()} image", download.folder)
    check_present(masks, sorted(images), f"{name.lower()} mask", download.folder)
    return [Item(i, (images[i], masks[i]), {"group": i}) for i in sorted(images)]


def _first(
    download: Download, suffixes: tuple[str, ...], *places: tuple[str, ...]
) -> dict[str, str]:
    """Returns the files by stem in the first of these places that has any, or else in all folders.

    The layout inside the publisher's zip files is not documented.
    """
    found = next(filter(None, (download.by_stem(suffixes, *place) for place in places)), None)
    if found is None:
        found = download.by_stem(suffixes, *{PurePosixPath(n).parent.name for n in download.names})
    return found
