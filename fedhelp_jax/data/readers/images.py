"""Decodes and resizes images and masks from a folder or a zip file, and caches them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.data.bad_examples import Bad, Unread
from fedhelp_jax.data.cache import Arrays, cached
from fedhelp_jax.data.decode import DECODE_ERRORS, decode_picture
from fedhelp_jax.data.readers.files import Files
from fedhelp_jax.data.readers.masks import decode_mask
from fedhelp_jax.data.types import image_sha256

# Maps a picture and its position among the names to an array.
Decode = Callable[[Image.Image, int], np.ndarray]


def existing_path(value: str | None, key: str, what: str) -> Path:
    """Returns `value` as a path that exists.

    Args:
        value: The configured path.
        key: The configuration key it came from.
        what: What the path should name, for the message.

    Raises:
        UserError: The key is not set, or the path does not exist.
    """
    if not value:
        raise UserError(f"{key} is not set; it must name {what}")
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; it must name {what}")
    return path


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Returns the picture as uint8 [size, size, 3].

    Uses antialiased bicubic interpolation. The aspect ratio is not kept, so that no part of a
    lesion is cut off. A picture that already has this size keeps its pixels.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def resize_arrays(images: np.ndarray, size: int) -> np.ndarray:
    """Returns images as uint8 [N, size, size, 3].

    Args:
        images: uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]; grey is repeated over channels.
        size: Height and width of the result; images that already have this size keep their pixels.
    """
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.shape[1:3] != (size, size):
        check_fits((len(images), size, size, 3), "uint8", "data.image_size", "the images")
        resized = [resize(Image.fromarray(image), size) for image in images]
        return np.stack(resized) if resized else np.zeros((0, size, size, 3), np.uint8)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    return np.ascontiguousarray(images)


class Decoded(NamedTuple):
    """Decoded images; those of bad examples are blank.

    Attributes:
        images: uint8 [n, size, size, 3], resized.
        sides: int32 [n, 2] height and width of each image before it was resized.
        sha256: [n] `image_sha256` of each image at that size; empty unless requested.
    """

    images: np.ndarray
    sides: np.ndarray
    sha256: tuple[str, ...]


def load_images(
    source: Path,
    names: Sequence[str],
    size: int,
    *,
    hashed: bool = False,
    cache_dir: str | None = None,
    key: str = "data.path",
    bad: Bad | None = None,
) -> Decoded:
    """Returns the images called `names`, decoded and resized, from the cache where possible.

    Args:
        source: A folder or a zip file.
        names: Names inside `source`, as `list_images` gives them.
        size: Height and width of the result.
        hashed: Whether to compute the images' `image_sha256`.
        cache_dir: Folder of the cache; None uses the environment variable `FEDHELP_CACHE_DIR` or,
            if that is unset, `fedhelp_jax` in the user's cache folder.
        key: The configuration key that names `source`, for messages.
        bad: Collects images that cannot be decoded; None raises an error for the first.

    Raises:
        UserError: An image cannot be decoded.
    """
    bad = bad or Bad()

    def make(bad: Bad) -> Arrays:
        sides, sha256 = np.zeros((len(names), 2), np.int32), np.zeros(len(names), "U64")

        def decode(image: Image.Image, index: int) -> np.ndarray:
            sides[index] = image.height, image.width
            if hashed:
                sha256[index] = image_sha256(native(image))
            return _resized(image, size)

        images = _decode_all(source, names, "image", decode, key, bad)
        return {"images": images, "sides": sides} | ({"sha256": sha256} if hashed else {})

    count = len(names)
    kinds = {"images": ("uint8", (count, size, size, 3)), "sides": ("int32", (count, 2))}
    if hashed:
        kinds["sha256"] = ("U64", (count,))
    what = f"{size} sha256" if hashed else str(size)
    arrays = cached(source, names, what, kinds, make, cache_dir, bad)
    sha256 = arrays["sha256"].tolist() if hashed else ()
    return Decoded(arrays["images"], arrays["sides"], tuple(sha256))


def load_masks(
    source: Path,
    names: Sequence[str],
    *,
    cache_dir: str | None = None,
    key: str = "data.path",
    bad: Bad | None = None,
) -> np.ndarray:
    """Returns the masks called `names` at their own size, from the cache where possible.

    Args:
        source: A folder or a zip file.
        names: Names inside `source`, as `list_images` gives them.
        cache_dir: As in `load_images`.
        key: The configuration key that names `source`, for messages.
        bad: Collects files that are not masks, or do not have the most common size; None raises an
            error for the first.

    Returns:
        uint8 [len(names), H, W], 1 for foreground; bad masks are blank.

    Raises:
        UserError: A mask cannot be decoded, is not a mask, or differs in size from the first.
    """
    bad = bad or Bad()

    def decode(image: Image.Image, index: int) -> np.ndarray:
        return decode_mask(image, names[index], f"{key}: {source}")

    def make(bad: Bad) -> Arrays:
        masks = _decode_all(source, names, "mask", decode, key, bad)
        # With eight pixels per byte, the masks of HAM10000 take 38 MB instead of 300.
        return {"bits": np.packbits(masks, axis=-1), "width": np.array(masks.shape[-1:])}

    kinds = {"bits": ("uint8", (len(names), None, None)), "width": ("int64", (1,))}
    arrays = cached(source, names, "masks", kinds, make, cache_dir, bad)
    return np.unpackbits(arrays["bits"], axis=-1, count=int(arrays["width"][0]))


class LazyImages(Sequence[np.ndarray]):
    """Images that are read on access, and read again at each access.

    Args:
        count: Number of images.
        read: Returns the image at a position.
    """

    def __init__(self, count: int, read: Callable[[int], np.ndarray]):
        self._places, self._read = range(count), read

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self._read(place) for place in self._places[index]]
        return self._read(self._places[index])


def native_images(source: Path, names: Sequence[str], key: str) -> LazyImages:
    """Returns images of a folder or zip file at their own size, as `native` does.

    Accessing an image that cannot be decoded (any more) raises a `UserError`.

    Args:
        source: A folder or a zip file; a zip file stays open.
        names: Names inside it.
        key: The configuration key that names `source`, for messages.
    """
    files = Files(source, key)

    def read(place: int) -> np.ndarray:
        return native(_read(files, names[place], f"{key}: image {names[place]} in {source}"))

    return LazyImages(len(names), read)


def _resized(image: Image.Image, size: int) -> np.ndarray:
    # Converted to RGB first, since Pillow does not interpolate palette images.
    return resize(image.convert("RGB"), size)


def native(image: Image.Image) -> np.ndarray:
    """Returns a picture at its own size as uint8: [H, W] if grey, otherwise RGB [H, W, 3]."""
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _read(files: Files, name: str, where: str) -> Image.Image:
    try:
        data = files.read(name)
    except DECODE_ERRORS as error:
        kind = Unread if isinstance(error, OSError) else UserError
        raise kind(f"{where} cannot be read: {error}") from error
    return decode_picture(data, where)


def _decode_all(
    source: Path, names: Sequence[str], what: str, decode: Decode, key: str, bad: Bad
) -> np.ndarray:
    """Returns the results of `decode` for all files as one array, blank for bad files.

    All results must have the shape of the first or, if bad ones are skipped, the most common shape.
    """

    def one(index: int) -> np.ndarray | None:
        where = f"{key}: {what} {names[index]} in {source}"
        try:
            return decode(_read(files, names[index], where), index)
        except UserError as error:
            bad.found(index, error)
            return None

    def other_shape(index: int, shape: tuple[int, ...], usual: tuple[int, ...], like: str) -> None:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (shape, usual)]
        where = f"{key}: {what} {names[index]} in {source}"
        bad.found(index, UserError(f"{where} is {sizes[0]}, but {like} is {sizes[1]}"))

    with Files(source, key) as files:
        first, start = one(0), 0
        while first is None:
            start += 1
            if start == len(names):
                bad.check(len(names), f"{key}: {source}")
            first = one(start)
        arrays = np.zeros((len(names), *first.shape), first.dtype)
        arrays[start] = first
        others: dict[int, np.ndarray] = {}

        def next_one(index: int) -> None:
            array = one(index)
            if array is None:
                return
            if array.shape == arrays.shape[1:]:
                arrays[index] = array
                return
            if not bad.skip:
                other_shape(index, array.shape, arrays.shape[1:], names[start])
            others[index] = array

        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            rest = (None for _ in pool.map(next_one, range(start + 1, len(names))))
            for _ in _progress(rest, f"Decoding {what}s", len(names) - start - 1):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    if not others:
        return arrays
    good = [place for place in range(len(names)) if place not in bad.reasons]
    shapes = {place: others[place].shape if place in others else first.shape for place in good}
    usual = Counter(shapes.values()).most_common(1)[0][0]
    like = names[next(place for place in good if shapes[place] == usual)]
    if usual != first.shape:
        arrays = np.zeros((len(names), *usual), first.dtype)
        for place, array in others.items():
            if array.shape == usual:
                arrays[place] = array
    for place, shape in shapes.items():
        if shape != usual:
            other_shape(place, shape, usual, like)
    return arrays


def _progress(items: Iterator[None], title: str, total: int) -> Iterable[None]:
    if not sys.stderr.isatty():
        return items
    # Imported here, since most runs find the cache and need no progress bar.
    from rich.console import Console
    from rich.progress import track

    return track(items, title, total, console=Console(stderr=True), transient=True)
