"""The figures of a report, each with the table of its numbers.

Small clients are blue and round, large ones orange and square, in all of them. Figures are narrow
enough for a telephone; a wide screen shows two side by side.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.typing import JsonObject, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Colours of Okabe and Ito, which colour-blind readers can distinguish; marks serve print.
COLOURS = {"small": "#0072B2", "large": "#D55E00"}
MARKS = {"small": "o", "large": "s"}
_MOST_TICKS = 20
SERIES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
    ("#000000", "X", "-."),
    ("#999999", "*", ":"),
)
MOST_SERIES = len(SERIES)
_WIDTH = 4.6  # inches; at 96 pixels an inch a little more than a telephone's screen
_MOST_NAMED = 40  # clients that a figure can name
_MOST_CELLS = 12  # classes whose numbers fit into the cells of a matrix
_MOST_MARKS = 12  # marks on a line
_OTHER = "#666666"


class Figure(NamedTuple):
    """A figure with its numbers.

    Attributes:
      name: Name of its files.
      caption: What it shows, in one or two sentences.
      canvas: The Matplotlib figure.
      rows: Its numbers, one dict per row of the CSV file.
    """

    name: str
    caption: str
    canvas: "Canvas"
    rows: Sequence[Record]


def words(metric: str) -> str:
    """Returns the name of a metric as a reader would write it."""
    known = {"auroc": "AUROC", "ece": "calibration error", "iou": "IoU", "hd95": "HD95"}
    return known.get(metric, metric.replace("_", " "))


def learning(run: RunData) -> Figure | None:
    """Draws the headline metric on validation images by round, for every client and role."""
    measured = [row for row in run.history if row.get("clients")]
    if not measured:
        return None
    canvas, axis = _new(3.0)
    rounds = [row["round"] for row in measured]
    names = _names_by_role(run)
    rows: list[JsonObject] = []
    for role, colour in COLOURS.items():
        values = [row["clients"].get(role) or [] for row in measured]
        if not values[-1]:
            continue
        table = np.array([[np.nan if v is None else v for v in line] for line in values], float)
        alpha = float(np.clip(6 / table.shape[1], 0.06, 0.35))
        axis.plot(rounds, table, color=colour, alpha=alpha, linewidth=0.8)
        mean = _mean_of(table)
        every = max(1, len(rounds) // _MOST_MARKS)
        label = f"{role} clients, mean of {table.shape[1]}"
        axis.plot(
            rounds, mean, color=colour, marker=MARKS[role], markevery=every, ms=4, label=label
        )
        for round, line in zip(rounds, table.tolist(), strict=True):
            known = names.get(role) or [str(i) for i in range(len(line))]
            rows += [
                {"round": round, "role": role, "client": name, run.metric: value}
                for name, value in zip(known, line, strict=False)
            ]
    _labels(axis, "round", f"validation {words(run.metric)}")
    _legend(axis)
    caption = (
        f"Validation {words(run.metric)} by round. Thin lines are single clients, thick ones the "
        "mean of a role."
    )
    return Figure("learning", caption, canvas, rows)


def losses(run: RunData) -> Figure | None:
    """Draws the training loss of each role by round."""
    rows = [
        {"round": row["round"], "role": role, "loss": report.get("loss")}
        for row in run.history
        for role, report in (row.get("train") or {}).items()
    ]
    if not rows:
        return None
    canvas, axis = _new(3.0)
    for role, colour in COLOURS.items():
        own = [(r["round"], r["loss"]) for r in rows if r["role"] == role and r["loss"] is not None]
        if own:
            every = max(1, len(own) // _MOST_MARKS)
            axis.plot(
                *zip(*own, strict=True),
                color=colour,
                marker=MARKS[role],
                markevery=every,
                ms=4,
                label=f"{role} clients",
            )
    _labels(axis, "round", "training loss, mean over clients")
    _legend(axis)
    return Figure("loss", "Training loss by round.", canvas, rows)


def clients(run: RunData, intervals: Mapping[str, tuple[float, float]]) -> Figure | None:
    """Draws the headline metric of each client's deployed model, the worst first."""
    found = run.worst_first()
    if not found:
        return None
    shown = found[:_MOST_NAMED]
    canvas, axis = _new(1.0 + 0.2 * max(4, len(shown)))
    for role, colour in COLOURS.items():
        own = [(i, c) for i, c in enumerate(shown) if c["role"] == role]
        if not own:
            continue
        places, values = [i for i, _ in own], [c["metrics"][run.metric] for _, c in own]
        axis.plot(values, places, MARKS[role], color=colour, ms=5, label=f"{role} clients")
        for place, client in own:
            low, high = intervals.get(client["name"], (np.nan, np.nan))
            axis.plot([low, high], [place, place], color=colour, linewidth=1.2, alpha=0.7)
    axis.set_yticks(range(len(shown)), [str(c["name"]) for c in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    split = run.summary.get("split", "test")
    _labels(axis, f"{split} {words(run.metric)}", "")
    _legend_below(canvas)
    left = (
        f" The other {len(found) - len(shown)} clients are better." if found[len(shown) :] else ""
    )
    band = " Lines are 95 % intervals over test images." if intervals else ""
    caption = f"The model that each client deploys, the worst client first.{band}{left}"
    rows = [
        {
            "client": c["name"],
            "role": c["role"],
            run.metric: c["metrics"][run.metric],
            "low": intervals.get(c["name"], (None, None))[0],
            "high": intervals.get(c["name"], (None, None))[1],
        }
        for c in found
    ]
    return Figure("clients", caption, canvas, rows)


def confusions(run: RunData, counts: Mapping[str, np.ndarray]) -> Figure | None:
    """Draws the confusion matrix of each role, over the test images of all of its clients."""
    counts = {role: c for role, c in counts.items() if c.sum()}
    if not counts:
        return None
    size, answers = len(run.classes), any(c[:, -1].any() for c in counts.values())
    columns = size + answers
    canvas, axes = _new(min(4.0, 1.3 + 0.28 * size) * len(counts), len(counts))
    for axis, (role, table) in zip(np.atleast_1d(axes), counts.items(), strict=True):
        shown = table[:, :columns]
        share = shown / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if size <= _MOST_CELLS:
            for (i, j), number in np.ndenumerate(shown):
                ink = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, str(number), ha="center", va="center", fontsize=7, color=ink)
        short = shortened(run.classes)
        axis.set_yticks(range(size), short)
        names = [*short, "none"][:columns]
        axis.set_xticks(range(columns), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_title(f"{role} clients", fontsize=9)
        axis.set_ylabel("true class")
    np.atleast_1d(axes)[-1].set_xlabel("predicted class")
    caption = "Confusion matrices: counts of test images, coloured by the share of the true class."
    rows = [
        {"role": role, "true": true, "predicted": said, "images": int(table[i, j])}
        for role, table in counts.items()
        for i, true in enumerate(run.classes)
        for j, said in enumerate([*run.classes, "none"][:columns])
    ]
    return Figure("confusion", caption, canvas, rows)


def calibration(bins: Mapping[str, Sequence[tuple[float, float, int]]]) -> Figure | None:
    """Draws accuracy against confidence for each role."""
    if not any(bins.values()):
        return None
    canvas, axis = _new(3.2)
    axis.plot([0, 1], [0, 1], color=_OTHER, linewidth=0.8, linestyle=":", label="perfect")
    rows: list[JsonObject] = []
    for role, own in bins.items():
        confidence, accuracy, images = zip(*own, strict=True)
        area = 12 + 120 * np.array(images) / max(images)
        axis.plot(confidence, accuracy, color=COLOURS[role], linewidth=1)
        axis.scatter(
            confidence,
            accuracy,
            s=area,
            color=COLOURS[role],
            marker=MARKS[role],
            label=f"{role} clients",
        )
        rows += [
            {"role": role, "confidence": c, "accuracy": a, "images": n}
            for c, a, n in zip(confidence, accuracy, images, strict=True)
        ]
    axis.set_xlim(0, 1.02)
    axis.set_ylim(-0.02, 1.02)
    _labels(axis, "confidence of the answer", "share of right answers")
    _legend(axis)
    caption = (
        "Calibration on the test images. Below the dotted line, answers are less often right than "
        "the model claims. Larger marks stand for more images."
    )
    return Figure("calibration", caption, canvas, rows)


def shares(run: RunData) -> Figure | None:
    """Draws how many training images of each class every client has."""
    rows = [row for row in run.shares if row.get("split") == "train" and row.get("role")]
    if not rows:
        return None
    fixed = ("client", "role", "split", "examples", "left_out")
    names = [name for name in rows[0] if name not in fixed]
    counts = np.array([[float(row[name]) for name in names] for row in rows])
    total = np.array([float(row["examples"]) for row in rows])
    order = np.argsort(-total, kind="stable")[:_MOST_NAMED]
    canvas, axis = _new(1.2 + 0.2 * max(4, len(order)))
    places, left = np.arange(len(order)), np.zeros(len(order))
    # Masks may contain several classes, so that shares would not add up to the images.
    stacked = np.allclose(counts.sum(1), total)
    parts = [("", total[order])]
    if stacked:
        parts = list(zip(shortened(names), counts[order].T, strict=True))
    for number, (name, count) in enumerate(parts):
        colour, hatch = _SHADES[number % len(_SHADES)], "" if number < len(_SHADES) else "///"
        bars = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
        axis.barh(places, count, left=left, label=name, **bars)
        left = left + count
    axis.set_yticks(places, [f"{rows[i]['client']} ({rows[i]['role']})" for i in order])
    axis.set_ylim(len(order) - 0.5, -0.5)
    _labels(axis, "training images", "")
    if stacked and len(names) <= 2 * len(_SHADES):
        _legend_below(canvas)
    more = f", the {len(order)} largest of {len(rows)}" if len(rows) > len(order) else ""
    by_class = ", by class" if stacked else ""
    return Figure("classes", f"Training images of the clients{more}{by_class}.", canvas, rows)


_SHADES = (*(colour for colour, *_ in SERIES[:6]), "#F0E442", "#999999")


def learning_of_methods(runs: Sequence[RunData]) -> Figure | None:
    """Draws the mean of the small clients by round, a line per method and a band over seeds."""
    series: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for row in run.history:
            if row.get("small_mean") is not None:
                by_round = series.setdefault(run.label, {})
                by_round.setdefault(int(row["round"]), []).append(float(row["small_mean"]))
    if not series:
        return None
    canvas, axis = _new(3.8)
    rows: list[JsonObject] = []
    for (method, by_round), style in zip(series.items(), SERIES, strict=False):
        colour, mark, line = style
        rounds = sorted(by_round)
        values = [by_round[r] for r in rounds]
        every = max(1, len(rounds) // _MOST_MARKS)
        mean = [float(np.mean(v)) for v in values]
        style = {"color": colour, "marker": mark, "linestyle": line, "ms": 4}
        axis.plot(rounds, mean, markevery=every, label=method, linewidth=1.2, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(rounds, low, high, color=colour, alpha=0.12, linewidth=0)
        rows += [
            {"method": method, "round": r, "mean": m, "low": a, "high": b, "runs": len(v)}
            for r, m, a, b, v in zip(rounds, mean, low, high, values, strict=True)
        ]
    _labels(axis, "round", f"validation {words(runs[0].metric)}")
    _legend_below(canvas)
    caption = "Mean of the small clients on validation images by round."
    if len({run.seed for run in runs}) > 1:
        caption += " Bands reach from the lowest to the highest seed."
    if len(series) > MOST_SERIES:
        caption += f" {len(series) - MOST_SERIES} methods with lower means are not drawn."
    return Figure("methods", caption, canvas, rows)


def clients_of_methods(runs: Sequence[RunData]) -> Figure | None:
    """Draws each client's metric under each method, the worst client of the first method first."""
    values: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, str] = {}
    for run in runs:
        for client in run.worst_first():
            own = values.setdefault(client["name"], {})
            own.setdefault(run.label, []).append(client["metrics"][run.metric])
            kinds.setdefault(client["name"], f"{client['role']}, {client.get('n_test')} images")
    methods = list(dict.fromkeys(run.label for run in runs))
    if not values or len(methods) < 2:
        return None
    worst = sorted(values, key=lambda name: np.mean(values[name].get(methods[0], [np.inf])))
    shown = worst[:_MOST_NAMED]
    canvas, axis = _new(1.4 + 0.2 * max(4, len(shown)))
    drawn = min(len(methods), len(SERIES))
    for number, (method, (colour, mark, _)) in enumerate(zip(methods, SERIES, strict=False)):
        # Beside each other, so that equal values do not hide each other.
        aside = 0.5 * (number - (drawn - 1) / 2) / drawn
        own = [
            (np.mean(values[c][method]), i + aside)
            for i, c in enumerate(shown)
            if method in values[c]
        ]
        if own:
            axis.plot(
                *zip(*own, strict=True),
                linestyle="",
                marker=mark,
                color=colour,
                ms=5,
                alpha=0.85,
                label=method,
            )
    axis.set_yticks(range(len(shown)), [f"{c} ({kinds[c]})" for c in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(color="#dddddd", linewidth=0.6)
    _labels(axis, f"{runs[0].summary.get('split', 'test')} {words(runs[0].metric)}", "")
    _legend_below(canvas)
    rows = [
        {"client": c, "method": m, runs[0].metric: float(np.mean(v)), "runs": len(v)}
        for c, by_method in values.items()
        for m, v in by_method.items()
    ]
    caption = f"Each client under each method, the worst client of {methods[0]} first."
    return Figure("clients_of_methods", caption, canvas, rows)


def swept(name: str, rows: Sequence[Record]) -> Figure | None:
    """Draws the means of the roles against one swept setting, a dot per run and lines of means."""
    values = list(dict.fromkeys(row[name] for row in rows))
    if len(values) < 2:
        return None
    values.sort(key=lambda v: (_as_number(v) is None, _as_number(v) or 0.0, v))
    canvas, axis = _new(3.0)
    points = []
    for key, label, (colour, mark, line) in (
        ("small_mean", "small clients, mean", SERIES[0]),
        ("worst_small", "small clients, worst", SERIES[2]),
        ("large_mean", "large clients, mean", SERIES[1]),
    ):
        means = []
        for place, value in enumerate(values):
            own = [_as_number(row[key]) for row in rows if row[name] == value]
            known = [v for v in own if v is not None]
            axis.plot([place] * len(known), known, mark, color=colour, alpha=0.3, ms=3)
            means.append(float(np.mean(known)) if known else np.nan)
            points += [{name: value, "score": key, "value": v} for v in known]
        # A line would suggest that there is something between two seeds.
        joined = "" if name == "seed" else line
        axis.plot(means, color=colour, marker=mark, linestyle=joined, ms=5, label=label)
    shown = range(0, len(values), -(-len(values) // _MOST_TICKS))
    axis.set_xticks(shown, [_short(str(values[place])) for place in shown])
    _labels(axis, name, words(str(rows[0].get("metric", ""))))
    _legend(axis)
    caption = f"Small dots are single runs, large marks their means for each value of {name}."
    return Figure(f"sweep_{name}", caption, canvas, points)


def _as_number(text: Any) -> float | None:
    try:
        found = float(text)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None


def _names_by_role(run: RunData) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for client in run.summary.get("per_client") or []:
        names.setdefault(client["role"], []).append(client["name"])
    return names


def _mean_of(table: np.ndarray) -> np.ndarray:
    known = np.isfinite(table)
    total = np.where(known, table, 0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(table), np.nan), where=known.any(1))


def _new(height: float, rows: int = 1) -> tuple[Any, Any]:
    """Returns a figure of the usual width and its axes."""
    # Imported here because it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return canvas, axes


def _labels(axis: "Axes", x: str, y: str) -> None:
    if x == "round":
        axis.locator_params(axis="x", integer=True)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def _legend(axis: "Axes") -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def _legend_below(canvas: "Canvas") -> None:
    canvas.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=3)


def _short(name: str, most: int = 18) -> str:
    """Returns a name, without its middle if it is long."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[len(name) - half + 1 :]}"


def shortened(names: Sequence[str]) -> list[str]:
    """Returns names without the words that all of them begin with, and not too long."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    cut = max(common.rfind(mark) + 1 for mark in " _-")
    return [_short(name[cut:]) for name in names]
