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
    """Writes `SHARES`, the table and the picture.

    Args:
      folder: Where to.
      dataset: The data. Of masks those are counted that show a class, and drawn are sizes only.
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
            for name, count in zip(dataset.label_names, counts.tolist(), strict=True):
                row[f"class {name}" if name in row else name] = count
            rows.append(row)
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
    from matplotlib.patches import Patch

    names = [client.name for client in dataset.clients]
    if dataset.labels.ndim == 1:
        labels = dataset.label_names
        counts = np.array([_counts(dataset, client.train) for client in dataset.clients])
    else:
        labels = ()
        counts = np.array([[len(client.train)] for client in dataset.clients])
    bars = len(names) <= _MOST_BARS
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(names) if bars else 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colours = colormaps["tab20"](np.arange(counts.shape[1]) % 20)
    if bars:
        for label, count in enumerate(counts.T):
            axis.barh(names, count, left=counts[:, :label].sum(1), color=colours[label])
        axis.invert_yaxis()
        axis.set_xlabel("training images")
    else:
        order = np.argsort(-counts.sum(1), kind="stable")
        axis.stackplot(np.arange(len(names)), counts[order].T, colors=colours)
        axis.set_xlabel("clients, the largest first")
        axis.set_ylabel("training images")
    axis.spines[["top", "right"]].set_visible(False)
    if 0 < len(labels) <= _MOST_NAMES:
        handles = [
            Patch(color=colour, label=name) for colour, name in zip(colours, labels, strict=True)
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    files.write_figure(path, figure)
