"""Lists the images of a folder, described by a table or by the subfolders that they are in."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fedhelp_jax.core.errors import UserError, first_of, suggest
from fedhelp_jax.data.decode import picture_stem
from fedhelp_jax.data.readers.files import Files, unread
from fedhelp_jax.data.readers.tables import is_unknown, read_table

# Accepted names of the splits in tables and folders, in lower case.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_TABLES = (".csv", ".tsv", ".parquet")
_FOLDERS = ("", "images")  # where the images of a table lie
_MASK_ENDS = ("", "_segmentation")  # HAM10000's own masks are called <id>_segmentation.png

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One image; unknown values are "".

    Attributes:
        id: Its name without the folder `images` and without extension.
        image: Its file inside the source.
        mask: The file of its mask.
        values: Values from the table or the folders, by column: "label", "site", "group", "split",
            and every other column of the table.
    """

    id: str
    image: str
    mask: str
    values: Mapping[str, str]


def list_images(
    source: Path, table: Path | None, columns: Mapping[str, str | None], keys: tuple[str, str]
) -> list[Entry]:
    """Returns the images of a folder or a zip file, sorted by id.

    With a table, these are the images that it names. Without one, they are all pictures, and their
    folders describe them: ``images/ID``; or ``CLASS/*``, ``SITE/CLASS/*``, and either below
    ``train``, ``validation`` and ``test``. Masks are ``masks/ID`` or ``masks/ID_segmentation``.

    Args:
        source: A folder or a zip file.
        table: A CSV, TSV or Parquet file; None uses the only one in `source`, if there is one.
        columns: Names of the columns image, label, site, group, split and mask in the table. None
            means the key itself, if there is such a column.
        keys: The configuration keys of `source` and `table`, for messages.

    Raises:
        UserError: A file, column or value is missing or not as described.
    """
    with Files(source, keys[0]) as files:
        everything = files.walk()
        if table is None:
            tables = sorted(n for n in everything if "/" not in n and n.lower().endswith(_TABLES))
            if len(tables) > 1:
                raise UserError(
                    f"{keys[1]} is not set, and {source} has {first_of(tables)}: name one"
                )
            data = files.read(tables[0]) if tables else None
            name = f"{source}/{tables[0]}" if tables else ""
        else:
            name = str(table)
            try:
                data = table.read_bytes()
            except OSError as error:
                raise UserError(f"{keys[1]}: {table} cannot be read: {error.strerror}") from error
    pictures = _Pictures(everything, f"{keys[0]}: {source}")
    if data is None:
        given = [column for column, name in columns.items() if name is not None]
        if given:
            raise UserError(
                f"{keys[1]} is not set, and {source} holds no table, but columns are named for one "
                f"({first_of(given)})"
            )
        entries = pictures.by_folders()
    else:
        where = f"{keys[1]}: {name}"
        entries = pictures.by_table(_rows(data, name, where), columns, where, source, keys[0])
    return sorted(entries, key=lambda entry: entry.id)


def _rows(data: bytes, name: str, where: str) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the columns and rows of a table."""
    if not name.lower().endswith(".parquet"):
        return read_table(data, (), where)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{where}: Parquet files need pyarrow: pip install pyarrow") from None
    try:
        found = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise UserError(f"{where} cannot be read as a Parquet file: {error}") from None
    rows = [
        {key: "" if value is None else str(value).strip() for key, value in row.items()}
        for row in found.to_pylist()
    ]
    if not rows:
        raise UserError(f"{where} has no rows")
    return found.column_names, rows


class _Pictures:
    """The picture files of a source."""

    def __init__(self, names: Sequence[str], where: str):
        self._where, self._all, self._others = where, set(names), []
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            if picture_stem(name) is None:
                self._others.append(name)
            else:
                self._by_stem[_without_ending(name)].append(name)

    def find(self, value: str, folders: Sequence[str]) -> str:
        """Returns the file that a value names, with or without extension; "" if there is none."""
        path = PurePosixPath(value.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self._where}: {value!r} is not the name of a file inside it")
        candidates = [f"{folder}/{path}" if folder else str(path) for folder in folders]
        exact = [name for name in candidates if name in self._all]
        found = exact or [name for c in candidates for name in self._by_stem.get(c, ())]
        if len(found) > 1:
            self._refuse_both(found[0], found[1], value)
        return found[0] if found else ""

    def _refuse_both(self, one: str, other: str, name: str) -> None:
        raise UserError(f"{self._where} has both {one} and {other}; {name} must be one")

    def mask_of(self, identity: str) -> str:
        """Returns the file of an image's mask, or ""."""
        found = [self.find(f"{identity}{end}", ("masks",)) for end in _MASK_ENDS]
        found = [name for name in found if name]
        if len(found) > 1:
            self._refuse_both(found[0], found[1], identity)
        return found[0] if found else ""

    def by_folders(self) -> list[Entry]:
        """Returns all pictures except masks, described by their folders."""
        names = [name for found in self._by_stem.values() for name in found]
        names = [name for name in names if not name.startswith("masks/")]
        others = [name for name in self._others if not name.startswith("masks/")]
        if others:
            logger.warning("%s: %s", self._where, unread(others))
        by_id: dict[str, str] = {}
        for name in names:
            identity = _without_ending(name).removeprefix("images/")
            if identity in by_id:
                self._refuse_both(by_id[identity], name, identity)
            by_id[identity] = name
        if not names:
            raise UserError(
                f"{self._where} has no picture, such as images/a.jpg, CLASS/a.jpg or "
                "SITE/CLASS/a.jpg"
            )
        entries, depths = [], Counter()
        for identity, name in by_id.items():
            folders = list(PurePosixPath(name).parts[:-1])
            values: dict[str, str] = {}
            if folders and folders[0].lower() in SPLITS:
                values["split"] = SPLITS[folders.pop(0).lower()]
            if folders[:1] == ["images"]:
                folders.pop(0)
            depths[len(folders)] += 1
            values |= dict(zip(("label", "site"), reversed(folders), strict=False))
            entries.append(Entry(identity, name, self.mask_of(identity), values))
        if len(depths) > 1 or max(depths) > 2:
            raise UserError(
                f"{self._where}: pictures lie at different depths; they must all be CLASS/*, or "
                "all SITE/CLASS/*, or a table must say what they are"
            )
        return entries

    def by_table(
        self,
        table: tuple[list[str], list[dict[str, str]]],
        columns: Mapping[str, str | None],
        where: str,
        source: Path,
        key: str,
    ) -> list[Entry]:
        """Returns the pictures that a table names, described by its rows."""
        known, rows = table
        called: dict[str, str] = {}
        for column, name in columns.items():
            if name is not None and name not in known:
                raise UserError(
                    f"{where} has no column {name}; it has {', '.join(known)}{suggest(name, known)}"
                )
            if (name or column) in known:
                called[column] = name or column
        if "image" not in called:
            stems = {PurePosixPath(stem).name for stem in self._by_stem}
            values = {name: rows[0][name].replace("\\", "/") for name in known}
            likely = [name for name in known if PurePosixPath(values[name]).stem in stems]
            raise UserError(
                f"{where} has no column image; it has {', '.join(known)}: say which one holds the "
                f"files, e.g. --config.{key.split('.')[0]}.columns.image={(likely or known)[0]}"
            )
        entries, missing = [], []
        for number, row in enumerate(rows, start=2):
            value = row[called["image"]]
            if not value:
                raise UserError(f"{where} row {number} names no image")
            file = self.find(value, _FOLDERS)
            others = {name: text for name, text in row.items() if name not in called.values()}
            values = others | {column: row[name] for column, name in called.items()}
            values["split"] = _side(values.get("split", ""), f"{where} row {number}")
            identity = _without_ending(value) if picture_stem(value) is not None else value
            identity = identity.replace("\\", "/").removeprefix("images/")
            mask = values.get("mask", "")
            if mask:
                found = self.find(mask, ("", "masks"))
                if not found:
                    raise UserError(f"{where} row {number}: mask {mask} is not in {source}")
                mask = found
            else:
                mask = self.mask_of(identity)
            entries.append(Entry(identity, file, mask, values))
            if not file:
                missing.append(entries[-1])
        self._tell_missing(entries, missing, where, source, key)
        twice = [name for name, count in Counter(e.id for e in entries).items() if count > 1]
        if twice:
            raise UserError(f"{where} lists image {twice[0]} more than once")
        return [entry for entry in entries if entry.image]

    def _tell_missing(
        self,
        entries: Sequence[Entry],
        missing: Sequence[Entry],
        where: str,
        source: Path,
        key: str,
    ) -> None:
        """Warns of sites of which all images are missing; these sites are left out.

        Raises:
            UserError: Only some images of a site are missing, or no image is present at all.
        """
        if not missing:
            return
        present = {entry.values.get("site", "") for entry in entries if entry.image}
        partly = [entry for entry in missing if entry.values.get("site", "") in present]
        if partly or not present:
            raise UserError(
                f"{key}: image {missing[0].id} of {where.split(': ', 1)[1]} is not in {source} "
                f"({len(missing)} of {len(entries)} are missing)"
            )
        absent = sorted({entry.values["site"] for entry in missing})
        logger.warning("%s: %s has no image of sites %s: left out", key, source, first_of(absent))


def _side(value: str, where: str) -> str:
    if is_unknown(value):
        return ""
    if value.lower() not in SPLITS:
        raise UserError(f"{where}: split {value!r} must be train, validation or test")
    return SPLITS[value.lower()]


def _without_ending(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")).with_suffix(""))
