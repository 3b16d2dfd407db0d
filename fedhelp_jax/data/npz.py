"""Images and labels from .npz files, as a public data set or for `medmnist`."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.data.images import existing_path, resize_arrays
from fedhelp_jax.data.partition import rng_for
from fedhelp_jax.data.types import PublicDataset, image_sha256
from fedhelp_jax.errors import UserError

_READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

# By the file name up to the first "_" (pneumoniamnist_64.npz): MedMNIST files hold no names.
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


def read_npz(
    path: Path, key: str, endings: tuple[str, ...] = _IMAGES_AND_LABELS
) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file whose names end so.

    Args:
        path: The file.
        key: The configuration key that names it, for messages.
        endings: Ends of names; other arrays may be large, and stay unread.

    Raises:
        UserError: The file is damaged, holds pickled objects, or is no .npz file.
    """
    try:
        # Opened here: np.load leaves a damaged file open.
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
        name: Which of them.
        where: Key and file, for messages.

    Raises:
        UserError: The array is missing, or of another type or shape.
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


def take_labels(arrays: dict[str, np.ndarray], name: str, count: int, where: str) -> np.ndarray:
    """Returns the labels stored as `name`: int32 [count], from integers [count] or [count, 1].

    Args:
        arrays: The file's arrays.
        name: Which of them.
        count: Number of images.
        where: Key and file, for messages.

    Raises:
        UserError: The array is missing, of another type or shape, or holds a negative number.
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
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{where}: {name} holds {bad}; labels count from 0")
    return labels.astype(np.int32)


def name_labels(
    path: Path, labels: np.ndarray, where: str, stored: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Returns the classes' names: those stored, those known for the file, or "0", "1", ...

    Args:
        path: The file, whose name tells which data set it is.
        labels: int [N], not negative.
        where: Key and file, for messages.
        stored: Names the file holds itself.

    Raises:
        UserError: A label has no name.
    """
    names = stored or LABEL_NAMES.get(path.stem.lower().split("_")[0])
    highest = int(labels.max())
    if names is None:
        return tuple(str(number) for number in range(highest + 1))
    if highest >= len(names):
        raise UserError(
            f"{where}: label {highest} is out of range; "
            f"the {len(names)} classes are 0..{len(names) - 1}"
        )
    return tuple(str(name) for name in names)


def load_npz_public(path: str | None, num_examples: int | None, image_size: int) -> PublicDataset:
    """Returns a public data set from an .npz file.

    The file has `images`, maybe `labels`, and maybe `label_names` or `fine_label_names`; or the
    keys of MedMNIST (`train_images`, ...), whose splits are joined: public images serve for
    training only. A subset is the same for every seed, so that a study over seeds asks the
    teacher once.

    Args:
        path: `public.path`.
        num_examples: `public.num_examples`; None takes all.
        image_size: Height and width of the result.

    Raises:
        UserError: The file is missing or not as described, or has too few images.
    """
    file = existing_path(path, "public.path", "an .npz file with images")
    arrays = read_npz(file, "public.path")
    where = f"public.path: {file}"
    splits = [part for part in ("train", "val", "test") if f"{part}_images" in arrays]
    prefixes = [f"{part}_" for part in splits] if splits and "images" not in arrays else [""]
    parts = [take_images(arrays, f"{prefix}images", where) for prefix in prefixes]
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    images = np.concatenate(parts)

    labels = label_names = None
    if any(f"{prefix}labels" in arrays for prefix in prefixes):
        labels = np.concatenate(
            [
                take_labels(arrays, f"{prefix}labels", len(part), where)
                for prefix, part in zip(prefixes, parts, strict=True)
            ]
        )
        stored = arrays.get("label_names", arrays.get("fine_label_names"))
        label_names = name_labels(file, labels, where, _names(stored, where))

    if num_examples is not None:
        if not 1 <= num_examples <= len(images):
            raise UserError(
                f"public.num_examples must be in 1..{len(images)} for {file}, got {num_examples}"
            )
        # The first of one order, so that asking for more images asks about the new ones only.
        chosen = np.sort(rng_for(0, "public subset").permutation(len(images))[:num_examples])
        images = images[chosen]
        labels = None if labels is None else labels[chosen]
    return PublicDataset(
        name=file.stem,
        synthetic=False,
        images=resize_arrays(images, image_size),
        labels=labels,
        label_names=label_names,
        sha256=tuple(image_sha256(image) for image in images),
        originals=images,
    )


def _names(stored: np.ndarray | None, where: str) -> tuple[str, ...] | None:
    if stored is None:
        return None
    if stored.ndim != 1 or stored.dtype.kind not in "US":
        raise UserError(f"{where}: label names must be a list of strings")
    if stored.dtype.kind == "S":
        return tuple(name.decode() for name in stored.tolist())
    return tuple(stored.tolist())
