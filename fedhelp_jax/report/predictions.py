"""What every deployed model said about every example, in ``predictions.csv.gz``.

Confusion matrices, calibration, thresholds and intervals are computed from this file, without data
or networks.
"""

import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import replaced

PREDICTIONS = "predictions.csv.gz"

_KEYS = ("client", "role", "model", "split", "example", "label")
_LOGIT = "logit "


class Predictions(NamedTuple):
    """The predictions of one model for one client's split.

    Attributes:
      client: Name of the client.
      role: "small" or "large".
      model: Name of the deployed model: "personal", "global", ...
      split: "validation" or "test".
      examples: ``[n]`` rows of the data set.
      labels: ``[n]`` true classes.
      logits: ``[n, C]``.
    """

    client: str
    role: str
    model: str
    split: str
    examples: np.ndarray
    labels: np.ndarray
    logits: np.ndarray


def write_predictions(
    path: Path, predictions: Iterable[Predictions], label_names: Sequence[str]
) -> None:
    """Writes a compressed table, one row per client, model, split and example.

    The columns are ``client``, ``role``, ``model``, ``split``, ``example`` (the row of the data
    set), ``label`` (the true class, as a number), and a ``logit <class>`` for each class.

    Args:
      path: The file.
      predictions: The predictions.
      label_names: ``[C]`` names of the classes.
    """
    with replaced(path) as beside, beside.open("wb") as file:
        # Without a time in the header, the same run writes the same bytes.
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0, compresslevel=6) as whole:
            text = io.TextIOWrapper(whole, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow([*_KEYS, *(f"{_LOGIT}{name}" for name in label_names)])
            for p in predictions:
                own = (p.client, p.role, p.model, p.split)
                rows = zip(p.examples.tolist(), p.labels.tolist(), p.logits.tolist(), strict=True)
                writer.writerows(
                    (*own, example, label, *(f"{logit:.7g}" for logit in logits))
                    for example, label, logits in rows
                )
            text.close()


def read_predictions(path: Path) -> tuple[list[Predictions], list[str]]:
    """Returns the predictions in a file, and the names of the classes.

    Raises:
      UserError: If the file is damaged or has other columns.
    """
    groups: dict[tuple[str, str, str, str], list[list[str]]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header[: len(_KEYS)]) != _KEYS:
                raise UserError(f"{path}: its columns must begin with {', '.join(_KEYS)}")
            for row in reader:
                client, role, model, split, *rest = row
                groups.setdefault((client, role, model, split), []).append(rest)
            found = [_parsed(key, rows) for key, rows in groups.items()]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return found, [name.removeprefix(_LOGIT) for name in header[len(_KEYS) :]]


def _parsed(key: tuple[str, str, str, str], rows: list[list[str]]) -> Predictions:
    numbers = np.array(rows, dtype=np.float64)
    examples, labels = numbers[:, 0].astype(np.int64), numbers[:, 1].astype(np.int64)
    return Predictions(*key, examples, labels, numbers[:, 2:])


def of_run(
    groups: Sequence[Any],
    labels: np.ndarray,
    logits: Mapping[str, Mapping[str, Mapping[str, Sequence[np.ndarray]]]],
) -> Iterator[Predictions]:
    """Yields the predictions of an evaluated run.

    Args:
      groups: The clients by role.
      labels: ``[N]`` labels of the data set.
      logits: ``{split: {role: {model: one [n, C] per client}}}``.
    """
    for split, by_role in logits.items():
        for group in groups:
            table = getattr(group, split)
            index, size = np.asarray(table.index), np.asarray(table.size)
            for model, stacked in by_role[group.role].items():
                for row, (client, own) in enumerate(zip(group.names, stacked, strict=True)):
                    examples = index[row, : size[row]]
                    yield Predictions(
                        client, group.role, model, split, examples, labels[examples], own
                    )
