"""Finds files in a folder or a zip file by the ids of images, and reads them."""

import logging
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.decode import picture_stem

# HAM10000's own masks are called <id>_segmentation.png.
_MASK_ENDS = ("", "_segmentation")
# Files that macOS and Windows add to folders.
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")

logger = logging.getLogger(__name__)


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
        """Returns the contents of a file."""
        # A ZipFile locks its file, so that threads can share it.
        return self._archive.read(name) if self._archive else (self._folder / name).read_bytes()

    def names(self, folder: str) -> set[str]:
        """Returns the files directly in a top-level folder, or, for "", in the source itself."""
        start = f"{folder}/" if folder else ""
        return {f"{start}{name}" for name, is_file in self._entries(folder).items() if is_file}

    def folders(self, folder: str) -> set[str]:
        """Returns the folders directly in a top-level folder."""
        entries = self._entries(folder).items()
        return {f"{folder}/{name}" for name, is_file in entries if not is_file}

    def walk(self) -> list[str]:
        """Returns all files, including those in subfolders, without litter."""
        if self._archive:
            found = [name for name in self._archive.namelist() if not name.endswith("/")]
        else:
            found = [
                Path(folder, name).relative_to(self._folder).as_posix()
                for folder, _, names in os.walk(self._folder)
                for name in names
            ]
        return sorted(n for n in found if not any(map(is_litter, n.split("/"))))

    def _entries(self, folder: str) -> dict[str, bool]:
        """Returns the entries of a folder by name, and whether each is a file, without litter."""
        if self._archive:
            start = f"{folder}/" if folder else ""
            inside = [
                n.removeprefix(start) for n in self._archive.namelist() if n.startswith(start)
            ]
            entries = {name.partition("/")[0]: "/" not in name for name in inside}
        elif (self._folder / folder).is_dir():
            with os.scandir(self._folder / folder) as scanned:
                entries = {entry.name: entry.is_file() for entry in scanned}
        else:
            entries = {}
        return {name: is_file for name, is_file in entries.items() if name and not is_litter(name)}

    def close(self) -> None:
        """Closes the zip file."""
        if self._archive:
            self._archive.close()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_litter(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden or added by an operating system."""
    return name.startswith(".") or name in _LITTER


def find_images(source: Path, ids: Iterable[str], key: str = "data.path") -> dict[str, str]:
    """Returns where each image is: `images/<id>` or `<id>`, with the extension of any picture.

    Args:
        source: A folder or a zip file.
        ids: File names without extension.
        key: The configuration key that names `source`, for messages.

    Returns:
        The name inside `source` of each image that was found; others have no entry.

    Raises:
        UserError: `source` is a file, but not a zip file, or an image was found twice.
    """
    with Files(source, key) as files:
        names = files.names("images") | files.names("")
    return _find(names, ids, ("",), f"{key}: {source}")


def find_masks(source: Path, ids: Iterable[str], key: str = "data.path") -> dict[str, str]:
    """Returns where each mask is: `masks/<id>` or `masks/<id>_segmentation`.

    Otherwise the same as `find_images`.
    """
    with Files(source, key) as files:
        names = files.names("masks")
    return _find(names, ids, _MASK_ENDS, f"{key}: {source}")


def image_ids(source: Path, key: str = "data.path") -> list[str]:
    """Returns the sorted ids of all images that `find_images` would find in the folder `images`.

    Anything else in that folder is reported in a warning with its number and the first three names.
    """
    with Files(source, key) as files:
        stems = {name: picture_stem(name) for name in files.names("images")}
        others = sorted(name for name, stem in stems.items() if stem is None)
        others += sorted(f"{name}/" for name in files.folders("images"))
    if others:
        logger.warning("%s: %s: %s", key, source, unread(others))
    return sorted({stem for stem in stems.values() if stem is not None})


def unread(names: Sequence[str]) -> str:
    """Returns a message about files that are not pictures: their number, and the first three.

    >>> unread(["images/a.dcm", "images/b.dcm"])
    '2 that are no pictures by their names are not read: images/a.dcm, images/b.dcm'
    """
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} that are no pictures by their names are not read: {first}"


def _find(
    names: Iterable[str], ids: Iterable[str], ends: Sequence[str], where: str
) -> dict[str, str]:
    by_stem = defaultdict(list)
    for name in names:
        by_stem[picture_stem(name)].append(name)
    found = {}
    for image_id in ids:
        here = sorted(name for end in ends for name in by_stem.get(f"{image_id}{end}", ()))
        if len(here) > 1:
            raise UserError(f"{where} has both {here[0]} and {here[1]}; {image_id} must be one")
        if here:
            found[image_id] = here[0]
    return found
