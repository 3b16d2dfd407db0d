"""Reads and writes the files of a run folder.

However a run ends, each file holds either its old or its new content.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import append_line, replaced
from fedhelp_jax.typing import JsonObject, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG, METRICS, CLIENTS, SUMMARY = "config.json", "metrics.jsonl", "clients.csv", "summary.json"

CLIENT_COLUMNS = ("client", "role", "model", "split", "metric", "value")


def prepare_folder(folder: Path) -> None:
    """Creates the run folder if it is missing, and checks that a file can be written there.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={folder}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def plain(value: Any) -> Any:
    """Returns `value` in a form that JSON can hold: arrays as lists, NaN and infinities as None.

    Example:
        >>> plain({"auroc": float("nan"), "shape": (2, 3)})
        {'auroc': None, 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy or JAX array or scalar
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON; the old file is kept until the new one is complete."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def append_metrics(path: Path, row: Record) -> None:
    """Appends one line to ``metrics.jsonl``."""
    append_line(path, json.dumps(plain(row), allow_nan=False))


def read_metrics(path: Path, last_round: float = math.inf) -> list[JsonObject]:
    """Returns the rows of ``metrics.jsonl``, except for an incomplete last line.

    Args:
        path: the file.
        last_round: later rows are left out; a killed run may have written more than it saved.

    Raises:
        UserError: Another line is not a JSON object with a round.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["round"] = int(row["round"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} must be a JSON object with a round") from None
        rows.append(row)
    return [row for row in rows if row["round"] <= last_round]


def cut_metrics(path: Path, last_round: int) -> None:
    """Removes all rows after `last_round` from ``metrics.jsonl``, where the run resumes."""
    if path.exists():
        kept = read_metrics(path, last_round)
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Record]) -> None:
    """Writes a CSV table; undefined values are left empty.

    Args:
        path: the file.
        columns: names of the columns, in order.
        rows: dicts with these keys.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(row) for row in rows)
    write_text(path, text.getvalue())


def read_summary(folder: Path) -> JsonObject:
    """Returns the ``summary.json`` of a finished run.

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); is {folder} the folder of a finished run?"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: must be a JSON object")
    return summary


def write_text(path: Path, text: str) -> None:
    """Writes a text file; the old file is kept until the new one is complete."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: "Figure") -> None:
    """Writes a Matplotlib figure in the format of the path's suffix; see `write_text`."""
    with replaced(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=150)
