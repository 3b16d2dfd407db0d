"""A public data set from a folder or zip file of images, with or without masks."""

import logging

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.readers.files import find_images, find_masks, image_ids
from fedhelp_jax.data.readers.images import existing_path, load_images, load_masks, native_images
from fedhelp_jax.data.readers.masks import check_aspects, class_masks
from fedhelp_jax.data.readers.npz import public_subset
from fedhelp_jax.data.types import PublicDataset

FOREGROUND = ("foreground",)

_KEY = "public.path"

logger = logging.getLogger(__name__)


def load_folder_public(
    path: str | None,
    num_examples: int | None,
    image_size: int,
    *,
    masks: bool,
    cache_dir: str | None,
    bad: Bad | None = None,
) -> PublicDataset:
    """Returns a public data set from a folder or zip file.

    It holds `images/<id>` and `masks/<id>` or `masks/<id>_segmentation`, with the ending of any
    picture. Masks are all of one size, of one foreground class, and have the aspect of their
    images. A subset is the same for every seed, so that a study over seeds asks the teacher once.
    Images at their native size stay in the files, and are decoded again when a teacher is asked
    about them.

    Args:
        path: `public.path`.
        num_examples: `public.num_examples`; None takes all.
        image_size: Height and width of the result.
        masks: Take the images that have a mask, and the masks as labels; else all images and no
            labels.
        cache_dir: Folder of the image cache; None takes the default.
        bad: Is told of images and masks that cannot be used; None refuses the first. Where they
            are skipped, all images are decoded, so that a subset is one of those that can be used.

    Raises:
        UserError: The folder is missing, or an image or mask is unusable, or there are too few.
    """
    bad = bad or Bad()
    source = existing_path(path, _KEY, "a folder or zip file with images/ and masks/")
    ids = image_ids(source, _KEY)
    if not ids:
        raise UserError(f"{_KEY}: {source} has no images/<id>.jpg or images/<id>.png")
    found = find_masks(source, ids, _KEY) if masks else {}
    if masks and not found:
        raise UserError(
            f"{_KEY}: {source} has no mask of its {len(ids)} images, such as masks/{ids[0]}.png "
            f"or masks/{ids[0]}_segmentation.png"
        )
    if masks and len(found) < len(ids):
        count = len(ids) - len(found)
        logger.warning("%s: %d of %d images have no mask: left out", _KEY, count, len(ids))
        ids = [image_id for image_id in ids if image_id in found]

    if not bad.skip:
        ids = [ids[place] for place in public_subset(len(ids), num_examples, source)]
    where = find_images(source, ids, _KEY)
    names = [where[image_id] for image_id in ids]
    files = [found[image_id] for image_id in ids] if masks else []
    labels: np.ndarray | None = None
    if masks:
        labels = load_masks(source, files, cache_dir=cache_dir, key=_KEY, bad=bad)
    decoded = load_images(
        source, names, image_size, hashed=True, cache_dir=cache_dir, key=_KEY, bad=bad
    )
    if labels is not None:
        check_aspects(decoded.sides, labels.shape[1:], names, files, f"{_KEY}: {source}", bad)
        labels = class_masks(labels, FOREGROUND, files, f"{_KEY}: {source}", bad)
    bad.check(len(ids), f"{_KEY}: {source}")

    def describe(place: int) -> BadExample:
        return BadExample("", "", ids[place], " ".join([names[place], *files[place : place + 1]]))

    left_out = bad.listed(describe)
    kept, sha256, images = bad.drop(names), bad.drop(decoded.sha256), bad.drop(decoded.images)
    labels = None if labels is None else bad.drop(labels)
    if bad.skip and num_examples is not None:
        chosen = public_subset(len(kept), num_examples, source)
        kept, sha256 = [kept[i] for i in chosen], tuple(sha256[i] for i in chosen)
        images, labels = images[chosen], None if labels is None else labels[chosen]
    return PublicDataset(
        name=source.stem,
        synthetic=False,
        images=images,
        labels=labels,
        label_names=FOREGROUND if masks else None,
        sha256=sha256,
        originals=native_images(source, kept, _KEY),
        left_out=left_out,
    )
