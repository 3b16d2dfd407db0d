"""Who has what: examples of each class, by client and split, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.data.types import FederatedDataset
from fedhelp_jax.report import files

SHARES = ("shares.csv", "shares.png")

_MOST_BARS, _MOST_NAMES = 60, 40

_SPLITS = ("train", "validation", "test")


def write_shares(folder: Path, dataset: FederatedDataset, roles: Sequence[str]) -> None:
    """Writes `SHARES`, the table and the picture of a classification data set.

    Args:
      folder: Where to.
      dataset: The data, labels ``[N]``.
      roles: The clients' roles, in their order.
    """
    rows = share_rows(dataset, roles)
    table, picture = SHARES
    files.write_csv(folder / table, list(rows[0]), rows)
    _draw(folder / picture, dataset)


def share_rows(dataset: FederatedDataset, roles: Sequence[str]) -> list[dict[str, Any]]:
    """A row per client and split: ``client``, ``role``, ``split``, ``examples``, and each class."""
    rows = []
    for client, role in zip(dataset.clients, roles, strict=True):
        for split, members in zip(_SPLITS, client[1:], strict=True):
            counts = _counts(dataset, members)
            row = {"client": client.name, "role": role, "split": split, "examples": len(members)}
            rows.append(row | dict(zip(dataset.label_names, counts.tolist(), strict=True)))
    return rows


def _counts(dataset: FederatedDataset, members: np.ndarray) -> np.ndarray:
    labels, names = dataset.labels[members], dataset.label_names
    if labels.ndim == 1:
        return np.bincount(labels, minlength=len(names))
    first = 1 if len(names) == 1 else 0  # a single name is the foreground's
    axes = tuple(range(1, labels.ndim))
    return np.array([(labels == first + i).any(axes).sum() for i in range(len(names))])


def _draw(path: Path, dataset: FederatedDataset) -> None:
    """A bar per client of its training examples, coloured by class; of many, one wide band."""
    # Here, because it takes a second.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [client.name for client in dataset.clients]
    counts = np.array([_counts(dataset, client.train) for client in dataset.clients])
    bars = len(names) <= _MOST_BARS
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(names) if bars else 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colours = colormaps["tab20"](np.arange(len(dataset.label_names)) % 20)
    if bars:
        for label, name in enumerate(dataset.label_names):
            left = counts[:, :label].sum(1)
            axis.barh(names, counts[:, label], left=left, label=name, color=colours[label])
        axis.invert_yaxis()
        axis.set_xlabel("training images")
    else:
        order = np.argsort(-counts.sum(1), kind="stable")
        axis.stackplot(
            np.arange(len(names)), counts[order].T, labels=dataset.label_names, colors=colours
        )
        axis.set_xlabel("clients, the largest first")
        axis.set_ylabel("training images")
    axis.spines[["top", "right"]].set_visible(False)
    if len(dataset.label_names) <= _MOST_NAMES:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
