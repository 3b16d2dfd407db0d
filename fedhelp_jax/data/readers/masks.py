"""Decodes and checks masks, the class of each pixel or voxel, from the encodings files use."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad

# A binary mask that was resized has greys only along its border. None of the 10,015 masks of
# HAM10000 at 200x150 has more than 2 % of them.
_MAX_GREY = 0.1
_GREYS = range(32, 224)
_GREY_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")

# Masks with more classes than this are taken for grey pictures, unless the classes have names.
_MAX_UNNAMED = 32

# Name of the foreground class if the file does not state it, by the file name up to the first "_".
_NAMES = {"lung": ("lung",)}

logger = logging.getLogger(__name__)


def stored_values(stored: np.ndarray, where: str) -> list[int]:
    """Returns the sorted values that occur in masks.

    Args:
        stored: Integers or bools, of any shape.
        where: Key, file and array, for messages.

    Raises:
        UserError: The masks have another type.
    """
    if stored.dtype.kind not in "biu":
        raise UserError(f"{where} must be integers or bools, got {stored.dtype}")
    if stored.dtype.itemsize > 1 or not stored.size:
        return [int(value) for value in np.unique(stored)]
    stored = stored.view(np.uint8) if stored.dtype == bool else stored
    low, high = int(stored.min()), int(stored.max())
    if high - low <= 1:
        return sorted({low, high})
    # Counted row by row, since sorting hundreds of megabytes takes seconds.
    counts = np.zeros(high - low + 1, np.int64)
    for row in stored.reshape(len(stored), -1):
        counts += np.bincount(row.astype(np.int16) - low, minlength=len(counts))
    return [low + value for value in np.flatnonzero(counts).tolist()]


def class_masks(
    stored: np.ndarray,
    label_names: Sequence[str],
    names: Sequence[str],
    where: str,
    bad: Bad | None = None,
) -> np.ndarray:
    """Returns the class of each pixel, uint8 [N, *mask].

    Args:
        stored: Integers or bools [N, *mask]. Masks of one foreground class all hold 0 and 1, or all
            hold 0 and 255. Masks of C >= 2 classes hold 0..C-1, where 0 is the background.
        label_names: One name for one foreground class; otherwise a name per class.
        names: [N] name of each mask, for messages.
        where: Key, file and optionally array, for messages.
        bad: Collects masks that hold another value; None raises an error for the first. Masks that
            are already known to be bad are ignored.

    Raises:
        UserError: The type, the number of masks or a value is not as described, or no mask has any
            foreground. If only some masks have none, a warning is logged.
    """
    bad = bad or Bad()
    bad.check(len(stored), where)
    values = stored_values(bad.drop(stored), where)
    if stored.ndim < 2 or len(stored) != len(names) or not stored.size:
        raise UserError(f"{where}: expected {len(names)} masks, got the shape {stored.shape}")
    if len(label_names) > 1:
        # Masks are always stored as uint8.
        allowed = range(min(len(label_names), 256))
        right = f"0..{allowed[-1]}"
    else:
        allowed = _foreground_values(bad.drop(stored), values, bad)
        right = f"0 and {allowed[-1]}"
    others = [value for value in values if value not in allowed]
    if others:
        kind = "one foreground class" if len(label_names) == 1 else f"{len(label_names)} classes"
        for place, mask in enumerate(stored):
            held = mask[np.isin(mask, others)]
            if held.size and place not in bad.reasons:
                said = f"{where}: mask {names[place]} holds {int(held[0])}"
                bad.found(place, UserError(f"{said}; masks of {kind} hold {right}"))
        bad.check(len(stored), where)
        values = stored_values(bad.drop(stored), where)
    unseen = [label_names[c] for c in range(len(label_names)) if c not in values]
    if len(label_names) > 1 and unseen:
        logger.warning("%s: no mask shows %s", where, ", ".join(unseen))
    masks = stored.astype(np.uint8, copy=False)
    if len(label_names) == 1 and 255 in values:
        masks = (masks != 0).view(np.uint8)
    empty = masks.reshape(len(masks), -1).max(axis=1) == 0
    empty[list(bad.reasons)] = False
    used, number = len(masks) - len(bad.reasons), np.count_nonzero(empty)
    if number == used:
        raise UserError(f"{where}: all {used} masks are empty")
    if number:
        logger.warning(
            "%s: %d of %d masks are empty, the first is %s",
            where,
            number,
            used,
            names[int(empty.argmax())],
        )
    return masks


def _foreground_values(stored: np.ndarray, values: Sequence[int], bad: Bad) -> tuple[int, int]:
    """Returns background and foreground of masks of one class: 0 and 255, or 0 and 1.

    The result is 0 and 255 if any mask holds 255. If bad masks are skipped, it is whichever pair
    fits more masks.
    """
    ways = (0, 255), (0, 1)
    if 255 not in values:
        return ways[1]
    if not bad.skip or set(values) <= set(ways[0]):
        return ways[0]
    return max(ways, key=lambda way: sum(bool(np.isin(mask, way).all()) for mask in stored))


def same_aspect(one: Sequence[int], other: Sequence[int]) -> bool:
    """Returns whether two sizes have the same aspect ratio, up to rounding of each side.

    Args:
        one: Sides of an image or volume, in pixels or voxels.
        other: Sides of another one of the same dimension.

    >>> same_aspect((450, 600), (150, 200)), same_aspect((224, 299), (768, 1024))
    (True, True)
    >>> same_aspect((60, 40), (40, 60))
    False
    """
    pairs = itertools.combinations(zip(one, other, strict=True), 2)
    longest = max(one) + max(other)
    return all(abs(a * d - b * c) <= longest for (a, b), (c, d) in pairs)


def check_aspects(
    sides: np.ndarray,
    mask: Sequence[int],
    names: Sequence[str],
    masks: Sequence[str],
    where: str,
    bad: Bad,
) -> None:
    """Checks that every image has the aspect ratio of its mask.

    Images are stretched to squares, so that otherwise they would not match their masks.

    Args:
        sides: int [n, 2] height and width of each image.
        mask: Height and width of all masks.
        names: [n] names of the images.
        masks: [n] names of the masks.
        where: Key and source, for messages.
        bad: Collects images with another aspect ratio.

    Raises:
        UserError: An image has another aspect ratio, and bad examples are not skipped.
    """
    for place, (image, name, mask_name) in enumerate(
        zip(sides.tolist(), names, masks, strict=True)
    ):
        if place not in bad.reasons and not same_aspect(image, mask):
            said = (
                f"{where}: mask {mask_name} is {mask[1]}x{mask[0]}, but its image {name} is "
                f"{image[1]}x{image[0]}, of another aspect"
            )
            bad.found(place, UserError(said))


def unnamed_classes(
    values: list[int], foreground: tuple[str, ...], where: str, names: str
) -> tuple[str, ...]:
    """Returns default names of unnamed classes: `foreground`, or "background", "1", ...

    Args:
        values: The sorted values of the masks.
        foreground: The name of a single foreground class.
        where: The masks, for the message.
        names: What would name the classes, for the message.

    Raises:
        UserError: The values are neither 0 and 1, nor 0 and 255, nor 0, 1, 2, ... without a gap.
    """
    if set(values) <= {0, 1} or set(values) == {0, 255}:
        return foreground
    if values == list(range(len(values))) and len(values) <= _MAX_UNNAMED:
        return ("background", *(str(value) for value in values[1:]))
    raise UserError(
        f"{where} hold the values {str(values[:8])[1:-1]}{', ...' if len(values) > 8 else ''}; "
        f"without {names} they must hold 0 and 1, 0 and 255, or 0, 1, 2, ... without a gap, at "
        f"most {_MAX_UNNAMED - 1}"
    )


def take_masks(
    arrays: dict[str, np.ndarray], path: Path, count: int, *, volumes: bool, where: str, bad: Bad
) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Returns the `masks` or `labels`, uint8 [N, *mask], and the classes' names.

    The names are those stored as `label_names`. Without these, binary masks have the name known for
    the file or "foreground", and other masks have "background", "1", "2", ...

    Args:
        arrays: The file's arrays.
        path: The file, whose name identifies the data set.
        count: Number of images or volumes.
        volumes: Whether they are volumes.
        where: Key and file, for messages.
        bad: As in `class_masks`.

    Returns:
        Masks and names, or None if the file has no masks or only one label per image.

    Raises:
        UserError: The masks have an unsupported type or shape, or hold unsupported values.
    """
    name = "masks" if "masks" in arrays else "labels"
    stored = arrays.get(name)
    if stored is None or (name == "labels" and stored.shape in ((count,), (count, 1))):
        return None
    pictures = arrays["volumes" if volumes else "images"]
    axes = "[N, D, H, W]" if volumes else "[N, H, W]"
    if stored.ndim != (4 if volumes else 3) or len(stored) != count or not stored.size:
        raise UserError(
            f"{where}: {name} must be one mask for each of {count} "
            f"{'volumes' if volumes else 'images'}, {axes}, got shape {stored.shape}"
        )
    if not same_aspect(stored.shape[1:], pictures.shape[1 : stored.ndim]):
        raise UserError(
            f"{where}: {name} of shape {stored.shape} are of another aspect than their "
            f"{'volumes' if volumes else 'images'} of shape {pictures.shape}"
        )
    label_names = stored_names(arrays, "label_names", where)
    if label_names is None:
        values = stored_values(stored, f"{where}: {name}")
        foreground = _NAMES.get(path.stem.lower().split("_")[0], ("foreground",))
        label_names = unnamed_classes(values, foreground, f"{where}: {name}", "label_names")
    elif not label_names or len(set(label_names)) < len(label_names):
        raise UserError(f"{where}: label_names must be different names, got {label_names}")
    names = stored_names(arrays, "names", where)
    if names is None:
        names = tuple(f"of example {number}" for number in range(count))
    elif len(names) != count:
        raise UserError(f"{where}: names must be {count} names, got {len(names)}")
    return class_masks(stored, label_names, names, f"{where}: {name}", bad), label_names


def stored_names(arrays: dict[str, np.ndarray], name: str, where: str) -> tuple[str, ...] | None:
    """Returns the names stored as `name`, or None.

    Raises:
        UserError: The array is not a list of strings.
    """
    stored = arrays.get(name)
    if stored is None:
        return None
    if stored.ndim != 1 or stored.dtype.kind not in "US":
        raise UserError(f"{where}: {name.replace('_', ' ')} must be a list of strings")
    if stored.dtype.kind == "S":
        return tuple(name.decode() for name in stored.tolist())
    return tuple(stored.tolist())


def decode_mask(image: Image.Image, name: str, where: str) -> np.ndarray:
    """Returns the foreground of a mask stored as a picture of one foreground class, bool [H, W].

    The picture is black and white, as 0 and 1 or as 0 and 255. A mask that was resized has greys
    along its border, which are foreground if > 127. If more than a tenth of the pixels are between
    32 and 223, the picture is not a mask. Colours matter rather than palette indices: some masks of
    HAM10000 have a palette in which white is number 0.

    Args:
        image: An opaque picture in grey, with a palette, or in RGB with only grey colours.
        name: Its file, for messages.
        where: Key and source, for messages.

    Raises:
        UserError: The picture is not such a mask.
    """

    def refused(what: str) -> UserError:
        return UserError(
            f"{where}: mask {name} {what}; a mask of one foreground class holds 0 and 1, or "
            f"0 and 255 with few greys between"
        )

    if image.mode not in _GREY_MODES:
        raise refused(f"has pixels of mode {image.mode}")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise refused("is partly transparent")
    if image.mode in ("1", "L"):
        pixels = np.asarray(image.convert("L"))
    else:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise refused("has colours")
        pixels = red
    counts = np.bincount(pixels.ravel(), minlength=256)
    values = np.flatnonzero(counts).tolist()
    if values[-1] <= 1:
        return pixels == 1
    if values[-1] < _GREYS.stop:
        raise refused(f"holds {values[-1]}")
    if values == [0, 1, 255]:
        # Here 1 is the foreground, and 255 marks pixels around it that are to be ignored.
        raise refused("holds 1 beside 255")
    share = counts[_GREYS.start : _GREYS.stop].sum() / pixels.size
    if share > _MAX_GREY:
        raise refused(f"is grey on {share:.0%} of its pixels")
    return pixels > 127
