"""Reads a download as its publisher distributes it: a folder whose archives may stay packed."""

import hashlib
import os
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import storage_fault
from fedhelp_jax.data.decode import picture_stem
from fedhelp_jax.data.readers.files import is_litter
from fedhelp_jax.data.readers.tables import read_table

# RuntimeError stands for a zip file that is encrypted, or compressed by a method that Python does
# not know.
_READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
)
# An archive is refused if it unpacks to more than this many bytes and by more than this factor,
# which no collection of images does.
_BOMB_BYTES, _BOMB_RATIO = 2**30, 100
KEY = "--manual_dir"


class Download:
    """The files of a folder by relative path, including those inside its zip and tar archives.

    The members of an archive appear where unpacking it in place would put them, and a file of the
    folder takes precedence over one in an archive. A download therefore reads the same unpacked or
    not. Hidden files and those that macOS adds are left out. Zip and plain tar archives are read in
    place. Compressed tar archives can be read only from the start, so they are unpacked once into
    ``scratch``.

    Reading is safe from several threads. Use it in a ``with`` statement, which closes the archives.
    """

    def __init__(self, folder: Path, scratch: Path, say: Callable[[str], None] = lambda text: None):
        """Lists the files; only compressed tar archives are read.

        Args:
          folder: ``--manual_dir``.
          scratch: Folder for unpacked archives; it is kept, so that the next attempt finds them.
          say: Called with messages about steps that take long.

        Raises:
          UserError: If the folder is missing or empty, or an archive is damaged, has a member
            outside its folder, a link or the same name twice, or unpacks to an absurd size.
        """
        self.folder, self._scratch, self._say = folder, scratch, say
        self._archives: list[zipfile.ZipFile | tarfile.TarFile] = []
        self._reads: dict[str, Callable[[], bytes]] = {}
        self._stamps: dict[str, str] = {}
        self._lock = threading.Lock()
        if not folder.is_dir():
            raise UserError(f"{KEY}={folder}: there is no such folder")
        archives = []
        for path in _files(folder):
            name = path.relative_to(folder).as_posix()
            self._reads[name] = path.read_bytes
            try:
                self._stamps[name] = _stamp(path)
            except OSError as error:  # a broken link
                raise UserError(f"{KEY}: {name} in {folder} cannot be read: {error}") from None
            if name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")):
                archives.append((name, path))
        try:
            for name, path in archives:
                self._add(PurePosixPath(name).parent, path)
        except BaseException:
            self.close()
            raise
        if not self._reads:
            raise UserError(f"{KEY}={folder} is empty")

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the archives."""
        for archive in self._archives:
            archive.close()

    @property
    def names(self) -> Iterable[str]:
        """All files, by relative path."""
        return self._reads.keys()

    def read(self, name: str) -> bytes:
        """Returns the contents of a file.

        Raises:
          UserError: If it cannot be read, or its archive is damaged at this file.
        """
        try:
            return self._reads[name]()
        except _READ_ERRORS as error:
            raise UserError(f"{KEY}: {name} in {self.folder} cannot be read: {error}") from None

    def stamp(self, name: str) -> str:
        """Returns size and modification time of a file or its archive, which tell if it changed."""
        return self._stamps[name]

    def find(self, *names: str) -> str:
        """Returns the only file with any of these names, in whatever folder it is.

        Raises:
          UserError: If there is no such file, or more than one.
        """
        found = [name for name in self._reads if name.rpartition("/")[2] in names]
        if len(found) == 1:
            return found[0]
        said = f"more than one, {found[0]} and {found[1]}" if found else "none"
        raise UserError(f"{KEY}={self.folder}: needs a file {' or '.join(names)}, has {said}")

    def by_stem(self, suffixes: tuple[str, ...], *folders: str) -> dict[str, str]:
        """Returns the files directly in folders of these names, by name without suffix.

        Pictures in these folders that have other suffixes are reported by number and first names.

        Args:
          suffixes: Suffixes in lower case, such as ".jpg"; those of the files may be in upper case.
          *folders: Names of the folders that contain the files; "" is the download's own folder.

        Returns:
          ``{stem: relative path}``.

        Raises:
          UserError: If two files have the same stem.
        """
        found: dict[str, str] = {}
        others = []
        for name in self._reads:
            parent, _, file = name.rpartition("/")
            if parent.rpartition("/")[2] not in folders:
                continue
            suffix = next((s for s in suffixes if file.lower().endswith(s)), None)
            if suffix is None:
                others += [name] if picture_stem(file) is not None else []
                continue
            stem = file[: -len(suffix)]
            if stem in found:
                raise UserError(f"{KEY}: {found[stem]} and {name} are both called {stem}")
            found[stem] = name
        if others:
            ends, first = " or ".join(suffixes), ", ".join(others[:3])
            self._say(f"{len(others)} pictures that do not end in {ends} are not read: {first}")
        return found

    def table(
        self, names: Sequence[str], columns: Sequence[str]
    ) -> tuple[str, list[dict[str, str]]]:
        """Returns the path and the rows of a file of values separated by commas or tabs.

        Args:
          names: Names that the file may have.
          columns: Columns that it must have; ``a|b`` is a column with either name, which is called
            ``a`` in the rows.

        Returns:
          ``(relative path, rows)``, with values stripped of whitespace.

        Raises:
          UserError: If there is no such file, or as in `read_table`.
        """
        name = self.find(*names)
        return name, read_table(self.read(name), columns, f"{KEY}: {name} in {self.folder}")[1]

    # --- archives ---

    def _add(self, parent: PurePosixPath, path: Path) -> None:
        stamp = _stamp(path)
        try:
            if path.name.lower().endswith(".zip"):
                members = self._zip_members(path)
            elif path.name.lower().endswith(".tar"):
                members = self._tar_members(path)
            else:
                members = self._unpacked_members(path)
            seen = set()
            for member, read in members:
                if member in seen:
                    raise UserError(f"{KEY}: {path} holds {member} twice")
                seen.add(member)
                name = (parent / member).as_posix()
                if name not in self._reads:
                    self._reads[name], self._stamps[name] = read, stamp
        except _READ_ERRORS as error:
            if storage_fault(error):
                raise
            raise UserError(f"{KEY}: {path} is damaged or no such archive: {error}") from None

    def _zip_members(self, path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        archive = zipfile.ZipFile(path)
        self._archives.append(archive)
        infos = [info for info in archive.infolist() if not info.is_dir()]
        check_size(path, archive)
        for info in infos:
            name = _checked(path, info.filename)
            if name is not None:
                yield name, lambda info=info: archive.read(info)

    def _tar_members(self, path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        archive = tarfile.open(path, "r:")
        self._archives.append(archive)
        for member in archive:
            name = _checked_member(path, member)
            if name is not None:
                yield name, lambda member=member: self._read_tar(archive, member)

    def _read_tar(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        with self._lock:  # all threads share one position in the file
            file = archive.extractfile(member)
            assert file is not None
            return file.read()

    def _unpacked_members(self, path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        target = self._scratch / f"{path.name}-{_stamp(path)}"
        if not target.exists():
            self._say(f"unpacking {path.name}")
            self._scratch.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=self._scratch))
            try:
                with tarfile.open(path, "r|gz") as archive:
                    _unpack(path, archive, unfinished)
                unfinished.rename(target)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        for file in _files(target):
            yield file.relative_to(target).as_posix(), file.read_bytes


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _unpack(path: Path, archive: tarfile.TarFile, target: Path) -> None:
    total = 0
    for member in archive:
        name = _checked_member(path, member)
        if name is None:
            continue
        total += member.size
        _check_total(path, total)
        file, place = archive.extractfile(member), target / name
        assert file is not None
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            raise UserError(f"{KEY}: {path} holds {name} twice")
        with place.open("wb") as out:
            _copy(file, out)


def _copy(file: IO[bytes], out: IO[bytes]) -> None:
    shutil.copyfileobj(file, out, 2**20)


def _checked_member(path: Path, member: tarfile.TarInfo) -> str | None:
    """Returns the name of a file in a tar archive; None for folders and members to be ignored."""
    name = _checked(path, member.name)
    if member.isdir() or name is None:
        return None
    if not member.isfile():
        raise UserError(f"{KEY}: {path} holds {member.name!r}, which is a link or no plain file")
    return name


def _checked(path: Path, name: str) -> str | None:
    """Returns the name of a member, which must be inside the archive's folder; None for litter."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise UserError(f"{KEY}: {path} holds {name!r}, which lies outside of its folder")
    return None if any(map(is_litter, parts)) else "/".join(parts)


def check_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Checks that a zip file does not unpack to an absurd size.

    Raises:
      UserError: If it does.
    """
    _check_total(path, sum(info.file_size for info in archive.infolist()))


def _check_total(path: Path, total: int) -> None:
    if total > _BOMB_BYTES and total > _BOMB_RATIO * path.stat().st_size:
        raise UserError(
            f"{KEY}: {path} of {path.stat().st_size} bytes would unpack to {total} or more: "
            "that is no collection of images"
        )


def _files(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted; follows links, but enters no folder twice."""
    found, entered = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not is_litter(name)]
        found += [Path(parent, name) for name in files if not is_litter(name)]
    return sorted(found)


def check_present(found: Mapping[str, str], wanted: Sequence[str], what: str, where: Path) -> None:
    """Checks that a download has all files that its tables name.

    Args:
      found: The files by name, as returned by `Download.by_stem`.
      wanted: The required names.
      what: What they are, such as "image".
      where: The download's folder.

    Raises:
      UserError: If any file is missing; the message has their number and the first three.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{KEY}={where}: {len(missing)} of {len(wanted)} {what}s are missing: {first}"
        )


def check_unique(names: Iterable[str], what: str, where: str) -> None:
    """Checks that a table contains no name twice.

    Raises:
      UserError: If it does.
    """
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{KEY}: {where} has {what} {name} {count} times")


def md5_of(path: Path) -> str:
    """Returns the hex MD5 of a file, for comparison with the checksum that publishers state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
