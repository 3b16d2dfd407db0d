"""Masks of the lungs in chest radiographs from two hospitals: Shenzhen and Montgomery County."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.base import About, Builder, Item, png
from fedhelp_jax.data.builders.downloads import KEY, Download, check_present
from fedhelp_jax.data.builders.radiographs import grey, grey_png
from fedhelp_jax.data.builders.resumable_map import Example

_SITES = {"CHNCXR": "shenzhen", "MCUCXR": "montgomery"}
_NAME = re.compile(r"(CHNCXR|MCUCXR)_\d{4}_([01])")


class LungMasks(Builder):
    """Chest radiographs with lung masks and tuberculosis labels, with one client per hospital."""

    about = About(
        description="704 frontal chest radiographs of the tuberculosis sets of Shenzhen No.3 "
        "People's Hospital (566 of its 662, those with a mask) and of Montgomery County (138), "
        "with masks of both lungs, and whether tuberculosis was found. Montgomery's masks are the "
        "left and the right lung's merged; every pixel that is not 0 in a file is lung. There is "
        "no official split.",
        homepage="https://lhncbc.nlm.nih.gov/LHC-publications/pubs/"
        "TuberculosisChestXrayImageDataSets.html",
        licence="images and Montgomery's masks: see homepage; Shenzhen's masks: CC BY-NC-SA 4.0 "
        "by other accounts, see https://www.kaggle.com/datasets/yoctoman/shcxr-lung-mask",
        citation="""\
@article{jaeger2014two, title={Two public chest {X}-ray datasets for computer-aided screening of
  pulmonary diseases}, author={Jaeger, Stefan and Candemir, Sema and Antani, Sameer and
  W{\\'a}ng, Yi-Xiang J. and Lu, Pu-Xuan and Thoma, George}, journal={Quantitative Imaging in
  Medicine and Surgery}, volume={4}, number={6}, pages={475--477}, year={2014}}
@article{jaeger2014automatic, title={Automatic Tuberculosis Screening Using Chest Radiographs},
  author={Jaeger, Stefan and others}, journal={IEEE Transactions on Medical Imaging}, volume={33},
  number={2}, pages={233--245}, year={2014}}
@article{candemir2014lung, title={Lung Segmentation in Chest Radiographs Using Anatomical Atlases
  With Nonrigid Registration}, author={Candemir, Sema and others}, journal={IEEE Transactions on
  Medical Imaging}, volume={33}, number={2}, pages={577--590}, year={2014}}
@article{stirenko2018chest, title={Chest {X}-Ray Analysis of Tuberculosis by Deep Learning with
  Segmentation and Augmentation}, author={Stirenko, Sergii and others},
  journal={arXiv:1803.01199}, year={2018}}""",
        download="""\
One folder with, in zip files or unpacked,
- ChinaSet_AllFiles/CXR_png/<image>.png
  (https://openi.nlm.nih.gov/imgs/collections/ChinaSet_AllFiles.zip);
- mask/<image>_mask.png or masks/<image>_mask.png, Shenzhen's masks, which are not in that file
  (https://www.kaggle.com/datasets/yoctoman/shcxr-lung-mask);
- MontgomerySet/CXR_png/<image>.png, and MontgomerySet/ManualMask/leftMask/<image>.png and
  MontgomerySet/ManualMask/rightMask/<image>.png
  (http://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip).
The images of one hospital are enough. Masks of Montgomery that are merged already may stand in
mask or masks too.""",
        sizes={"train shenzhen": 566, "train montgomery": 138},
    )

    mask_names = ("lung",)

    part_size = 16  # radiographs take several megabytes each

    def features(self) -> dict[str, Any]:
        """Returns the features: a grey PNG image, its mask of 0 and 255, hospital, tb and group."""
        return {
            "image": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "site": tfds.features.ClassLabel(names=list(_SITES.values())),
            "tb": tfds.features.ClassLabel(names=["normal", "tuberculosis"]),
            "group": tfds.features.Text(),
        }

    def plan(self, download: Download) -> Mapping[str, Sequence[Item]]:
        """Returns all images with a mask as one split."""
        images = download.by_stem((".png",), "CXR_png")
        if not images:
            raise UserError(f"{KEY}={download.folder}: there is no .png in any folder CXR_png")
        masks = _masks(download)
        for prefix in _SITES:
            # Masks of a hospital whose images were not downloaded are ignored.
            if any(stem.startswith(prefix) for stem in images):
                wanted = sorted(stem for stem in masks if stem.startswith(prefix))
                check_present(images, wanted, f"{_SITES[prefix]} image", download.folder)
        items, without = [], []
        for stem, place in sorted(images.items()):
            matched = _NAME.fullmatch(stem)
            if matched is None:
                raise UserError(
                    f"{KEY}: {place} in {download.folder} must be called CHNCXR_ or MCUCXR_, four "
                    "digits, and _0.png or _1.png"
                )
            if stem not in masks:
                without.append(stem)
                continue
            fields = {
                "site": list(_SITES).index(matched[1]),
                "tb": int(matched[2]),
                "group": stem,
            }
            items.append(Item(stem, (place, *masks[stem]), fields))
        if not items:
            raise UserError(
                f"{KEY}={download.folder}: none of {len(images)} images has a mask; Shenzhen's "
                "must lie in a folder mask or masks, Montgomery's in leftMask and rightMask"
            )
        for prefix, site in _SITES.items():
            total, lack = (sum(s.startswith(prefix) for s in stems) for stems in (images, without))
            if lack:
                self.say(f"{lack} of {total} images of {site} have no mask: left out")
            if not total:
                self.say(f"no image of {site}")
        return {"train": items}

    def make(self, download: Download, item: Item) -> Example:
        """Returns the image and the union of its masks."""
        place, *places = item.files
        data, image = grey_png(download.read(place), place)
        mask = np.zeros((image.height, image.width), bool)
        for name in places:
            stored = grey(download.read(name), name)
            if stored.size != image.size:
                raise UserError(
                    f"{KEY}: the mask {name} is {stored.width}x{stored.height}, its image {place} "
                    f"{image.width}x{image.height}"
                )
            levels = [level for level, count in enumerate(stored.histogram()) if count]
            if len([level for level in levels if level]) > 1:
                said = ", ".join(map(str, levels[:5])) + (", ..." if len(levels) > 5 else "")
                raise UserError(
                    f"{KEY}: the mask {name} must have 0 and one other value, has {said}"
                )
            mask |= np.asarray(stored) > 0
        return {"image": data, "mask": png(np.where(mask, np.uint8(255), np.uint8(0)))}


def _masks(download: Download) -> dict[str, tuple[str, ...]]:
    """Returns the mask files of each image, by the image's name without suffix."""
    masks: dict[str, tuple[str, ...]] = {}
    for stem, place in download.by_stem((".png",), "mask", "masks").items():
        image = stem.removesuffix("_mask")
        if image in masks:
            raise UserError(f"{KEY}: {masks[image][0]} and {place} are both masks of {image}")
        masks[image] = (place,)
    left, right = (download.by_stem((".png",), side) for side in ("leftMask", "rightMask"))
    for stem in sorted(left.keys() | right.keys()):
        if stem not in left or stem not in right:
            present, absent = ("right", "left") if stem in right else ("left", "right")
            raise UserError(
                f"{KEY}={download.folder}: {stem} has a mask in {present}Mask, but none in "
                f"{absent}Mask"
            )
        masks[stem] = (left[stem], right[stem])
    return masks
