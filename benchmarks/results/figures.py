"""Draws the gains of a study: each method's, with its interval, by the size of hospitals."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.results.collect import METRICS, SMALL, head, shown_groups, told
from fedhelp_jax.report.verdict.rules import ALONE, AS_RUN, GLOBAL
from fedhelp_jax.typing import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _ROW, _FRAME = 9.0, 0.21, 1.3  # inches
# Intervals that reach this many times as far as four in five of them are cut.
_FAR = 3
# Colours of Okabe and Ito, which colour-blind readers can distinguish.
_TOLD, _UNCLEAR, _BROADCAST = "#0072B2", "#999999", "#D55E00"


def drawn(found: JsonObject) -> dict[str, str]:
    """Returns an SVG figure of each data set on which a study compares methods, by its name."""
    return {data: _figure(found, data) for data in dict.fromkeys(r["data"] for r in found["rows"])}


def _figure(found: JsonObject, data: str) -> str:
    """Returns the gains in the first metric: a panel for each group of hospitals."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["data"] == data]
    metric = next(name for name in METRICS if any(row["metric"] == name for row in rows))
    cells = {(r["method"], r["rule"], r["group"]): r for r in rows if r["metric"] == metric}
    counts = found["groups"][data]
    groups = shown_groups(counts)
    over = "staying alone" if found["against"] == ALONE else found["against"]
    small = {m: cells.get((m, AS_RUN, SMALL), {"value": -1}) for m, *_ in cells}
    methods = sorted(small, key=lambda method: small[method]["value"])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": data, "font.size": 8}):
        canvas = Figure(figsize=(_WIDTH, _FRAME + _ROW * len(methods)), layout="constrained")
        FigureCanvasAgg(canvas)
        panels = canvas.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
        shown = [row for (_, rule, _), row in cells.items() if rule in (AS_RUN, GLOBAL)]
        panels[0].set_xlim(_limits(shown))
        for panel, group in zip(panels, groups, strict=True):
            own = {method: cells.get((method, AS_RUN, group)) for method in methods}
            _panel(panel, own)
            _beyond(panel, own)
            theirs = [f"{row['theirs']:.3f}" for row in own.values() if row]
            panel.set_title(
                f"{head(group, counts)}\n{over}: {theirs[0] if theirs else '-'}", fontsize=8
            )
        broadcast = _broadcast(panels[-1], methods, cells)
        panels[0].set_yticks(range(len(methods)), methods)
        label = f"gain over {over} in {METRICS[metric]}, with 95 % intervals; blue if 0 is outside"
        label += "; red: if the broadcast network is deployed" * broadcast
        canvas.supxlabel(label, fontsize=8)
        svg = io.StringIO()
        about = {"Date": None, "Description": _fingerprint(found)}
        canvas.savefig(svg, format="svg", metadata=about)
    return "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"


def _fingerprint(found: JsonObject) -> str:
    """Returns what a figure says about the summary and the code that it was drawn from."""
    text = json.dumps(found, sort_keys=True) + Path(__file__).read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def _panel(panel: "Axes", gains: Mapping[str, JsonObject | None]) -> None:
    """Draws each method's gain and interval, in colour if the interval is without 0."""
    panel.axvline(0, color="black", linewidth=0.6)
    known = [(place, row) for place, row in enumerate(gains.values()) if row is not None]
    places, rows = [place for place, _ in known], [row for _, row in known]
    colors = [_TOLD if any(told(row)) else _UNCLEAR for row in rows]
    ends = ([row[end] for row in rows] for end in ("low", "high"))
    panel.hlines(places, *ends, colors=colors, linewidth=1.2)
    panel.scatter([row["value"] for row in rows], places, c=colors, s=12, zorder=3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
    panel.tick_params(labelsize=7)
    panel.locator_params(axis="x", nbins=4)


def _limits(rows: Sequence[JsonObject]) -> tuple[float, float]:
    """Returns what the panels show: 0 and all intervals, but not those far beyond most others."""
    ends = np.array([[row["low"], row["high"]] for row in rows])
    most = _FAR * np.quantile(np.abs(ends), 0.8)
    low, high = np.clip([min(0, ends.min()), max(0, ends.max())], -most, most)
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def _beyond(panel: "Axes", gains: Mapping[str, JsonObject | None]) -> None:
    """Marks intervals that do not end in a panel, with the value if it is outside too."""
    low, high = panel.get_xlim()
    for place, row in enumerate(gains.values()):
        if row is None:
            continue
        inside = low <= row["value"] <= high
        value = "" if inside else f"{row['value']:+.2f}"
        style = {"va": "center", "fontsize": 7, "bbox": {"color": "white", "pad": 0.3}}
        if row["low"] < low and (inside or row["value"] < low):
            panel.text(low, place, f"\u2190 {value}".strip(), ha="left", **style)
        if row["high"] > high and (inside or row["value"] > high):
            panel.text(high, place, f"{value} \u2192".strip(), ha="right", **style)


def _broadcast(
    panel: "Axes", methods: Sequence[str], cells: Mapping[tuple[str, str, str], JsonObject]
) -> bool:
    """Adds the gains with the broadcast network, and returns whether any of them differ."""
    found = []
    for place, method in enumerate(methods):
        own, other = (cells.get((method, rule, SMALL)) for rule in (AS_RUN, GLOBAL))
        if own and other and own["value"] != other["value"]:
            found.append((other["value"], place))
    if found:
        places = zip(*found, strict=True)
        panel.scatter(*places, s=16, marker="d", c="none", edgecolors=_BROADCAST, zorder=3)
    return bool(found)
