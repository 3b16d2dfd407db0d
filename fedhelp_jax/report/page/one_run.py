"""The page about one run."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedhelp_jax.report import numbers
from fedhelp_jax.report.console import amount, duration, marked_synthetic
from fedhelp_jax.report.dice import DICE
from fedhelp_jax.report.page import figures
from fedhelp_jax.report.page.content import (
    Card,
    Cell,
    Column,
    Drawn,
    Page,
    Section,
    Table,
    count_cell,
    glossary,
    metrics_of,
    notes_of,
    number_cell,
    number_text,
    shade,
    table_of_pairs,
)
from fedhelp_jax.report.page.figures import words
from fedhelp_jax.report.page.files import Files
from fedhelp_jax.report.predictions import Predictions
from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.simulation.divergence import NON_FINITE

_MOST_PICTURES = 6
_MOST_IMAGES = 10
_LARGEST_PICTURE = 1_000_000  # bytes


def page_of_run(run: RunData, changed: Sequence[tuple[str, str, str]], files: Files) -> Page:
    """Returns the page about one run; ``changed`` has key, value and default of its settings."""
    summary, split = run.summary, run.summary.get("split", "test")
    deployed = {c["name"]: c["model"] for c in summary.get("per_client") or []}
    own = [p for p in run.predictions if p.split == split and p.model == deployed.get(p.client)]
    by_balance = run.metric == "balanced_accuracy"
    intervals = {p.client: numbers.interval(p.logits, p.labels) for p in own if by_balance}
    intervals |= {d.client: numbers.interval_of_mean(d.dice) for d in run.dice}
    sections = [
        Section(
            "Each client's result",
            (),
            files.drawn([figures.clients(run, intervals)]),
            _client_tables(run, intervals),
        ),
        Section("How it learned", (), files.drawn([figures.learning(run), figures.losses(run)])),
        _answers(run, own, files),
        Section("Who has which images", (), files.drawn([figures.shares(run)])),
        _pictures(run),
        _foundation(run),
        _cost(run),
        _trouble(run),
        glossary(),
        _settings(run, changed),
    ]
    return Page(
        f"{run.label} on {marked_synthetic(run.dataset, summary.get('synthetic'))}",
        f"{len(summary.get('per_client') or [])} clients, "
        f"{summary.get('stopped_after') or summary.get('rounds', '?')} rounds, seed {run.seed}; "
        f"{words(run.metric)} on {split} images",
        notes_of([run]),
        _cards(run),
        [s for s in sections if s.texts or s.figures or s.tables or s.code],
    )


def _cards(run: RunData) -> list[Card]:
    summary = run.summary
    if not summary:
        return []
    measured = [row for row in run.history if row.get("small_mean") is not None]
    worst = next((c for c in run.worst_first() if c["role"] == "small"), None)

    def before(key: str) -> str:
        if not measured:
            return ""
        first, last = measured[0], measured[-1]
        return (
            f"on validation {number_text(first.get(key))} after round {first['round']}, "
            f"{number_text(last.get(key))} after {last['round']}"
        )

    return [
        Card("Small clients, mean", number_text(summary.get("small_mean")), before("small_mean")),
        Card(
            "Worst small client",
            number_text(summary.get("worst_small")),
            str(worst["name"]) if worst else "",
        ),
        Card("Large clients, mean", number_text(summary.get("large_mean")), before("large_mean")),
        Card("Gap, large minus small", number_text(summary.get("gap"), sign=True), before("gap")),
    ]


def _client_tables(run: RunData, intervals: Mapping[str, tuple[float, float]]) -> list[Table]:
    """Returns the table of the clients, the worst first, with every deployed model."""
    entries = run.summary.get("per_client") or []
    if not entries:
        return []
    split = run.summary.get("split", "test")
    by_model: dict[tuple[str, str], float] = {}
    for row in run.clients:
        if row["split"] == split and row["metric"] == run.metric and row["value"] not in ("", None):
            by_model[row["client"], row["model"]] = float(row["value"])
    models = list(dict.fromkeys(model for _, model in by_model))
    others = [m for m in models if any(m != c["model"] for c in entries)] if len(models) > 1 else []
    names = dict.fromkeys(n for c in entries for n in metrics_of(c))
    rest = [n for n in names if n not in (run.metric, NON_FINITE)]
    columns = [Column("client"), Column("role"), Column("training images", True)]
    columns += [Column(f"{split} images", True), Column(f"deployed: {words(run.metric)}", True)]
    if intervals:
        columns.append(Column("95 % interval", True))
    columns += [Column(f"{model} model", True) for model in others]
    columns += [Column(words(name), True) for name in rest]
    rows = []
    missing = math.inf
    for c in sorted(entries, key=lambda c: _sortable(metrics_of(c).get(run.metric), missing)):
        metrics = metrics_of(c)
        marked = " (diverged)" if c.get("diverged") else ""
        row = [Cell(f"{c['name']}{marked}"), Cell(c["role"])]
        row += [count_cell(c.get("n_train")), count_cell(c.get("n_test"))]
        row.append(number_cell(metrics.get(run.metric)))
        if intervals:
            low, high = intervals.get(c["name"], (math.nan, math.nan))
            known = math.isfinite(low)
            row.append(
                Cell(f"{low:.2f} to {high:.2f}" if known else "-", high - low if known else None)
            )
        row += [number_cell(by_model.get((c["name"], model))) for model in others]
        row += [number_cell(metrics.get(name)) for name in rest]
        rows.append(row)
    note = "The worst client comes first; click a heading to sort by that column."
    if others:
        kinds = ", ".join(others)
        note += f" The columns of models ({kinds}) have the same metric for each deployed model."
    return [Table(columns, rows, note)]


def _answers(run: RunData, own: Sequence[Predictions], files: Files) -> Section:
    """Returns the section on what was confused, how sure models are, and thresholds."""
    by_role: dict[str, list[Predictions]] = {}
    for p in own:
        by_role.setdefault(p.role, []).append(p)
    counts = {
        role: np.sum([numbers.confusion(p.logits, p.labels) for p in found], axis=0)
        for role, found in by_role.items()
    }
    bins = {
        role: numbers.reliability(
            np.concatenate([p.logits for p in found]), np.concatenate([p.labels for p in found])
        )
        for role, found in by_role.items()
    }
    drawn = files.drawn([figures.confusions(run, counts), figures.calibration(bins)])
    tables = [_recalls(run, own), _thresholds(run, own), _temperatures(run, own)]
    texts = [_predicted(role, found, run.classes) for role, found in counts.items()]
    return Section("What was confused", texts, drawn, [t for t in tables if t is not None])


def _predicted(role: str, counts: np.ndarray, classes: Sequence[str]) -> str:
    """Returns which class the models of a role name most often, and how many they never name."""
    named = counts[:, : len(classes)].sum(0)
    often, never = int(named.argmax()), int((named == 0).sum())
    return (
        f"The models of {role} clients answer {classes[often]} for {named[often]:,} of "
        f"{counts.sum():,} images; {counts[often].sum():,} images are of that class."
        + (f" They never name {never} of the {len(classes)} classes." if never else "")
    )


def _recalls(run: RunData, own: Sequence[Predictions]) -> Table | None:
    """Returns the recall of each class for each client, shaded by its value."""
    if not own:
        return None
    short = figures.shortened(run.classes)
    columns = [Column("client"), Column("role"), *(Column(name, True) for name in short)]
    rows = []
    for p in own:
        table = numbers.confusion(p.logits, p.labels)
        cells = [
            Cell("-")
            if math.isnan(recall)
            else Cell(f"{recall:.2f} of {total}", recall, shade(recall))
            for recall, total in zip(numbers.recalls(table), table.sum(1), strict=True)
        ]
        rows.append([Cell(p.client), Cell(p.role), *cells])
    rows.sort(key=lambda row: min((c.sort for c in row[2:] if c.sort is not None), default=2.0))
    note = (
        "Recall of each class: the share of its images that the client's deployed model finds, of "
        "how many there are. The client with the lowest recall comes first."
    )
    return Table(columns, rows, note)


def _thresholds(run: RunData, own: Sequence[Predictions]) -> Table | None:
    """Returns, for two classes, what the threshold chosen on validation images would change."""
    if len(run.classes) != 2:
        return None

    def measured(p: Predictions, chosen: Predictions) -> tuple[float, float, float]:
        at = numbers.best_threshold(numbers.softmax(chosen.logits)[:, 1], chosen.labels)
        scores = numbers.softmax(p.logits)[:, 1]
        before, after = (numbers.at_threshold(scores, p.labels, x) for x in (0.5, at))
        return at, before, after

    heads = ("own threshold", "balanced accuracy at 0.5", "at its own")
    note = (
        f"Threshold on the probability of {run.classes[1]!r} that is best on the client's "
        "validation images, and what it does on its test images."
    )
    return _changes(run, own, heads, measured, note)


def _temperatures(run: RunData, own: Sequence[Predictions]) -> Table | None:
    """Returns what dividing logits by the temperature chosen on validation images would change."""

    def measured(p: Predictions, chosen: Predictions) -> tuple[float, float, float]:
        at = numbers.best_temperature(chosen.logits, chosen.labels)
        before, after = (numbers.calibration_error(p.logits / t, p.labels) for t in (1.0, at))
        return at, before, after

    heads = ("temperature", "calibration error as it is", "at the temperature")
    note = (
        "Temperature that fits the client's validation images best, and what dividing logits by it "
        "does to the calibration error on its test images. Answers stay the same; only how sure "
        "the model is changes."
    )
    return _changes(run, own, heads, measured, note, largest_first=True)


def _changes(
    run: RunData,
    own: Sequence[Predictions],
    heads: Sequence[str],
    measured: Callable[[Predictions, Predictions], tuple[float, float, float]],
    note: str,
    *,
    largest_first: bool = False,
) -> Table | None:
    """Returns what a number chosen on validation images would change on test images.

    Args:
      run: The run.
      own: Predictions of the deployed models.
      heads: What the three numbers are that ``measured`` returns.
      measured: Given predictions on test images, and those of the same model on validation images:
        the chosen number, and what is measured on the test images without and with it.
      note: What the table says.
      largest_first: Whether the largest number without it comes first, not the smallest.
    """
    validation = {(p.client, p.model): p for p in run.predictions if p.split == "validation"}
    rows = []
    for p in own:
        chosen = validation.get((p.client, p.model))
        if chosen is None or p.split == "validation":
            continue
        at, before, after = measured(p, chosen)
        row = [Cell(p.client), Cell(p.role), count_cell(len(chosen.labels)), number_cell(at)]
        row += [number_cell(before), number_cell(after), number_cell(after - before, sign=True)]
        rows.append(row)
    if not rows:
        return None
    sign, last = (-1, 0.0) if largest_first else (1, 2.0)
    rows.sort(key=lambda row: last if row[4].sort is None else sign * row[4].sort)
    columns = [Column("client"), Column("role"), Column("validation images", True)]
    columns += [Column(head, True) for head in (*heads, "change")]
    return Table(columns, rows, note)


def _pictures(run: RunData) -> Section:
    """Returns the panels of segmentations."""
    from markupsafe import Markup

    drawn = []
    for path in sorted((run.folder / "pictures").glob("*.png"))[:_MOST_PICTURES]:
        data = path.read_bytes()
        if len(data) <= _LARGEST_PICTURE:
            code = base64.b64encode(data).decode()
            caption = f"{path.stem} clients: test images with the median and the worst Dice"
            drawn.append(Drawn(caption, Markup(f'<img alt="" src="data:image/png;base64,{code}">')))
    return Section("Segmentations", (), drawn, _worst_images(run))


def _worst_images(run: RunData) -> list[Table]:
    """Returns the test images with the lowest Dice, over all clients."""
    rows = [
        (float(dice), own.client, own.role, int(example))
        for own in run.dice
        for example, dice in zip(own.examples, own.dice, strict=True)
        if math.isfinite(dice)
    ]
    if not rows:
        return []
    columns = [Column("client"), Column("role"), Column("row of the data set", True)]
    cells = [
        [Cell(client), Cell(role), count_cell(example), number_cell(dice)]
        for dice, client, role, example in sorted(rows)[:_MOST_IMAGES]
    ]
    note = f"The test images with the lowest Dice, of {len(rows):,}. {DICE} has all of them."
    return [Table([*columns, Column("dice", True)], cells, note)]


def _foundation(run: RunData) -> Section:
    summary = run.summary
    if not summary.get("teacher"):
        return Section("The foundation model")
    rows = [
        ("model", str(summary["teacher"])),
        ("public images", str(summary.get("public"))),
        (
            "images sent to it, once each",
            f"{summary.get('teacher_queries', 0):,}",
        ),
    ]
    agreement = summary.get("teacher_agreement")
    if agreement is not None:
        rows.append(("answers that agree with the public labels", f"{agreement:.3f}"))
    return Section("The foundation model", (), (), [table_of_pairs(rows)])


def _cost(run: RunData) -> Section:
    summary = run.summary
    if not summary:
        return Section("Bytes and time")
    rounds = summary.get("stopped_after") or summary.get("rounds") or 0
    rows = []
    for way, name in (("up", "sent by all clients"), ("down", "received by all clients")):
        each = summary.get(f"bytes_{way}_per_round")
        if each is not None:
            rows.append((name, f"{amount(each)} a round, {amount(each * rounds)} in all"))
    rows.append(("time", f"{duration(summary.get('wall_s'))}"))
    rows.append(("of which compiling and tracing", f"{duration(summary.get('compile_s'))}"))
    return Section("Bytes and time", (), (), [table_of_pairs(rows)])


def _trouble(run: RunData) -> Section:
    summary, texts = run.summary, []
    for role, clients in (summary.get("diverged") or {}).items():
        if clients:
            texts.append(f"{clients} {role} clients diverged (NaN or infinity).")
    for role, uploads in (summary.get("quarantined") or {}).items():
        if uploads:
            texts.append(f"{uploads} uploads of {role} clients were not finite and were left out.")
    columns = [Column(name) for name in (run.left_out[0] if run.left_out else ())]
    table = Table(columns, [[Cell(str(v)) for v in row.values()] for row in run.left_out[:100]])
    if len(run.left_out) > 100:
        texts.append(f"The first 100 of {len(run.left_out)} examples that were left out:")
    return Section("What went wrong", texts, (), [table] if run.left_out else [])


def _settings(run: RunData, changed: Sequence[tuple[str, str, str]]) -> Section:
    columns = [Column("setting"), Column("value"), Column("default")]
    tables = []
    if changed:
        rows = [[Cell(key), Cell(value), Cell(default)] for key, value, default in changed]
        tables.append(Table(columns, rows, "Settings that are not the defaults."))
    facts = [(name, str(v)) for name, v in (run.summary.get("versions") or {}).items()]
    facts += [
        (k.replace("_", " "), str(v)) for k, v in (run.provenance.get("program") or {}).items()
    ]
    for name, source in (run.provenance.get("sources") or {}).items():
        facts += [(f"{name} SHA-256", str(source.get("sha256")))] if source else []
    if facts:
        tables.append(table_of_pairs(facts))
    code = (
        "import fedhelp_jax as fh\n\n"
        f"config = fh.load_run({str(run.folder)!r}).config\n"
        'fh.run(config, "again")'
    )
    if not run.config:
        return Section("How to reproduce it", (), (), tables, folded=True)
    text = (
        "On the same processors and as many devices, the numbers are the same to the last digit. "
        "Elsewhere sums are rounded differently, and training amplifies that."
    )
    return Section("How to reproduce it", [text], (), tables, code, folded=True)


def _sortable(value: Any, missing: float) -> float:
    return missing if value is None or not math.isfinite(value) else float(value)
