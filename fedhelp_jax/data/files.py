"""Files in a folder or a zip file: found by the ids of images, and read."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedhelp_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")
_IMAGES = [(start, end) for start in ("images/", "") for end in _SUFFIXES]
# HAM10000 itself calls its masks <id>_segmentation.png.
_MASKS = [("masks/", ".png"), ("masks/", "_segmentation.png")]


class Files:
    """The files of a folder or a zip file; safe to read from several threads.

    Args:
        source: The folder or zip file.
        key: The configuration key that names it, for messages.

    Raises:
        UserError: `source` is a file, but not a zip file.
    """

    def __init__(self, source: Path, key: str):
        self._folder, self._archive = source, None
        if not source.is_dir():
            try:
                self._archive = zipfile.ZipFile(source)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{key}: {source} is neither a folder nor a zip file") from error

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""
        # A ZipFile locks its file, so that threads may share it.
        return self._archive.read(name) if self._archive else (self._folder / name).read_bytes()

    def names(self, folder: str) -> set[str]:
        """Returns the files that stand in a folder of the source itself, or ("") beside it."""
        if self._archive:
            return {n for n in self._archive.namelist() if n.rpartition("/")[0] == folder}
        if not (self._folder / folder).is_dir():
            return set()
        start = f"{folder}/" if folder else ""
        with os.scandir(self._folder / folder) as entries:
            return {f"{start}{entry.name}" for entry in entries if entry.is_file()}

    def close(self) -> None:
        """Closes the zip file."""
        if self._archive:
            self._archive.close()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    with Files(source, key) as files:
        return _find(files.names("images") | files.names(""), ids, _IMAGES)


def find_masks(source: Path, ids: Iterable[str], key: str = "data.dir") -> dict[str, str]:
    """Returns where each mask is, `masks/<id>.png` or `masks/<id>_segmentation.png`.

    Otherwise as `find_images`.
    """
    with Files(source, key) as files:
        return _find(files.names("masks"), ids, _MASKS)


def image_ids(source: Path, key: str = "data.dir") -> list[str]:
    """Returns the sorted ids of all that `find_images` would find in the folder `images`."""
    with Files(source, key) as files:
        names = [Path(name) for name in files.names("images")]
    # Copies made on a Mac come with a hidden file beside each.
    shown = [name for name in names if not name.name.startswith(".")]
    return sorted({name.stem for name in shown if name.suffix in _SUFFIXES})


def _find(names: set[str], ids: Iterable[str], places: Sequence[tuple[str, str]]) -> dict[str, str]:
    found = {}
    for image_id in ids:
        for name in (f"{start}{image_id}{end}" for start, end in places):
            if name in names:
                found[image_id] = name
                break
    return found
