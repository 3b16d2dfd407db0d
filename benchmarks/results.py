"""The tables of docs/results.md, from summaries of studies in docs/results.

    python -m benchmarks.results --collect=runs/scarcity \
        --study=configs/studies/scarcity.py --processor='2 cores of an AMD EPYC'
    make results

The first command reads the predictions of a study's runs and writes `docs/results/scarcity.json`.
The second writes the tables of all such files between the marks in docs/results.md, so that no
number is copied by hand; a test compares the page with the files.
"""

import csv
import datetime
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from fedhelp_jax.report.run_data import RunData, find_runs, read_runs
from fedhelp_jax.report.verdict.hospitals import OWN_THRESHOLD
from fedhelp_jax.report.verdict.judge import ALL, judge
from fedhelp_jax.report.verdict.rules import ALONE, AS_RUN, BEST, GUARDED, RULES
from fedhelp_jax.typing import JsonObject

_COLLECT = flags.DEFINE_string("collect", None, "the folder of a study's runs")
_STUDY = flags.DEFINE_string("study", None, "the study's file, as compare was given it")
_AGAINST = flags.DEFINE_string("against", ALONE, "the method that the others are compared with")
_PROCESSOR = flags.DEFINE_string("processor", None, "what the runs were made on")

DOCS = Path(__file__).parents[1] / "docs"
METRICS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    OWN_THRESHOLD: "balanced accuracy at each hospital's own threshold",
}
# The mark of the guard's record on the page, and the rules that it compares.
GUARD = "guard"
_JUDGED = (AS_RUN, BEST, GUARDED)
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
    done = [run for run in runs if run.summary.get("split") == "test"]
    by_data: dict[str, list[RunData]] = {}
    for run in done:
        by_data.setdefault(run.place or run.dataset, []).append(run)
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
        "rows": rows,
    }


def _gains_of(
    runs: Sequence[RunData], against: str, groups: Mapping[str, Sequence[str]]
) -> list[JsonObject]:
    """Returns the gains on one data set: of all groups as run, of small hospitals by each rule."""
    rows = []
    # Under the guard, another alternative than staying alone does not deploy by the same rule.
    for rule in RULES if against == ALONE else [r for r in RULES if r != GUARDED]:
        titles = [*groups, *ALL.values()] if rule == AS_RUN else [ALL["small"]]
        for v in judge(runs, against, rule, groups=groups if rule == AS_RUN else {}):
            if v.metric in METRICS and v.hospital in titles:
                gain = {k: round(getattr(v.gain, k), 5) for k in ("value", "low", "high")}
                row = {"data": v.place, "method": v.method, "rule": rule, "metric": v.metric}
                row |= {"group": v.hospital, "ours": round(v.ours, 5), "theirs": round(v.theirs, 5)}
                rows.append(row | gain | {"seeds": v.gain.seeds, "images": v.gain.examples})
    return rows


def _tuned(folder: Path) -> list[JsonObject]:
    """Returns the settings that a study's trials have chosen, by data and method."""
    path = folder / "tuning.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["chosen"] == "1"]
    return [{name: row[name] for name in ("data", "method", "settings")} for row in rows]


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
    for data in dict.fromkeys(row["data"] for row in found["course"]):
        parts += _courses([row for row in found["course"] if row["data"] == data], data)
        chosen = [row for row in found["tuned"] if row["data"] == data]
        if chosen:
            parts.append(f"Settings that the trials on {data} have chosen:")
            rows = [[row["method"], f"`{row['settings']}`"] for row in chosen]
            parts.append(_table(["method", "settings"], rows, align="--"))
    return "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _gains(
    rows: Sequence[JsonObject], against: str, counts: Mapping[str, int], about: str
) -> list[str]:
    """Returns the tables of the gains in one metric, by size and by what is deployed."""
    cells = {(row["method"], row["rule"], row["group"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = [*counts, ALL["small"]]
    over = "staying alone" if against == ALONE else f"`{against}`"
    theirs = {row["group"]: row["theirs"] for row in rows if row["rule"] == AS_RUN}
    alternative = [f"{against}, itself", *(_number(theirs.get(g)) for g in groups)]
    by_size = [[m, *(_gain(cells.get((m, AS_RUN, g))) for g in groups)] for m in methods]
    small = [row for row in rows if row["group"] == ALL["small"]]
    rules = {row["rule"]: row["theirs"] for row in small}
    by_rule = [[m, *(_gain(cells.get((m, r, ALL["small"]))) for r in rules)] for m in methods]
    by_rule.insert(0, [f"{against}, itself", *map(_number, rules.values())])
    seeds = max(row["seeds"] for row in rows)
    guard = f" (`{GUARDED}`: or none)" if GUARDED in rules else ""
    return [
        f"Gain over {over} in {about}, {seeds} seeds, by role and training images:",
        _table(["method", *(_head(g, counts) for g in groups)], [alternative, *by_size]),
        f"The same of all small hospitals, by what they deploy{guard}:",
        _table(["method", *(f"`{rule}`" for rule in rules)], by_rule),
    ]


def _courses(rows: Sequence[JsonObject], data: str) -> list[str]:
    """Returns the tables of calibration, learning curves and what else was measured."""
    rounds = list(rows[0]["validation"])
    heads = [f"round {number}" for number in rounds]

    def of(row: JsonObject, values: Mapping[str, float]) -> list[str]:
        return [row["method"], *(_number(values.get(number)) for number in rounds)]

    by_round = [of(row, row["validation"]) for row in rows]
    for cells, row in zip(by_round, rows, strict=True):
        sent = [f"{row[way] / 1e6:.2f}" for way in ("up", "down")]
        cells[1:1] = [*sent, _number(row["ece"])]
    parts = [
        f"MB that all hospitals on {data} send and receive in a round, and of small hospitals the "
        "calibration error on test images and the headline metric on validation images by round:",
        _table(["method", "up", "down", "calibration error", *heads], by_round),
    ]
    for name in rows[0].get("training", {}):
        parts.append(f"`{name}` of small hospitals on {data} by round:")
        measured = [of(row, row.get("training", {}).get(name, {})) for row in rows]
        parts.append(_table(["method", *heads], measured))
    return parts


def _head(group: str, counts: Mapping[str, int]) -> str:
    return f"{group} ({counts[group]})" if group in counts else group


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gain(row: JsonObject | None) -> str:
    if row is None:
        return "-"
    text = f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
    return f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "-:") -> str:
    lines = [heads, ["--", *[align] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def guard_record(summaries: Mapping[str, JsonObject]) -> str:
    """Returns a table of what small hospitals gain as run and under the guard, by study.

    A method loses if the interval of its gain over staying alone is below 0. Methods in which
    hospitals send nothing are left out, as nobody can join them.
    """
    lines = []
    for study, found in summaries.items():
        federated = {(row["data"], row["method"]) for row in found["course"] if row["up"]}
        small = [
            row
            for row in found["rows"]
            if row["group"] == ALL["small"] and (row["data"], row["method"]) in federated
        ]
        for data, metric in dict.fromkeys((row["data"], row["metric"]) for row in small):
            own = [row for row in small if (row["data"], row["metric"]) == (data, metric)]
            by_rule = {rule: [row for row in own if row["rule"] == rule] for rule in _JUDGED}
            if not by_rule[GUARDED]:
                continue  # the guard chooses between a method and staying alone only
            cells = [study, data, METRICS[metric], str(len(by_rule[GUARDED]))]
            for rows in by_rule.values():
                gains = [row["value"] for row in rows]
                losing = sum(row["high"] < 0 for row in rows)
                cells.append(f"{np.mean(gains):+.3f}, {min(gains):+.3f}, {losing}")
            lines.append(cells)
    heads = [f"`{rule}`: mean, worst, losing" for rule in _JUDGED]
    return _table(["study", "data", "metric", "methods", *heads], lines)


def render(page: str, folder: Path) -> str:
    """Returns a page whose marked parts hold the tables of the summaries in a folder.

    The mark ``guard`` is filled from all of them.

    Raises:
      ValueError: If a mark has no summary, or a summary no mark.
    """

    def filled(found: re.Match[str]) -> str:
        name = found[1]
        if name != GUARD and name not in summaries:
            raise ValueError(f"{name}.json is missing, but the page has a place for it")
        filling = guard_record(summaries) if name == GUARD else tables(summaries[name])
        return f"<!-- {name} -->\n\n{filling}\n\n<!-- end -->"

    paths = sorted(folder.glob("*.json"))
    summaries = {path.stem: json.loads(path.read_text()) for path in paths}
    marks = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    lacking = set(summaries) - set(marks.findall(page))
    if lacking:
        raise ValueError(f"the page has no place for {', '.join(sorted(lacking))}")
    return marks.sub(filled, page)


def as_lines(found: JsonObject) -> str:
    """Returns a summary as JSON with a line for each row of a table."""
    lists = {name: found[name] for name in ("course", "rows")}
    head = {name: value for name, value in found.items() if name not in lists}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name, rows in lists.items():
        lines = ",\n  ".join(map(json.dumps, rows))
        parts.append(f' "{name}": [\n  {lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def main(_: Sequence[str]) -> None:
    """Collects a study, or writes the page."""
    if _COLLECT.value:
        folder, command = Path(_COLLECT.value), f"fedhelp compare --study={_STUDY.value}"
        processor = _PROCESSOR.value or "an unnamed processor"
        found = collect(folder, command, processor, _AGAINST.value)
        path = DOCS / "results" / f"{folder.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_lines(found))
        print(f"written: {path}")
        return
    page = DOCS / "results.md"
    page.write_text(render(page.read_text(), DOCS / "results"))
    print(f"written: {page}")


if __name__ == "__main__":
    app.run(main)
