"""Images from a folder or a zip file: found, decoded, resized, and kept in a cache."""

import hashlib
import io
import logging
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fedhelp_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error)
_CACHE_ERRORS = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)
# Part of the cache key: raise it when decoding or resizing changes.
_CACHE_VERSION = "1 bicubic"

logger = logging.getLogger(__name__)


def existing_path(value: str | None, key: str, what: str) -> Path:
    """Returns `value` as a path that exists.

    Args:
        value: The configured path.
        key: The configuration key it came from.
        what: What should stand there, for the message.

    Raises:
        UserError: The key is not set, or nothing stands at the path.
    """
    if not value:
        raise UserError(f"{key} is not set; it must name {what}")
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; it must name {what}")
    return path


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Returns the picture as uint8 [size, size, 3].

    Antialiased (bicubic); the aspect ratio is not kept, so that no part of a lesion is cut off.
    A picture that has the size already keeps its pixels.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def resize_arrays(images: np.ndarray, size: int) -> np.ndarray:
    """Returns images as uint8 [N, size, size, 3].

    Args:
        images: uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]; grey is repeated over channels.
        size: Height and width of the result; images that have it already keep their pixels.
    """
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.shape[1:3] != (size, size):
        resized = [resize(Image.fromarray(image), size) for image in images]
        return np.stack(resized) if resized else np.zeros((0, size, size, 3), np.uint8)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    return np.ascontiguousarray(images)


def find_images(source: Path, ids: Iterable[str], key: str = "data.dir") -> dict[str, str]:
    """Returns where each image is: `images/<id>` or `<id>`, with .jpg, .jpeg or .png.

    Args:
        source: A folder or a zip file.
        ids: File names without suffix.
        key: The configuration key that names `source`, for messages.

    Returns:
        The name inside `source` of each image that is there; others have no entry.

    Raises:
        UserError: `source` is a file, but not a zip file.
    """
    if source.is_dir():
        names = {
            f"{prefix}{entry.name}"
            for prefix in ("", "images/")
            if (source / prefix).is_dir()
            for entry in os.scandir(source / prefix)
            if entry.is_file()
        }
    else:
        with _open_zip(source, key) as archive:
            names = set(archive.namelist())
    found = {}
    for image_id in ids:
        for name in (f"{p}{image_id}{s}" for p in ("images/", "") for s in _SUFFIXES):
            if name in names:
                found[image_id] = name
                break
    return found


def load_images(
    source: Path,
    names: Sequence[str],
    size: int,
    *,
    cache_dir: str | None = None,
    key: str = "data.dir",
) -> np.ndarray:
    """Returns the images called `names`, decoded and resized, from the cache where possible.

    Args:
        source: A folder or a zip file.
        names: Names inside `source`, as `find_images` gives them.
        size: Height and width of the result.
        cache_dir: Folder of the cache; None takes the environment's `FEDHELP_CACHE_DIR`, or
            else `fedhelp_jax` in the user's cache folder.
        key: The configuration key that names `source`, for messages.

    Returns:
        uint8 [len(names), size, size, 3].

    Raises:
        UserError: An image cannot be decoded.
    """
    cache = _cache_folder(cache_dir) / f"{_cache_key(source, names, size)}.npz"
    images = _read_cache(cache, (len(names), size, size, 3))
    if images is None:
        images = _decode_all(source, names, size, key)
        _write_cache(cache, images)
    return images


def _open_zip(source: Path, key: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {source} is neither a folder nor a zip file") from error


def _decode_all(source: Path, names: Sequence[str], size: int, key: str) -> np.ndarray:
    images = np.zeros((len(names), size, size, 3), np.uint8)
    archive = None if source.is_dir() else _open_zip(source, key)
    # Reading members of one ZipFile from several threads is safe: it locks its file.
    read: Callable[[str], bytes] = (
        archive.read if archive else lambda name: (source / name).read_bytes()
    )

    def decode(index: int) -> None:
        name = names[index]
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                # To RGB first: Pillow does not interpolate palette images.
                images[index] = resize(image.convert("RGB"), size)
        except _DECODE_ERRORS as error:
            raise UserError(f"{key}: image {name} in {source} cannot be decoded") from error

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for _ in _progress(pool.map(decode, range(len(names))), len(names)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        if archive:
            archive.close()
    return images


def _progress(items: Iterator[None], total: int) -> Iterable[None]:
    if not sys.stderr.isatty():
        return items
    # Imported here: most runs find the cache and need no bar.
    from rich.console import Console
    from rich.progress import track

    return track(items, "Decoding images", total, console=Console(stderr=True), transient=True)


def _cache_folder(cache_dir: str | None) -> Path:
    folder = cache_dir or os.environ.get("FEDHELP_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedhelp_jax"


def _cache_key(source: Path, names: Sequence[str], size: int) -> str:
    """Returns a hash that changes with the files, their order, and the image size."""
    key = hashlib.sha256(f"{_CACHE_VERSION}\n{source.resolve()}\n{size}\n".encode())
    # A folder's own time does not change when a file in it is overwritten.
    files = [source / name for name in names] if source.is_dir() else [source]
    for file in files:
        status = file.stat()
        key.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    key.update("\n".join(names).encode())
    return key.hexdigest()


def _read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    # An npz, not an npy: its checksums tell a damaged file from a good one.
    try:
        # Opened here: np.load leaves a damaged file open.
        with cache.open("rb") as file:
            images = np.load(file, allow_pickle=False)["images"]
    except _CACHE_ERRORS:
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(cache: Path, images: np.ndarray) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, images=images)
            os.replace(temporary, cache)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.warning("image cache %s cannot be written (%s); going on without", cache, error)
