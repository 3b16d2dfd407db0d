"""A cache that keeps decoded files between runs."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL

from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.core.storage import StorageError, replaced, storage_errors
from fedhelp_jax.data.bad_examples import Bad

# The errors that a damaged .npz file raises.
NPZ_ERRORS = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)
# Part of the cache key. Increment the number when decoding or resizing changes.
_VERSION = f"3 bicubic, upright, bad ones listed, Pillow {PIL.__version__}"

# Arrays by name, and the type and shape that each must have. None stands for any length, and "U"
# for strings of any length.
Arrays = dict[str, np.ndarray]
Kinds = Mapping[str, tuple[str, tuple[int | None, ...]]]

# Stored next to the arrays if there are bad examples: their positions and the reasons.
_BAD_PLACES, _BAD_REASONS = "bad places", "bad reasons"

logger = logging.getLogger(__name__)


def cached(
    source: Path,
    names: Sequence[str],
    what: str,
    kinds: Kinds,
    make: Callable[[Bad], Arrays],
    cache_dir: str | None,
    bad: Bad,
) -> Arrays:
    """Returns the arrays of `make`, from the cache if it has an up-to-date and undamaged copy.

    The cache also records bad examples, so that a later run that skips them need not look for them
    again. A run that does not skip them ignores an entry with bad examples. If a file could not be
    read but may be readable later (`Unread`), nothing is stored.

    Args:
        source: The folder or zip file that the arrays are made from.
        names: Names of the files inside it, in order.
        what: What is made from the files, such as a size; each variant has its own cache entry.
        kinds: Type and shape of the arrays that `make` returns.
        make: Makes the arrays and reports bad examples.
        cache_dir: Folder of the cache; None uses the environment variable `FEDHELP_CACHE_DIR` or,
            if that is unset, `fedhelp_jax` in the user's cache folder.
        bad: Receives the bad examples, whether found now or recorded in the cache.
    """
    cache = cache_folder(cache_dir) / f"{_key(source, names, what)}.npz"
    arrays, known = _read(cache, kinds)
    if arrays is None or (known and not bad.skip):
        for name, (dtype, shape) in kinds.items():
            if name == "images" and None not in shape:
                sides = tuple(side for side in shape if side is not None)
                key = "data.image_size" if len(sides) == 4 else "data.volume_size"
                check_fits(sides, dtype, key, f"the images of {source}")
        fresh = Bad(bad.skip)
        arrays, known = make(fresh), fresh.reasons
        if fresh.lasting:
            _write(cache, arrays | _as_arrays(known))
    else:
        logger.info("images of %s are in %s", source, cache)
    bad.add(Bad(bad.skip, known))
    return arrays


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of the cache; see `cache_dir` of `cached`."""
    folder = cache_dir or os.environ.get("FEDHELP_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedhelp_jax"


def _key(source: Path, names: Sequence[str], what: str) -> str:
    """Returns a hash that changes with the files, their order, and what is made from them."""
    key = hashlib.sha256(f"{_VERSION}\n{source.resolve()}\n{what}\n".encode())
    # Overwriting a file does not change the modification time of its folder.
    files = [source / name for name in names] if source.is_dir() else [source]
    for file in files:
        status = file.stat()
        key.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    key.update("\n".join(names).encode())
    return key.hexdigest()


def _read(cache: Path, kinds: Kinds) -> tuple[Arrays | None, dict[int, str]]:
    """Returns the arrays, or None if there are no usable ones, and the reasons of bad examples."""
    stored = whole_npz(cache)
    if stored is None or not all(
        name in stored and _is(stored[name], *kinds[name]) for name in kinds
    ):
        return None, {}
    bad = zip(*(stored.get(name, np.zeros(0)) for name in (_BAD_PLACES, _BAD_REASONS)), strict=True)
    reasons = {int(place): str(reason) for place, reason in bad}
    return {name: stored[name] for name in kinds}, reasons


def _as_arrays(bad: Mapping[int, str]) -> Arrays:
    if not bad:
        return {}
    return {_BAD_PLACES: np.array(list(bad)), _BAD_REASONS: np.array(list(bad.values()))}


def whole_npz(path: Path) -> Arrays | None:
    """Returns all arrays of an .npz file that we wrote; None if it is missing or damaged."""
    # Unlike .npy, .npz has checksums, which reveal a damaged file.
    try:
        # The file is opened here because np.load leaves a damaged file open.
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                return None
            return {name: stored[name] for name in stored.files}
    except NPZ_ERRORS:
        return None


def _is(array: np.ndarray, dtype: str, shape: tuple[int | None, ...]) -> bool:
    lengths = zip(array.shape, shape, strict=False)
    right = all(wanted is None or length == wanted for length, wanted in lengths)
    return dtype in (array.dtype, array.dtype.kind) and array.ndim == len(shape) and right


def _write(cache: Path, arrays: Arrays) -> None:
    try:
        with storage_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_npz(cache, arrays)
    except StorageError as error:
        logger.warning("the image cache cannot be written (%s); going on without", error)


def write_npz(path: Path, arrays: Arrays) -> None:
    """Writes an .npz file atomically: on failure the previous file is left unchanged."""
    with replaced(path) as beside, beside.open("wb") as file:
        # A type checker assumes that any of the names could be the flag `allow_pickle`.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
