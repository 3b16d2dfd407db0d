"""The Dice of each test image, in ``dice.csv``, from which intervals are computed."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report import run_files

DICE = "dice.csv"

_KEYS = ("client", "role", "example", "dice")


class ExampleDice(NamedTuple):
    """The Dice of a client's deployed model on each of its test images.

    Attributes:
      client: Name of the client.
      role: "small" or "large".
      examples: ``[n]`` rows of the data set.
      dice: ``[n]`` means over the foreground classes that are in the true or the predicted mask;
        NaN where there is none in either.
    """

    client: str
    role: str
    examples: np.ndarray
    dice: np.ndarray


def dice_of_examples(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Returns the headline Dice of each example, as `fedhelp_jax.metrics.segmentation_metrics` has.

    Args:
      predicted: ``[n, *spatial]`` predicted classes.
      truth: ``[n, *spatial]`` true classes.
      classes: The number of classes, of which 0 is the background; 1 counts as 2.

    Returns:
      ``[n]`` means over the foreground classes of an example; NaN for an example without any.
    """
    by_class = []
    for c in range(1, max(2, classes)):
        axes = tuple(range(1, truth.ndim))
        both = ((predicted == c) & (truth == c)).sum(axes)
        either = (predicted == c).sum(axes) + (truth == c).sum(axes)
        by_class.append(np.where(either > 0, 2 * both / np.maximum(either, 1), np.nan))
    values = np.array(by_class)
    counted = np.isfinite(values)
    mean = np.nansum(values, 0) / np.maximum(counted.sum(0), 1)
    return np.where(counted.any(0), mean, np.nan)


def write_dice(path: Path, found: Sequence[ExampleDice]) -> None:
    """Writes one row per client and test image: ``client, role, example, dice``."""
    rows = [
        (own.client, own.role, example, None if np.isnan(dice) else f"{dice:.6g}")
        for own in found
        for example, dice in zip(own.examples.tolist(), own.dice.tolist(), strict=True)
    ]
    run_files.write_csv(path, _KEYS, [dict(zip(_KEYS, row, strict=True)) for row in rows])


def read_dice(path: Path) -> list[ExampleDice]:
    """Returns what `write_dice` wrote.

    Raises:
      UserError: If the file is damaged or has other columns.
    """
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, [])) != _KEYS:
                raise UserError(f"{path}: its columns must be {', '.join(_KEYS)}")
            for client, role, example, dice in reader:
                row = int(example), float(dice or "nan")
                groups.setdefault((client, role), []).append(row)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return [
        ExampleDice(*key, np.array([e for e, _ in rows]), np.array([d for _, d in rows]))
        for key, rows in groups.items()
    ]
