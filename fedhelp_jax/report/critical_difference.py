"""The critical-difference diagram of Demsar (JMLR 2006, fig. 1), drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.report import run_files


def critical_difference_diagram(
    path: Path, names: Sequence[str], ranks: np.ndarray, distance: float
) -> None:
    """Draws methods on an axis of average ranks; bars join methods that do not differ.

    Args:
      path: The picture; its suffix determines the file format.
      names: The methods, best first.
      ranks: Their average ranks, ascending.
      distance: The critical difference, by which two ranks must differ.
    """
    # Imported here because it takes a second and only comparisons over several data sets need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = cliques(ranks, distance)
    half = -(-len(names) // 2)
    top, line = 0.35 * (len(groups) + 1), 0.4
    height = top + line * (half + 1)
    figure = Figure(figsize=(7, 1.0 + 0.62 * height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.22, 0.02, 0.56, 0.86))
    axes.set_xlim(0.8, len(names) + 0.2)
    axes.set_ylim(height, -0.9)
    axes.xaxis.set_ticks_position("top")
    axes.spines["top"].set_position(("data", 0))
    for side in ("left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks(range(1, len(names) + 1))
    axes.set_title("average rank", fontsize=9, pad=2)
    for number, (first, last) in enumerate(groups):
        y = 0.35 * (number + 1)
        ends = (ranks[first] - 0.05, ranks[last] + 0.05)
        axes.plot(ends, (y, y), color="black", linewidth=3, solid_capstyle="butt")
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        # The better half is listed on the left, from the top; the others on the right, from below.
        left = i < half
        y = top + line * (i if left else len(names) - 1 - i)
        edge = 0.7 if left else len(names) + 0.3
        axes.plot((rank, rank, edge), (0, y, y), color="0.35", linewidth=0.8, clip_on=False)
        axes.annotate(
            f"{name} {rank:.2f}" if left else f"{rank:.2f} {name}",
            (edge, y),
            xytext=(-3 if left else 3, 0),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            verticalalignment="center",
            fontsize=9,
            annotation_clip=False,
        )
    shown = min(distance, len(names) - 1)
    axes.annotate(
        f"critical difference {distance:.2f}" + (", all of the axis" if shown < distance else ""),
        ((1 + 1 + shown) / 2, height - 0.15),
        horizontalalignment="center",
        fontsize=8,
    )
    axes.plot((1, 1 + shown), (height - 0.05,) * 2, color="black", linewidth=1, clip_on=False)
    run_files.write_figure(path, figure)


def cliques(ranks: np.ndarray, distance: float) -> list[tuple[int, int]]:
    """Returns the longest runs ``(first, last)`` of at least two ranks within the distance.

    Example:
      >>> cliques(np.array([1.0, 1.5, 2.4, 4.0]), 1.0)
      [(0, 1), (1, 2)]
    """
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = int(np.searchsorted(ranks, ranks[first] + distance, side="right")) - 1
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
