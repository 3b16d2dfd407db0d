"""The pages about several runs and about sweeps."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.report import numbers
from fedhelp_jax.report.console import amount, duration, marked_synthetic
from fedhelp_jax.report.page import figures
from fedhelp_jax.report.page.content import (
    ON_VALIDATION,
    Cell,
    Column,
    Page,
    Section,
    Table,
    count_cell,
    glossary,
    notes_of,
    number_cell,
    shade,
)
from fedhelp_jax.report.page.figures import words
from fedhelp_jax.report.page.files import PAGE, Files
from fedhelp_jax.report.run_data import RunData, SweepData
from fedhelp_jax.report.summary import SYNTHETIC
from fedhelp_jax.report.verdict.judge import judge, wrong_by_chance
from fedhelp_jax.report.verdict.rules import ALONE

# So many of the best methods are named in a sentence, beside staying alone.
_MOST_TOLD = 3


def page_of_runs(runs: Sequence[RunData], files: Files, out: Path) -> Page:
    """Returns the page in a folder that compares runs, by data set."""
    sections = []
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    places = list(dict.fromkeys((run.dataset, run.place) for run in runs))
    for number, (dataset, place) in enumerate(places):
        own = _best_first([run for run in runs if (run.dataset, run.place) == (dataset, place)])
        synthetic = any(run.summary.get("synthetic") for run in own)
        drawn = [figures.learning_of_methods(own), figures.clients_of_methods(own)]
        prefix = f"{number + 1}_" if len(places) > 1 else ""
        title = marked_synthetic(dataset, synthetic)
        if len(places) > len(datasets):  # a study has several versions of one data set
            title = f"{place}: {title}"
        tables = [_methods(own), *_clients(own), *_verdicts(own)]
        sections.append(Section(title, _in_words(own), files.drawn(drawn, prefix), tables))
    sections += [Section("The runs", (), (), [_runs(runs, out)]), glossary()]
    finished = [run for run in runs if run.summary]
    return Page(
        f"{len(dict.fromkeys(r.label for r in runs))} methods on {', '.join(datasets)}"
        if len(datasets) < 4
        else f"{len(runs)} runs on {len(datasets)} data sets",
        f"{len(finished)} finished runs of {len(runs)}",
        notes_of(runs),
        (),
        sections,
    )


def _best_first(runs: Sequence[RunData]) -> list[RunData]:
    """Returns runs by the mean of their method's small clients, after those of staying alone."""
    means = _small_means(runs)
    return sorted(runs, key=lambda r: (r.label != ALONE, -means.get(r.label, -math.inf)))


def _small_means(runs: Sequence[RunData]) -> dict[str, float]:
    """Returns the mean of the small clients by method, over its finished runs."""
    by_label: dict[str, list[float]] = {}
    for run in runs:
        if run.summary.get("small_mean") is not None:
            by_label.setdefault(run.label, []).append(run.summary["small_mean"])
    return {label: float(np.mean(values)) for label, values in by_label.items()}


def _in_words(runs: Sequence[RunData]) -> list[str]:
    """Returns what the small clients have under each method, and on how many images."""
    means = sorted(((mean, label) for label, mean in _small_means(runs).items()), reverse=True)
    if not means:
        return []
    told = [pair for i, pair in enumerate(means) if i < _MOST_TOLD or pair[1] == ALONE]
    listed = ", ".join(f"{mean:.2f} with {label}" for mean, label in told)
    if len(told) < len(means):
        listed += f" ({len(means) - len(told)} more methods stand below)"
    images = {
        c["name"]: c.get("n_test") or 0
        for run in runs
        for c in run.worst_first()
        if c["role"] == "small"
    }
    few, many = min(images.values(), default=0), max(images.values(), default=0)
    seeds = len({run.seed for run in runs})
    return [
        f"The {len(images)} small clients have a mean {words(runs[0].metric)} of {listed}. Their "
        f"test splits have {few:,} to {many:,} images, and there "
        f"{'are' if seeds > 1 else 'is'} {seeds} seed{'s' if seeds > 1 else ''}: "
        "a difference may be chance."
    ]


def _methods(runs: Sequence[RunData]) -> Table:
    """Returns a row per method: means over seeds, and the change against training alone."""
    by_label: dict[str, list[RunData]] = {}
    for run in runs:
        if run.summary:
            by_label.setdefault(run.label, []).append(run)
    alone = by_label.get("local", [])
    scores = (("small_mean", "small mean"), ("worst_small", "worst small"))
    scores += (("large_mean", "large mean"), ("gap", "gap"))
    columns = [Column("method"), Column("runs", True), *(Column(t, True) for _, t in scores)]
    compared = bool(alone) and len(by_label) > 1
    if compared:
        columns += [
            Column("small, change against local", True),
            Column("small clients better, all seeds", True),
        ]
    columns += [Column("up a round", True), Column("time", True)]
    rows = []
    for label, own in by_label.items():
        row = [Cell(label), count_cell(len(own))]
        for key, _ in scores:
            mean, spread = numbers.mean_and_spread([r.summary.get(key) for r in own])
            text = numbers.spread_text(mean, spread)
            row.append(Cell(text, None if math.isnan(mean) else mean))
        if compared:
            row += _against(own, alone) if label != "local" else [Cell(""), Cell("")]
        up, _ = numbers.mean_and_spread([r.summary.get("bytes_up_per_round") for r in own])
        took, _ = numbers.mean_and_spread([r.summary.get("wall_s") for r in own])
        row += [Cell(amount(up), up), Cell(duration(None if math.isnan(took) else took), took)]
        rows.append(row)
    rows.sort(key=lambda row: -(row[2].sort if row[2].sort is not None else -math.inf))
    note = f"{words(runs[0].metric)}; the best small mean comes first."
    note += (
        " ± is the standard deviation over seeds."
        if any(len(v) > 1 for v in by_label.values())
        else ""
    )
    if compared:
        note += " Changes are means over seeds that both methods ran with."
    return Table(columns, rows, note[0].upper() + note[1:])


def _against(own: Sequence[RunData], alone: Sequence[RunData]) -> list[Cell]:
    """Returns the mean change of the small clients against training alone, and how many gained."""
    changes = []
    base = {run.seed: _small(run) for run in alone}
    for run in own:
        other = base.get(run.seed, {})
        changes += [value - other[name] for name, value in _small(run).items() if name in other]
    if not changes:
        return [Cell("-"), Cell("-")]
    gained = sum(change > 0 for change in changes)
    return [
        number_cell(float(np.mean(changes)), sign=True),
        Cell(f"{gained} of {len(changes)}", gained / len(changes)),
    ]


def _clients(runs: Sequence[RunData]) -> list[Table]:
    """Returns a table with a row per client and a column per method, the worst client first."""
    labels = list(dict.fromkeys(run.label for run in runs if run.summary))
    values: dict[tuple[str, str], list[float]] = {}
    entries = {}
    for run in runs:
        for client in run.worst_first():
            entries.setdefault(client["name"], client)
            values.setdefault((client["name"], run.label), []).append(client["metrics"][run.metric])
    if not entries:
        return []
    columns = [Column("client"), Column("role"), Column("training images", True)]
    columns += [Column("test images", True), *(Column(label, True) for label in labels)]
    rows = []
    for name, client in entries.items():
        cells = [
            number_cell(numbers.mean_and_spread(values.get((name, label), ()))[0])
            for label in labels
        ]
        counts = [count_cell(client.get("n_train")), count_cell(client.get("n_test"))]
        rows.append([Cell(name), Cell(client["role"]), *counts, *cells])
    rows.sort(key=lambda row: min((c.sort for c in row[4:] if c.sort is not None), default=2.0))
    note = (
        f"{words(runs[0].metric)} of the model that each client deploys, means over seeds. The "
        "client with the lowest value comes first."
    )
    return [Table(columns, rows, note[0].upper() + note[1:])]


def _verdicts(runs: Sequence[RunData]) -> list[Table]:
    """Returns a row per hospital and a column per method: whether it gains over staying alone."""
    verdicts = judge(runs, ALONE, metric=runs[0].metric)
    methods = list(dict.fromkeys(v.method for v in verdicts))
    if not methods:
        return []
    found = {(v.hospital, v.method): v for v in verdicts}
    hospitals = sorted(
        {v.hospital: v for v in verdicts}.values(),
        key=lambda v: (v.is_of_all, v.role != "small", v.hospital),
    )
    rows = []
    for first in hospitals:
        cells = []
        for method in methods:
            v = found.get((first.hospital, method))
            if v is None:
                cells.append(Cell("-"))
                continue
            g, word = v.gain, v.gain.verdict
            text = f"{word}: {g.value:+.3f} ({g.low:+.3f} to {g.high:+.3f})"
            colour = {"gains": shade(1.0), "loses": shade(0.0)}.get(word, "")
            cells.append(Cell(text, g.value, colour))
        rows.append([Cell(first.hospital), Cell(first.role), *cells])
    columns = [Column("client"), Column("role"), *(Column(m, True) for m in methods)]
    note = (
        f"Should this hospital join? The gain in {words(runs[0].metric)} over staying alone "
        f"({ALONE}), on the same test images and seeds, with its 95 % interval. If nobody gained "
        f"or lost, about {wrong_by_chance(verdicts):.1f} of these verdicts on single clients would "
        "say otherwise by chance."
    )
    return [Table(columns, rows, note)]


def _small(run: RunData) -> dict[str, float]:
    small = (c for c in run.worst_first() if c["role"] == "small")
    return {c["name"]: c["metrics"][run.metric] for c in small}


def _runs(runs: Sequence[RunData], out: Path) -> Table:
    """Returns a row per run, which leads to the run's own page if there is one."""
    columns = [Column("folder"), Column("method"), Column("data"), Column("seed", True)]
    columns += [Column("rounds", True), Column("small mean", True), Column("worst small", True)]
    columns += [Column("large mean", True), Column("gap", True)]
    rows = []
    for run in runs:
        s, done = run.summary, run.history[-1]["round"] if run.history else 0
        page = run.folder / PAGE
        link = Path(os.path.relpath(page, out)).as_posix() if page.exists() else ""
        row = [Cell(str(run.folder), link=link), Cell(run.label), Cell(run.dataset)]
        row.append(count_cell(run.seed))
        row.append(count_cell(done))
        keys = ("small_mean", "worst_small", "large_mean", "gap")
        rows.append([*row, *(number_cell(s.get(key)) for key in keys)])
    return Table(columns, rows)


# Columns of a sweep's table that hold words.
_TEXTS = ("split", "metric", "algorithm", "dataset", "synthetic")


def page_of_sweep(sweep: SweepData, files: Files) -> Page:
    """Returns the page about a sweep."""
    drawn = files.drawn([figures.swept(name, sweep.rows) for name in sweep.swept])
    columns = [
        Column(name if name in sweep.swept else name.replace("_", " "), name not in _TEXTS)
        for name in sweep.rows[0]
    ]
    rows = [
        [Cell(text if name in sweep.swept else _rounded(text)) for name, text in row.items()]
        for row in sweep.rows
    ]
    metric = words(str(sweep.rows[0].get("metric", "?")))
    split = sweep.rows[0]["split"]
    notes = [SYNTHETIC] if any(row.get("synthetic") == "True" for row in sweep.rows) else []
    notes += [ON_VALIDATION] if split == "validation" else []
    methods, data = (
        ", ".join(dict.fromkeys(str(row[name]) for row in sweep.rows if row.get(name)))
        for name in ("algorithm", "dataset")
    )
    return Page(
        f"Sweep over {', '.join(sweep.swept)}" + (f": {methods} on {data}" if methods else ""),
        f"{len(sweep.rows)} runs; {metric} on {split} images",
        notes,
        (),
        [
            Section("What each setting does", (), drawn),
            Section("The runs", (), (), [Table(columns, rows, "Click a heading to sort.")]),
        ],
    )


def _rounded(text: str) -> str:
    """Returns a number of a CSV file with three decimal places; other text unchanged."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if text.isdigit() or 0 < abs(value) < 1e-3 else f"{value:.3f}"
