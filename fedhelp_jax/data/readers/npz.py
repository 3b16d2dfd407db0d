"""Images and labels from .npz files, for public data sets and for `medmnist`."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.fractions import rng_for
from fedhelp_jax.data.readers.images import existing_path, resize_arrays
from fedhelp_jax.data.readers.masks import stored_names, take_masks
from fedhelp_jax.data.readers.volumes import resize_volumes
from fedhelp_jax.data.types import PublicDataset, image_sha256

_READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

# Class names by the file name up to the first "_" (pneumoniamnist_64.npz), since MedMNIST files do
# not contain them.
LABEL_NAMES = {
    "pneumoniamnist": ("normal", "pneumonia"),
    "pathmnist": (
        "adipose",
        "background",
        "debris",
        "lymphocytes",
        "mucus",
        "smooth muscle",
        "normal colon mucosa",
        "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    ),
}

_IMAGES_AND_LABELS = ("images", "labels", "label_names")
WITH_MASKS = ("images", "volumes", "masks", "labels", "names", "site")


def read_npz(
    path: Path, key: str, endings: tuple[str, ...] = _IMAGES_AND_LABELS
) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file whose names end with one of `endings`.

    Args:
        path: The file.
        key: The configuration key that names it, for messages.
        endings: Ends of names. Other arrays may be large and are not read.

    Raises:
        UserError: The file is damaged, holds pickled objects, or is not an .npz file.
    """
    try:
        # The file is opened here because np.load leaves a damaged file open.
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            wanted = [name for name in stored.files if name.endswith(endings)]
            return {name: stored[name] for name in wanted}
    except _READ_ERRORS as error:
        raise UserError(f"{key}: {path} cannot be read as an .npz file without pickles") from error


def take_images(arrays: dict[str, np.ndarray], name: str, where: str) -> np.ndarray:
    """Returns the images stored as `name`: uint8 [N, H, W] or [N, H, W, 1 or 3].

    Args:
        arrays: The file's arrays.
        name: Name of the array.
        where: Key and file, for messages.

    Raises:
        UserError: The array is missing, or has another type or shape.
    """
    if name not in arrays:
        raise UserError(f"{where} has no array {name!r}; it has {sorted(arrays) or 'none'}")
    images = arrays[name]
    if images.dtype != np.uint8:
        raise UserError(f"{where}: {name} must be uint8, got {images.dtype}")
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] in (1, 3)
    if not (grey or colour) or 0 in images.shape:
        raise UserError(
            f"{where}: {name} must be [N, H, W] or [N, H, W, 3] and not empty, "
            f"got shape {images.shape}"
        )
    return images


def take_labels(
    arrays: dict[str, np.ndarray], name: str, count: int, where: str, bad: Bad | None = None
) -> np.ndarray:
    """Returns the labels stored as `name`: int32 [count], from integers [count] or [count, 1].

    Args:
        arrays: The file's arrays.
        name: Name of the array.
        count: Number of images.
        where: Key and file, for messages.
        bad: Collects labels that are negative or exceed 32 bits, which become 0 in the result; None
            raises an error for the first.

    Raises:
        UserError: The array is missing, has another type or shape, or holds a negative number.
    """
    if name not in arrays:
        raise UserError(f"{where} has no array {name!r}; it has {sorted(arrays) or 'none'}")
    labels = arrays[name]
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: {name} must be integers, got {labels.dtype}")
    if labels.shape not in ((count,), (count, 1)):
        raise UserError(
            f"{where}: {name} must be one label per image, shape [{count}] or [{count}, 1], "
            f"got {labels.shape}"
        )
    labels = labels.reshape(-1)
    wrong = (labels < 0) | (labels > np.iinfo(np.int32).max)
    bad = bad or Bad()
    for place in np.flatnonzero(wrong).tolist():
        said = f"{where}: {name} holds {labels[place]}; labels count from 0"
        bad.found(place, UserError(said))
    return np.where(wrong, 0, labels).astype(np.int32)


def name_labels(
    path: Path,
    labels: np.ndarray,
    where: str,
    stored: Sequence[str] | None = None,
    bad: Bad | None = None,
) -> tuple[str, ...]:
    """Returns the classes' names: those stored, those known for the file, or "0", "1", ...

    Args:
        path: The file, whose name identifies the data set.
        labels: int [N], nonnegative.
        where: Key and file, for messages.
        stored: Names stored in the file.
        bad: Collects labels without a name; None raises an error for the first.

    Raises:
        UserError: A label has no name.
    """
    names = stored or LABEL_NAMES.get(path.stem.lower().split("_")[0])
    bad = bad or Bad()
    if names is None:
        return tuple(str(number) for number in range(int(bad.drop(labels).max(initial=0)) + 1))
    for place in np.flatnonzero(labels >= len(names)).tolist():
        said = f"{where}: label {labels[place]} is out of range"
        bad.found(place, UserError(f"{said}; the {len(names)} classes are 0..{len(names) - 1}"))
    return tuple(str(name) for name in names)


def take_pictures(arrays: dict[str, np.ndarray], where: str) -> tuple[np.ndarray, bool]:
    """Returns the `images` or the `volumes` of a file, and whether they are volumes.

    Args:
        arrays: The file's arrays.
        where: Key and file, for messages.

    Returns:
        Images as in `take_images`, or volumes, uint8 [N, D, H, W]; and True for volumes.

    Raises:
        UserError: The file has neither or both, or they have another type or shape.
    """
    if ("images" in arrays) == ("volumes" in arrays):
        held = sorted(arrays) or "none"
        raise UserError(f"{where} must have one array images or volumes; it has {held}")
    if "images" in arrays:
        return take_images(arrays, "images", where), False
    volumes = arrays["volumes"]
    if volumes.dtype != np.uint8:
        raise UserError(f"{where}: volumes must be uint8, got {volumes.dtype}")
    if volumes.ndim != 4 or 0 in volumes.shape:
        raise UserError(
            f"{where}: volumes must be [N, D, H, W] and not empty, got shape {volumes.shape}"
        )
    return volumes, True


def public_subset(count: int, num_examples: int | None, source: Path) -> np.ndarray:
    """Returns which of `count` public images to use: sorted indices, the same for every seed.

    They are the first ones in a fixed random order, so that a larger subset contains a smaller one
    and a teacher is queried only for the new images.

    Args:
        count: Number of available images.
        num_examples: `public.num_examples`; None means all.
        source: Where the images are, for the message.

    Raises:
        UserError: There are fewer images than requested.
    """
    if num_examples is None:
        return np.arange(count)
    if not 1 <= num_examples <= count:
        raise UserError(
            f"public.num_examples must be in 1..{count} for {source}, got {num_examples}"
        )
    return np.sort(rng_for(0, "public subset").permutation(count)[:num_examples])


def load_npz_public(
    path: str | None,
    num_examples: int | None,
    image_size: int,
    *,
    masks: bool = False,
    volume_size: tuple[int, ...] | None = None,
    bad: Bad | None = None,
) -> PublicDataset:
    """Returns a public data set from an .npz file.

    The file has `images` and optionally `labels` and `label_names` or `fine_label_names`; or the
    keys of MedMNIST (`train_images`, ...), whose splits are joined, since public images are used
    only for training. With `masks`, the file has `images` or `volumes`, and optionally the arrays
    that `take_masks` reads. A subset is the same for every seed, so that a study over seeds queries
    the teacher only once.

    Args:
        path: `public.path`.
        num_examples: `public.num_examples`; None means all.
        image_size: Height and width of the result.
        masks: Whether labels are masks.
        volume_size: Sides of the result if it is volumes; None keeps their sizes.
        bad: Collects labels and masks that cannot be used; None raises an error for the first.

    Raises:
        UserError: The file is missing or not as described, or has too few images.
    """
    bad = bad or Bad()
    file = existing_path(path, "public.path", "an .npz file with images")
    where = f"public.path: {file}"
    arrays = read_npz(file, "public.path", WITH_MASKS if masks else _IMAGES_AND_LABELS)
    volumes, label_names = False, None
    if masks:
        images, volumes = take_pictures(arrays, where)
        taken = take_masks(arrays, file, len(images), volumes=volumes, where=where, bad=bad)
        labels, label_names = taken or (None, None)
    else:
        images, labels = _take_all(arrays, where, bad)
        if labels is not None:
            key = "label_names" if "label_names" in arrays else "fine_label_names"
            label_names = name_labels(file, labels, where, stored_names(arrays, key, where), bad)
    bad.check(len(images), where)
    left_out = bad.listed(lambda i: BadExample("", "", f"example {i}", file.name))
    images, labels = bad.drop(images), None if labels is None else bad.drop(labels)

    if num_examples is not None:
        chosen = public_subset(len(images), num_examples, file)
        images = images[chosen]
        labels = None if labels is None else labels[chosen]
    if volumes:
        resized = resize_volumes(images, volume_size or images.shape[1:])
    else:
        resized = resize_arrays(images, image_size)
    return PublicDataset(
        name=file.stem,
        synthetic=False,
        images=resized,
        labels=labels,
        label_names=label_names,
        sha256=tuple(image_sha256(image) for image in images),
        originals=images,
        left_out=left_out,
    )


def _take_all(
    arrays: dict[str, np.ndarray], where: str, bad: Bad
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns images and, if there are any, labels; for MedMNIST, those of all splits."""
    splits = [part for part in ("train", "val", "test") if f"{part}_images" in arrays]
    prefixes = [f"{part}_" for part in splits] if splits and "images" not in arrays else [""]
    parts = [take_images(arrays, f"{prefix}images", where) for prefix in prefixes]
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    images = np.concatenate(parts)
    if not any(f"{prefix}labels" in arrays for prefix in prefixes):
        return images, None
    counts = {f"{prefix}labels": len(part) for prefix, part in zip(prefixes, parts, strict=True)}
    return images, take_all_labels(arrays, counts, where, bad)


def take_all_labels(
    arrays: dict[str, np.ndarray], counts: Mapping[str, int], where: str, bad: Bad
) -> np.ndarray:
    """Returns the concatenation of several arrays of labels, each read by `take_labels`.

    Args:
        arrays: The file's arrays.
        counts: The number of images of each array of labels, by its name.
        where: Key and file, for messages.
        bad: As in `take_labels`.
    """
    labels, first = [], 0
    for name, count in counts.items():
        part = Bad(bad.skip)
        labels.append(take_labels(arrays, name, count, where, part))
        bad.add(part, first)
        first += count
    return np.concatenate(labels)
