"""Lists and reads the files of a folder or a zip file."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fedhelp_jax.core.errors import UserError

# Files that macOS and Windows add to folders.
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")


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


def unread(names: Sequence[str]) -> str:
    """Returns a message about files that are not pictures: their number, and the first three.

    >>> unread(["images/a.dcm", "images/b.dcm"])
    '2 that are no pictures by their names are not read: images/a.dcm, images/b.dcm'
    """
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} that are no pictures by their names are not read: {first}"
