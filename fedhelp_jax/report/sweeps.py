"""Writes the table and the pictures of a sweep."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedhelp_jax.core.storage import replaced
from fedhelp_jax.report import numbers, run_files
from fedhelp_jax.report.tables import Cell, Grid
from fedhelp_jax.typing import Record

_MEASURES = ("small_mean", "large_mean", "worst_small", "gap")
_ROLES = ("small_mean", "large_mean")
_MOST_TICKS = 8
_MOST_SETTINGS = 10
_COLOURS = ("#0072b2", "#d55e00", "#56b4e9", "#777777")


def write_sweep(folder: Path, swept: Sequence[str], table: Sequence[Record], split: str) -> None:
    """Writes ``runs.csv``, a picture per swept name and, if pyarrow is installed, ``runs.parquet``.

    Args:
      folder: Folder for the files.
      swept: The swept names, which are columns of the table.
      table: One row per run.
      split: The split of the evaluation, for the pictures.
    """
    columns = list(dict.fromkeys(name for row in table for name in row))
    run_files.write_csv(folder / "runs.csv", columns, table)
    if find_spec("pyarrow") is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [run_files.plain(row) for row in table]
        with replaced(folder / "runs.parquet") as beside:
            pq.write_table(pa.Table.from_pylist(rows), beside)
    for name in swept:
        if len({row[name] for row in table}) > 1:
            draw(folder / f"{name}.png", name, table, split)


def best_settings(table: Sequence[Record], swept: Sequence[str]) -> Grid:
    """Returns the table of the best settings, by the mean over the roles and then over seeds.

    Args:
      table: One row per run.
      swept: The swept names, of which "seed" is not a setting.
    """
    names = [name for name in swept if name != "seed"]
    by_point: dict[tuple, list[Record]] = {}
    for row in table:
        by_point.setdefault(tuple(row[name] for name in names), []).append(row)

    def score(rows: Sequence[Record]) -> float:
        means = [numbers.mean_and_spread([row[m] for row in rows])[0] for m in _ROLES]
        known = [mean for mean in means if np.isfinite(mean)]
        return float(np.mean(known)) if known else -np.inf

    ranked = sorted(by_point.items(), key=lambda item: -score(item[1]))
    rows = [
        [*(Cell(str(value)) for value in point), *(_spread(own, m) for m in _MEASURES)]
        for point, own in ranked[:_MOST_SETTINGS]
    ]
    metric, split = str(table[0]["metric"]).replace("_", " "), table[0]["split"]
    notes = ["Best first, by the mean of small and large mean."]
    if len(ranked) > len(rows):
        notes.append(f"{len(ranked) - len(rows)} more settings are in runs.csv.")
    heads = [*names, *(measure.replace("_", " ") for measure in _MEASURES)]
    return Grid(f"{metric} on {split} images", heads, rows, notes)


def _spread(rows: Sequence[Record], measure: str) -> Cell:
    return Cell(numbers.spread_text(*numbers.mean_and_spread([row[measure] for row in rows])))


def draw(path: Path, name: str, table: Sequence[Record], split: str) -> None:
    """Draws each metric against one swept name, with a dot per run and the means.

    Args:
      path: The picture.
      name: The swept name.
      table: One row per run.
      split: The split of the evaluation.
    """
    # Imported here because it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = sorted({row[name] for row in table}, key=lambda v: (isinstance(v, str), v))
    numeric = all(isinstance(value, int | float) for value in values)
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_MEASURES))
    for axis, measure, colour in zip(axes, _MEASURES, _COLOURS, strict=True):
        places = values if numeric else range(len(values))
        means = []
        for place, value in zip(places, values, strict=True):
            found = [row[measure] for row in table if row[name] == value]
            known = [float(v) for v in found if v is not None and np.isfinite(v)]
            axis.plot([place] * len(known), known, ".", color=colour, alpha=0.35)
            means.append(np.mean(known) if known else np.nan)
        axis.plot(places, means, "-o" if numeric else "o", color=colour, markersize=4)
        axis.set_title(measure.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        if numeric and min(values) > 0 and max(values) / min(values) >= 8:
            axis.set_xscale("log")
        if len(values) <= _MOST_TICKS:
            texts = [f"{value:g}" if numeric else str(value) for value in values]
            axis.set_xticks(list(places), texts, rotation=30 if max(map(len, texts)) > 3 else 0)
            axis.minorticks_off()
    metric = str(table[0]["metric"]).replace("_", " ")
    figure.supxlabel(name, fontsize=9)
    figure.supylabel(f"{split} {metric}", fontsize=8)
    run_files.write_figure(path, figure)
