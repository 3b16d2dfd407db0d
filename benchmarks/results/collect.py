"""The summary of a study: gains, the course of training and what was tuned."""

import csv
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.report.run_data import RunData, find_runs, read_runs
from fedhelp_jax.report.verdict.gain import Gain
from fedhelp_jax.report.verdict.hospitals import OWN_THRESHOLD, PRECISION
from fedhelp_jax.report.verdict.judge import ALL, judge
from fedhelp_jax.report.verdict.rules import ALONE, AS_RUN, GUARDED, RULES
from fedhelp_jax.typing import JsonObject

METRICS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    OWN_THRESHOLD: "balanced accuracy at each hospital's own threshold",
    PRECISION: "average precision of rare classes",
    "dice": "Dice",
}
# The method that is compared with each other one, and the rules by which they deploy then.
OURS, GLOBAL = "fedhelp", "global"
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
    """Returns the summary of a study: the gains over a method, under each rule, and the course."""
    runs = read_runs(find_runs([folder]), [folder])
    by_data: dict[str, list[RunData]] = {}
    for run in runs:
        if run.summary.get("split") == "test":
            by_data.setdefault(run.place or run.dataset, []).append(run)
    by_data = {data: _of_common_seeds(own) for data, own in by_data.items()}
    done = [run for own in by_data.values() for run in own]
    groups = {data: of_one_size(own) for data, own in by_data.items()}
    rows = [row for data, own in by_data.items() for row in _gains_of(own, against, groups[data])]
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
        "contest": [row for own in by_data.values() for row in _contest(own)],
        "rows": rows,
    }


def _of_common_seeds(runs: Sequence[RunData]) -> list[RunData]:
    """Returns the runs with seeds that all methods have been run with."""
    by_method: dict[str, set[int]] = {}
    for run in runs:
        by_method.setdefault(run.label, set()).add(run.seed)
    common = set.intersection(*by_method.values())
    kept = [run for run in runs if run.seed in common]
    if len(kept) < len(runs):
        print(f"left out, as not all methods have their seeds: {len(runs) - len(kept)} runs")
    return kept


def _contest(runs: Sequence[RunData]) -> list[JsonObject]:
    """Returns the gain of small hospitals with `OURS` over each other method, and its p-value."""
    ours, rows = [run for run in runs if run.label == OURS], []
    if not ours:
        return []
    for method in dict.fromkeys(run.label for run in runs if run.label != OURS):
        pair = [*ours, *(run for run in runs if run.label == method)]
        for rule in (AS_RUN,) if any(run.dice for run in runs) else (AS_RUN, GLOBAL):
            for v in judge(pair, method, rule):
                if v.metric in METRICS and v.hospital == ALL["small"]:
                    row = {"data": v.place, "method": method, "rule": rule, "metric": v.metric}
                    p = 2 * min(v.gain.probability, 1 - v.gain.probability)
                    rows.append(row | _numbers(v.gain) | {"p": round(p, 5)})
    return rows


def _numbers(gain: Gain) -> JsonObject:
    return {name: round(getattr(gain, name), 5) for name in ("value", "low", "high")}


def _gains_of(
    runs: Sequence[RunData], against: str, groups: Mapping[str, Sequence[str]]
) -> list[JsonObject]:
    """Returns the gains on one data set: of all groups as run, of small hospitals by each rule."""
    rows = []
    # Under the guard, another alternative than staying alone does not deploy by the same rule.
    rules = RULES if against == ALONE else [r for r in RULES if r != GUARDED]
    if any(run.dice for run in runs):
        rules = [AS_RUN]  # of masks, runs keep the Dice of one model
    for rule in rules:
        titles = [*groups, *ALL.values()] if rule == AS_RUN else [ALL["small"]]
        for v in judge(runs, against, rule, groups=groups if rule == AS_RUN else {}):
            if v.metric in METRICS and v.hospital in titles:
                row = {"data": v.place, "method": v.method, "rule": rule, "metric": v.metric}
                row |= {"group": v.hospital, "ours": round(v.ours, 5), "theirs": round(v.theirs, 5)}
                rows.append(
                    row | _numbers(v.gain) | {"seeds": v.gain.seeds, "images": v.gain.examples}
                )
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
        chosen = [row for row in rows if row["chosen"] == "1"]
        if chosen:
            scores = sorted((float(row["validation"] or "nan") for row in rows), reverse=True)
            own = {"data": data, "method": method, "settings": chosen[0]["settings"]}
            own["validation"] = [round(score, 5) for score in scores if math.isfinite(score)]
            found.append(own | {"edges": _edges(chosen[0], rows)})
    return found


def _edges(chosen: Mapping[str, str], trials: Sequence[Mapping[str, str]]) -> list[str]:
    settings = [dict(part.split("=") for part in row["settings"].split()) for row in trials]
    edges = []
    for name, value in (part.split("=") for part in chosen["settings"].split()):
        tried = {float(own[name]) for own in settings if name in own}
        if len(tried) > 2 and float(value) in (min(tried), max(tried)):
            edges.append(name)
    return edges


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
