"""What was decoded from many files, kept between runs."""

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

# What a damaged .npz file raises.
NPZ_ERRORS = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)
# Part of the cache key: raise it when decoding or resizing changes.
_VERSION = f"3 bicubic, upright, bad ones listed, Pillow {PIL.__version__}"

# Arrays by name, and the type and shape that each must have; None stands for any length, and "U"
# for strings of any.
Arrays = dict[str, np.ndarray]
Kinds = Mapping[str, tuple[str, tuple[int | None, ...]]]

# Beside the arrays, where there are any: the places of bad examples, and the reasons.
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
    """Returns what `make` returns, from the cache where it is there, unchanged and undamaged.

    Bad examples are kept there too, so that the next one who skips them need not look again. Who
    refuses them does not take what lacks any. A file that could only not be read may be read the
    next time: then nothing is kept.

    Args:
        source: The folder or zip file that it is made from.
        names: Names of the files inside it, in order.
        what: What is made from them, such as a size: another is kept apart.
        kinds: The arrays that `make` returns.
        make: Makes them, and reports what is bad.
        cache_dir: Folder of the cache; None takes the environment's `FEDHELP_CACHE_DIR`, or
            else `fedhelp_jax` in the user's cache folder.
        bad: Is told of what is bad, now or when the cache was made.
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
    bad.add(Bad(bad.skip, known))
    return arrays


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder of the cache, as `cached` takes it."""
    folder = cache_dir or os.environ.get("FEDHELP_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedhelp_jax"


def _key(source: Path, names: Sequence[str], what: str) -> str:
    """Returns a hash that changes with the files, their order, and what is made of them."""
    key = hashlib.sha256(f"{_VERSION}\n{source.resolve()}\n{what}\n".encode())
    # A folder's own time does not change when a file in it is overwritten.
    files = [source / name for name in names] if source.is_dir() else [source]
    for file in files:
        status = file.stat()
        key.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    key.update("\n".join(names).encode())
    return key.hexdigest()


def _read(cache: Path, kinds: Kinds) -> tuple[Arrays | None, dict[int, str]]:
    """Returns the arrays, None if there are none of use, and which examples are bad, and why."""
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
    """Returns all arrays of an .npz file of ours; None if it is not there, or damaged."""
    # An npz, not an npy: its checksums tell a damaged file from a good one.
    try:
        # Opened here: np.load leaves a damaged file open.
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
    """Writes an .npz file: it is there whole, or as it was."""
    with replaced(path) as beside, beside.open("wb") as file:
        # To a type checker any name could be that of the flag `allow_pickle`.
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
