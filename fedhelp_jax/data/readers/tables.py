"""Tables of values separated by commas or tabs, and the values that mean "unknown"."""

import csv
import io
from collections import Counter
from collections.abc import Sequence

from fedhelp_jax.core.errors import UserError

# Representations of a missing value in pandas, R and spreadsheets, in lower case.
_UNKNOWN = frozenset(
    ("", "nan", "-nan", "na", "n/a", "<na>", "#na", "#n/a", "#n/a n/a", "1.#qnan", "-1.#qnan")
    + ("1.#ind", "-1.#ind", "nat", "none", "null", "nil", "unknown", "-", "?")
)


def is_unknown(value: str) -> bool:
    """Returns whether a value of a table means that it is unknown.

    >>> [is_unknown(value) for value in ("", " NaN ", "N/A", "null", "HAM_0000118", "0")]
    [True, True, True, True, False, False]
    """
    return value.strip().lower() in _UNKNOWN


def group_of(value: str, example: str) -> str:
    """Returns the group (patient, lesion) of an example, or a group of its own if it is unknown.

    Args:
        value: The group, as stated in a table.
        example: The unique name of the example.

    >>> group_of("HAM_1", "a"), group_of("nan", "b")
    ('HAM_1', 'image b')
    """
    # Prefixed, so that the name of an image never equals the name of a group.
    return f"image {example}" if is_unknown(value) else value.strip()


def read_table(
    data: bytes, needed: Sequence[str], where: str
) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the names of the columns, and the rows by these names, stripped of whitespace.

    Values missing at the end of a short row are "".

    Args:
        data: The file: UTF-8, separated by tabs if its first line has any, otherwise by commas.
        needed: Columns that the table must have; ``a|b`` is a column with either name, which is
            called ``a`` in the rows.
        where: Key and file, for messages.

    Raises:
        UserError: The file is not such a table, lacks a column or rows, names a column twice, or
            has a row with more values than there are columns.
    """
    try:
        text = data.decode("utf-8-sig")
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter == ","
        )
        lines = [(reader.line_num, [value.strip() for value in line]) for line in reader]
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{where} cannot be read as a CSV file") from None
    lines = [(number, line) for number, line in lines if any(line)]
    columns = _without_end(lines[0][1]) if lines else []
    for name, count in Counter(columns).items():
        if count > 1:
            raise UserError(f"{where} has {count} columns called {name!r}")
    called = {}
    for names in needed:
        found = next((name for name in names.split("|") if name in columns), None)
        if found is None:
            said = " or ".join(names.split("|"))
            raise UserError(f"{where} has no column {said}; it has {', '.join(columns) or 'none'}")
        called[names.split("|")[0]] = found
    rows = []
    for number, line in lines[1:]:
        if any(line[len(columns) :]):
            raise UserError(
                f"{where} line {number} has {len(_without_end(line))} values, but there are "
                f"{len(columns)} columns; values that hold the separator need quotes around them"
            )
        row = dict(zip(columns, line + [""] * (len(columns) - len(line)), strict=False))
        rows.append(row | {name: row[found] for name, found in called.items()})
    if not rows:
        raise UserError(f"{where} has no rows")
    return columns, rows


def _without_end(line: Sequence[str]) -> list[str]:
    """Returns the values of a line without the empty ones that spreadsheets append at its end."""
    count = max((place for place, value in enumerate(line, start=1) if value), default=0)
    return list(line[:count])
