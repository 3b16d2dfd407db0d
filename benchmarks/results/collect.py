"""The summary of a study: gains, the course of training and what was tuned."""

import csv
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.report.run_data import RunData, find_runs, read_runs
from fedhelp_jax.report.verdict.gain import Gain
from fedhelp_jax.report.verdict.hospitals import OWN_THRESHOLD, PRECISION
from fedhelp_jax.report.verdict.judge import ALL, Verdict, judge
from fedhelp_jax.report.verdict.rules import ALONE, AS_RUN, GLOBAL, GUARDED, RULES
from fedhelp_jax.typing import JsonObject

METRICS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    OWN_THRESHOLD: "balanced accuracy at each hospital's own threshold",
    PRECISION: "average precision of rare classes",
    "dice": "Dice",
}
# The group of all small hospitals.
SMALL = ALL["small"]
# The method that is compared with each other one.
OURS = "fedhelp"
# Hospitals whose numbers of training images are within this factor are of one size.
_ALIKE = 1.25


def of_one_size(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Returns the names of the hospitals by role and size, the largest first."""
    sizes = {
        client["name"]: (client["role"], client["n_train"])
        for run in runs
        for client in run.summary.get("per_client") or []
    }
    groups: dict[tuple[str, int], list[str]] = {}
    for name, (role, size) in sorted(sizes.items(), key=lambda item: (item[1][0], -item[1][1])):
        last = list(groups)[-1] if groups else ("", 0)
        same = last[0] == role and size * _ALIKE >= last[1]
        groups.setdefault(last if same else (role, size), []).append(name)
    return {f"{role}, {size:,}": names for (role, size), names in groups.items()}


def collect(folder: Path, command: str, processor: str, against: str = ALONE) -> JsonObject:
    """Returns the summary of a study: the gains over a method, under each rule, and the course.

    Raises:
      ValueError: If no seed has been run with all methods.
    """
    by_data: dict[str, list[RunData]] = {}
    for run in read_runs(find_runs([folder]), [folder]):
        if run.summary.get("split") == "test":
            by_data.setdefault(run.place or run.dataset, []).append(run)
    by_data = {data: _of_common_seeds(own) for data, own in by_data.items()}
    done = [run for own in by_data.values() for run in own]
    if not done:
        raise ValueError(f"{folder}: no seed has been run with all methods")
    # A method may give hospitals other roles.
    groups = {
        data: of_one_size([run for run in own if run.label == against] or own)
        for data, own in by_data.items()
    }
    versions = done[0].summary.get("versions") or {}
    return {
        "command": command,
        "processor": processor,
        "date": datetime.date.today().isoformat(),
        "versions": {name: versions[name] for name in ("jax", "fedhelp_jax") if name in versions},
        "runs": len(done),
        "against": against,
        "groups": {
            data: {title: len(names) for title, names in own.items()}
            for data, own in groups.items()
        },
        "tuned": _tuned(folder),
        "course": _course(done),
        "contest": [r for data, own in by_data.items() for r in _contest(own, groups[data])],
        "rows": [r for data, own in by_data.items() for r in _gains_of(own, against, groups[data])],
    }


def _of_common_seeds(runs: Sequence[RunData]) -> list[RunData]:
    """Returns the runs with seeds that all methods have been run with."""
    by_method: dict[str, set[int]] = {}
    for run in runs:
        by_method.setdefault(run.label, set()).add(run.seed)
    common, every = (f(*by_method.values()) for f in (set.intersection, set.union))
    for method, seeds in by_method.items():
        if lacking := every - seeds:
            print(f"{method} lacks seeds, which are left out: {', '.join(map(str, lacking))}")
    return [run for run in runs if run.seed in common]


def _contest(runs: Sequence[RunData], groups: Mapping[str, Sequence[str]]) -> list[JsonObject]:
    """Returns the gain of small hospitals with `OURS` over each other method, and its p-value."""
    rows = []
    for rule in (r for r in _rules(runs, OURS) if r in (AS_RUN, GLOBAL)):
        for v in _judged(runs, OURS, rule, _small(groups)):
            # What the other method gains over ours is what ours loses to it.
            gain = v.gain._replace(value=-v.gain.value, low=-v.gain.high, high=-v.gain.low)
            row = {"data": v.place, "method": v.method, "rule": rule, "metric": v.metric}
            p = 2 * min(v.gain.probability, 1 - v.gain.probability)
            rows.append(row | _numbers(gain) | {"p": float(f"{p:.3g}")})
    return rows


def _rules(runs: Sequence[RunData], against: str) -> Sequence[str]:
    """Returns the rules of deployment by which methods can be compared."""
    if any(run.dice for run in runs):
        return (AS_RUN,)  # of masks, runs keep the Dice of one model
    # Under the guard, another alternative than staying alone does not deploy by the same rule.
    return RULES if against == ALONE else [rule for rule in RULES if rule != GUARDED]


def _small(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns all small hospitals as a group, even if there is only one."""
    return {SMALL: [name for group in _sizes_of_small(groups) for name in groups[group]]}


def _sizes_of_small(groups: Iterable[str]) -> list[str]:
    return [group for group in groups if group.startswith("small")]


def _judged(
    runs: Sequence[RunData], against: str, rule: str, groups: Mapping[str, Sequence[str]]
) -> list[Verdict]:
    """Returns the verdicts on groups of hospitals, whatever their roles are under a method."""
    verdicts = judge(runs, against, rule, groups=groups)
    return [v for v in verdicts if v.metric in METRICS and v.hospital in groups]


def _numbers(gain: Gain) -> JsonObject:
    return {name: round(getattr(gain, name), 5) for name in ("value", "low", "high")}


def _gains_of(
    runs: Sequence[RunData], against: str, groups: Mapping[str, Sequence[str]]
) -> list[JsonObject]:
    """Returns the gains on one data set: of all groups as run, of small hospitals by each rule."""
    rows = []
    for rule in _rules(runs, against):
        wanted = {**groups, **_small(groups)} if rule == AS_RUN else _small(groups)
        for v in _judged(runs, against, rule, wanted):
            row = {"data": v.place, "method": v.method, "rule": rule, "metric": v.metric}
            row |= {"group": v.hospital, "ours": round(v.ours, 5), "theirs": round(v.theirs, 5)}
            rows.append(row | _numbers(v.gain) | {"seeds": v.gain.seeds, "images": v.gain.examples})
    return rows


def _tuned(folder: Path) -> list[JsonObject]:
    """Returns the settings that a study's trials have chosen, by data and method.

    ``validation`` is the score of each trial, the best one first. ``edges`` are the settings whose
    chosen value is the smallest or the largest of at least three that were tried.
    """
    path = folder / "tuning.csv"
    if not path.exists():
        return []
    trials: dict[tuple[str, str], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            trials.setdefault((row["data"], row["method"]), []).append(row)
    found = []
    for (data, method), rows in trials.items():
        chosen = next((row["settings"] for row in rows if row["chosen"] == "1"), None)
        if chosen is not None:
            scores = sorted(float(r["validation"]) for r in rows if r["diverged"] != "1")[::-1]
            found.append(
                {
                    "data": data,
                    "method": method,
                    "settings": chosen,
                    "validation": [round(score, 5) for score in scores],
                    "edges": _edges(chosen, rows),
                }
            )
    return found


def _edges(chosen: str, trials: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the settings that are chosen as small or as large as they have been tried."""
    edges = []
    for name, value in _read(chosen).items():
        tried = {_read(row["settings"]).get(name) for row in trials}
        numeric = all(isinstance(v, float) for v in tried)
        if numeric and len(tried) > 2 and value in (min(tried), max(tried)):
            edges.append(name)
    return edges


def _read(settings: str) -> dict[str, Any]:
    """Returns the settings of a trial, numbers as such."""
    found = {}
    for part in re.split(r" (?=[\w.]+=)", settings):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


def _course(runs: Sequence[RunData]) -> list[JsonObject]:
    """Returns, by data and method, means over seeds and small hospitals.

    ``ece`` is the calibration error of what they deploy on test images, ``validation`` the headline
    metric on validation images in each evaluated round, and ``training`` what else than losses was
    measured in training, in the same rounds. ``up`` and ``down`` are the bytes that all clients
    send and receive in a round.
    """
    own: dict[tuple[str, str], list[RunData]] = {}
    for run in runs:
        own.setdefault((run.place or run.dataset, run.label), []).append(run)
    rows = []
    for (data, method), of_seeds in own.items():
        errors = [
            client["metrics"]["ece"]
            for run in of_seeds
            for client in run.summary["per_client"]
            if client["role"] == "small" and "ece" in client["metrics"]
        ]
        by_round: dict[str, list[float]] = {}
        training: dict[str, dict[str, list[float]]] = {}
        for row in (row for run in of_seeds for row in run.history if "small_mean" in row):
            at = str(row["round"])
            by_round.setdefault(at, []).append(row["small_mean"])
            for name, value in row["train"].get("small", {}).items():
                if not name.endswith("loss"):
                    training.setdefault(name, {}).setdefault(at, []).append(value)
        row = {"data": data, "method": method, "ece": _mean(errors)}
        for way in ("up", "down"):
            row[way] = _mean([run.summary[f"bytes_{way}_per_round"] for run in of_seeds])
        row["validation"] = {at: _mean(values) for at, values in by_round.items()}
        for name, values in training.items():
            of_rounds = {at: _mean(found) for at, found in values.items()}
            row.setdefault("training", {})[name] = of_rounds
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 5) if values else None


def as_lines(found: JsonObject) -> str:
    """Returns a summary as JSON with a line for each row of a table."""
    lists = {name: found[name] for name in ("tuned", "course", "contest", "rows")}
    head = {name: value for name, value in found.items() if name not in lists}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name, rows in lists.items():
        lines = ",\n  ".join(map(json.dumps, rows))
        parts.append(f' "{name}": [\n  {lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def told(row: JsonObject) -> tuple[bool, bool]:
    """Returns whether the interval of a row tells a loss, and whether it tells a gain."""
    return row["high"] < 0, row["low"] > 0


def shown_groups(counts: Mapping[str, int]) -> list[str]:
    """Returns the groups of one size, then that of all small hospitals if their sizes differ."""
    return [*counts, SMALL] if len(_sizes_of_small(counts)) > 1 else list(counts)


def head(group: str, counts: Mapping[str, int]) -> str:
    """Returns the title of a group with the number of its hospitals, if it is of one size."""
    return f"{group} ({counts[group]})" if group in counts else group
