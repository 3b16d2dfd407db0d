"""The tables of a study's summary, and the guard's record over all of them, in Markdown."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.results.collect import METRICS, OURS, SMALL, head, shown_groups, told
from fedhelp_jax.report.comparison import POOLS_DATA
from fedhelp_jax.report.statistics import holm
from fedhelp_jax.report.verdict.rules import ALONE, AS_RUN, BEST, GLOBAL, GUARDED
from fedhelp_jax.typing import JsonObject

# The rules that the guard's record compares.
_JUDGED = (AS_RUN, GLOBAL, BEST, GUARDED)
# A table of learning curves has at most this many rounds.
_MOST_ROUNDS = 5


def tables(found: JsonObject) -> str:
    """Returns the tables of a summary in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        f"`{found['command']}`: {found['runs']} runs on {found['processor']}, {found['date']}, "
        f"{versions}."
    ]
    for data, metric in dict.fromkeys((r["data"], r["metric"]) for r in found["rows"]):
        rows = [r for r in found["rows"] if (r["data"], r["metric"]) == (data, metric)]
        groups, about = found["groups"][data], f"{METRICS[metric]} on {data}"
        parts += _gains(rows, found["against"], groups, about)
    for data in dict.fromkeys(row["data"] for row in found["contest"]):
        parts += _contest([row for row in found["contest"] if row["data"] == data], data)
    for data in dict.fromkeys(row["data"] for row in found["course"]):
        parts += _courses([row for row in found["course"] if row["data"] == data], data)
        chosen = [row for row in found["tuned"] if row["data"] == data]
        if chosen:
            parts += _chosen(chosen, data)
    return "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _gains(
    rows: Sequence[JsonObject], against: str, counts: Mapping[str, int], about: str
) -> list[str]:
    """Returns the tables of the gains in one metric, by size and by what is deployed."""
    cells = {(row["method"], row["rule"], row["group"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = shown_groups(counts)
    over = "staying alone" if against == ALONE else f"`{against}`"
    theirs = {row["group"]: row["theirs"] for row in rows if row["rule"] == AS_RUN}
    alternative = [f"{against}, itself", *(_number(theirs.get(g)) for g in groups)]
    by_size = [[m, *(_gain(cells.get((m, AS_RUN, g))) for g in groups)] for m in methods]
    small = [row for row in rows if row["group"] == SMALL]
    rules = {row["rule"]: row["theirs"] for row in small}
    by_rule = [[m, *(_gain(cells.get((m, r, SMALL))) for r in rules)] for m in methods]
    by_rule.insert(0, [f"{against}, itself", *map(_number, rules.values())])
    seeds = max(row["seeds"] for row in rows)
    guard = f" (`{GUARDED}`: or none)" if GUARDED in rules else ""
    parts = [
        f"Gain over {over} in {about}, {seeds} seeds, by role and training images:",
        _table(["method", *(head(g, counts) for g in groups)], [alternative, *by_size]),
    ]
    if len(rules) == 1:
        return parts
    return [
        *parts,
        f"The same of all small hospitals, by what they deploy{guard}:",
        _table(["method", *(f"`{rule}`" for rule in rules)], by_rule),
    ]


def _contest(rows: Sequence[JsonObject], data: str) -> list[str]:
    """Returns a table of what FedHelp gains over each other method."""
    cells = {(row["method"], row["metric"], row["rule"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = list(dict.fromkeys((row["metric"], row["rule"]) for row in rows))
    heads, adjusted = ["method"], {}
    for column in columns:
        own = [cells.get((method, *column)) for method in methods]
        # Nobody can join what pools all data.
        family = [row["p"] if row and row["method"] != POOLS_DATA else math.nan for row in own]
        p_values = holm(family)
        adjusted |= {(m, *column): p for m, p in zip(methods, p_values, strict=True)}
        heads.append(f"{METRICS[column[0]]}, `{column[1]}`")
    lines = [[m, *(_tested(cells.get((m, *c)), adjusted[m, *c]) for c in columns)] for m in methods]
    return [
        f"Gain of all small hospitals on {data} with `{OURS}` over each other method, if both "
        "deploy what the column says. The intervals are not adjusted; p, of no difference, is "
        "Holm-adjusted over the methods of a column, and not told if 1. Bold: p < 0.05.",
        _table(heads, lines),
    ]


def _tested(row: JsonObject | None, p: float) -> str:
    if row is None:
        return "-"
    value = f"p {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    text = f"{_interval(row)} {value}" if p < 1 else _interval(row)
    return f"**{text}**" if p < 0.05 else text


def _chosen(rows: Sequence[JsonObject], data: str) -> list[str]:
    """Returns a table of the settings that the trials have chosen."""
    lines = []
    for row in rows:
        scores = ", ".join(f"{score:.3f}" for score in row["validation"])
        edges = ", ".join(f"`{name}`" for name in row["edges"])
        lines.append([row["method"], f"`{row['settings']}`", scores, edges])
    heads = ["method", "settings", "scores of its trials", "at an edge"]
    return [f"Settings that the trials on {data} have chosen:", _table(heads, lines, align="--")]


def _courses(rows: Sequence[JsonObject], data: str) -> list[str]:
    """Returns the tables of calibration, learning curves and what else was measured."""
    rounds = list(rows[0]["validation"])[::-1]
    rounds = rounds[:: max(1, -(-len(rounds) // _MOST_ROUNDS))][::-1]
    heads = [f"round {number}" for number in rounds]
    calibrated = any(row["ece"] is not None for row in rows)

    def of(row: JsonObject, values: Mapping[str, float]) -> list[str]:
        return [row["method"], *(_number(values.get(number)) for number in rounds)]

    by_round = [of(row, row["validation"]) for row in rows]
    for cells, row in zip(by_round, rows, strict=True):
        sent = [f"{row[way] / 1e6:.2f}" for way in ("up", "down")]
        cells[1:1] = [*sent, _number(row["ece"])] if calibrated else sent
    errors = ["calibration error"] if calibrated else []
    of_test = "the calibration error on test images and " if calibrated else ""
    parts = [
        f"MB that all hospitals on {data} send and receive in a round, and of small hospitals "
        f"{of_test}the headline metric on validation images by round:",
        _table(["method", "up", "down", *errors, *heads], by_round),
    ]
    for name in dict.fromkeys(name for row in rows for name in row.get("training", {})):
        parts.append(f"`{name}` of small hospitals on {data} by round:")
        own = [row for row in rows if name in row.get("training", {})]
        measured = [of(row, row["training"][name]) for row in own]
        parts.append(_table(["method", *heads], measured))
    return parts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gain(row: JsonObject | None) -> str:
    if row is None:
        return "-"
    return f"**{_interval(row)}**" if any(told(row)) else _interval(row)


def _interval(row: JsonObject) -> str:
    return f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "-:") -> str:
    lines = [heads, ["--", *[align] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def guard_record(summaries: Mapping[str, JsonObject]) -> str:
    """Returns a table of what small hospitals gain as run and under the guard, by study.

    A method loses or gains if the interval of its gain over staying alone lies below or above 0.
    Methods in which hospitals send nothing are left out, as nobody can join them.
    """
    lines = []
    for study, found in summaries.items():
        federated = {(row["data"], row["method"]) for row in found["course"] if row["up"]}
        small = [
            row
            for row in found["rows"]
            if row["group"] == SMALL and (row["data"], row["method"]) in federated
        ]
        for data, metric in dict.fromkeys((row["data"], row["metric"]) for row in small):
            own = [row for row in small if (row["data"], row["metric"]) == (data, metric)]
            by_rule = {rule: [row for row in own if row["rule"] == rule] for rule in _JUDGED}
            if not by_rule[GUARDED]:
                continue  # the guard chooses between a method and staying alone only
            cells = [study, data, METRICS[metric], str(len(by_rule[GUARDED]))]
            for rows in by_rule.values():
                gains = [row["value"] for row in rows]
                losing, gaining = (sum(signed) for signed in zip(*map(told, rows), strict=True))
                cells.append(f"{np.mean(gains):+.3f}, {min(gains):+.3f}, {losing}, {gaining}")
            lines.append(cells)
    heads = [f"`{rule}`: mean, worst, losing, gaining" for rule in _JUDGED]
    return _table(["study", "data", "metric", "methods", *heads], lines)
