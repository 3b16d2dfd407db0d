"""The examples of each class, by client and split, as a table and a picture.

Unusable examples, which no client gets, are listed separately.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.data.bad_examples import QUARANTINE, BadExample
from fedhelp_jax.data.types import FederatedDataset, PublicDataset
from fedhelp_jax.report import run_files
from fedhelp_jax.typing import JsonObject

SHARES = ("shares.csv", "shares.png")

_MOST_BARS, _MOST_NAMES = 60, 40

_SPLITS = ("train", "validation", "test")


def write_shares(folder: Path, dataset: FederatedDataset, roles: Sequence[str]) -> None:
    """Writes the files in `SHARES`: the table and the picture.

    Args:
      folder: Folder for the files.
      dataset: The data. For masks, the table counts the masks that contain each class, and the
        picture shows only the number of images.
      roles: The role of each client, in the order of the clients.
    """
    rows = share_rows(dataset, roles)
    table, picture = SHARES
    run_files.write_csv(folder / table, list(rows[0]), rows)
    _draw(folder / picture, dataset)


def share_rows(dataset: FederatedDataset, roles: Sequence[str]) -> list[JsonObject]:
    """Returns one row per client and split, with the number of examples in total and by class.

    The columns are ``client``, ``role``, ``split``, ``examples``, ``left_out`` and the classes.
    ``left_out`` counts the unusable examples of that client and official split. Those of any other
    client or split have separate rows with no examples.
    """
    left_out = Counter((bad.client, bad.split) for bad in dataset.left_out)
    rows = []
    for client, role in zip(dataset.clients, roles, strict=True):
        for split, members in zip(_SPLITS, client[1:], strict=True):
            counts = _counts(dataset, members)
            row = {"client": client.name, "role": role, "split": split, "examples": len(members)}
            row["left_out"] = left_out.pop((client.name, split), 0)
            for name, count in zip(dataset.label_names, counts.tolist(), strict=True):
                row[f"class {name}" if name in row else name] = count
            rows.append(row)
    for (name, split), count in sorted(left_out.items()):
        row = {"client": name, "role": "", "split": split, "left_out": count}
        rows.append(dict.fromkeys(rows[0], 0) | row)
    return rows


def write_left_out(folder: Path, dataset: FederatedDataset, public: PublicDataset | None) -> None:
    """Writes `QUARANTINE`, the list of unusable examples, if there are any."""
    sources = {"private": dataset.left_out, "public": () if public is None else public.left_out}
    rows = [
        {"source": source, **bad._asdict()}
        for source, left_out in sources.items()
        for bad in left_out
    ]
    (folder / QUARANTINE).unlink(missing_ok=True)
    if rows:
        run_files.write_csv(folder / QUARANTINE, ("source", *BadExample._fields), rows)


def _counts(dataset: FederatedDataset, members: np.ndarray) -> np.ndarray:
    labels, names = dataset.labels[members], dataset.label_names
    if labels.ndim == 1:
        return np.bincount(labels, minlength=len(names))
    first = 1 if len(names) == 1 else 0  # a single name is that of the foreground
    axes = tuple(range(1, labels.ndim))
    return np.array([(labels == first + i).any(axes).sum() for i in range(len(names))])


def _draw(path: Path, dataset: FederatedDataset) -> None:
    """Draws the training examples by class: a bar per client, or one band for many clients."""
    # Imported here because it takes a second.
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
    run_files.write_figure(path, figure)
