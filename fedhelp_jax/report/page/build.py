"""Builds the report of one run, or of several beside each other."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report import run_files
from fedhelp_jax.report.console import amount, duration, marked_synthetic
from fedhelp_jax.report.page import figures, numbers
from fedhelp_jax.report.page.figures import Figure, words
from fedhelp_jax.report.page.run_data import (
    RunData,
    SweepData,
    find_runs,
    labelled,
    read_run,
    read_sweep,
)
from fedhelp_jax.report.predictions import Predictions
from fedhelp_jax.simulation.divergence import NON_FINITE
from fedhelp_jax.typing import Record

PAGE, FOLDER = "report.html", "report"
_MOST_PICTURES = 6
_LARGEST_PICTURE = 1_000_000  # bytes
_WORSE, _BETTER = (213, 94, 0), (0, 114, 178)


class Column(NamedTuple):
    """A column of a table; numbers are aligned to the right."""

    title: str
    number: bool = False


class Cell(NamedTuple):
    """A cell of a table: its text, the value it is sorted by, and its background."""

    text: str
    sort: float | None = None
    shade: str = ""


class Table(NamedTuple):
    """A table, with a remark below it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    sorts: bool = True


class Drawn(NamedTuple):
    """A figure as markup."""

    caption: str
    markup: str


class Section(NamedTuple):
    """A section of the page."""

    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Drawn] = ()
    tables: Sequence[Table] = ()
    code: str = ""


class Card(NamedTuple):
    """A number at the top of the page."""

    label: str
    value: str
    more: str


class Page(NamedTuple):
    """The content of the page."""

    title: str
    subtitle: str
    notes: Sequence[str]
    cards: Sequence[Card]
    sections: Sequence[Section]


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    changed: Mapping[Path, Sequence[tuple[str, str, str]]] | None = None,
) -> Path:
    """Writes ``report.html``, and its figures and numbers to the folder ``report``.

    Args:
      folders: Run folders, or folders that hold runs at any depth (studies).
      out: The folder to write to.
      changed: For each run folder, the settings that are not the defaults: key, value, default.

    Returns:
      The path of the page.

    Raises:
      UserError: If there is no run in the folders.
    """
    found = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    sweep = read_sweep(folders[0]) if len(folders) == 1 and not found else None
    if not found and sweep is None:
        named = ", ".join(map(str, folders))
        raise UserError(f"{named}: no run is there (config.json, metrics.jsonl or summary.json)")
    files = _Files(out / FOLDER)
    if sweep is not None:
        page = _page_of_sweep(sweep, files)
    elif len(found) == 1:
        page = _page_of_run(read_run(found[0]), (changed or {}).get(found[0], ()), files)
    else:
        root = folders[0].resolve() if len(folders) == 1 else Path("/nowhere")
        runs = labelled([read_run(run, details=False) for run in found], root)
        page = _page_of_runs(runs, files)
    # Imported here because only this needs it.
    from jinja2 import Environment, StrictUndefined

    source = (
        resources.files("fedhelp_jax.report.page")
        .joinpath("page.html.jinja")
        .read_text(encoding="utf-8")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    run_files.write_text(out / PAGE, environment.from_string(source).render(page=page) + "\n")
    return out / PAGE


class _Files:
    """Writes each figure as SVG and PNG and its numbers as CSV, and returns its markup."""

    def __init__(self, folder: Path):
        self._folder = folder

    def drawn(self, found: Sequence[Figure | None], prefix: str = "") -> list[Drawn]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return [self._drawn(figure, prefix) for figure in found if figure is not None]

    def _drawn(self, figure: Figure, prefix: str) -> Drawn:
        from markupsafe import Markup
        from matplotlib import rc_context

        name = f"{prefix}{figure.name}"
        # Laid out once, for both formats.
        figure.canvas.draw_without_rendering()
        figure.canvas.set_layout_engine("none")
        # Text as outlines, so that it fits everywhere; ids that are the same every time.
        with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
            text = io.StringIO()
            figure.canvas.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        run_files.write_text(self._folder / f"{name}.svg", svg)
        run_files.write_figure(self._folder / f"{name}.png", figure.canvas)
        columns = list(dict.fromkeys(key for row in figure.rows for key in row))
        run_files.write_csv(self._folder / f"{name}.csv", columns, figure.rows)
        return Drawn(figure.caption, Markup(_inline(svg, name)))


def _inline(svg: str, name: str) -> str:
    """Returns an SVG file as part of a page, where ids must differ between figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(width|height)="[\d.]+pt" ', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|href="#|url\(#)(?!' + re.escape(name) + "-)", rf"\1{name}-", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


# --- one run --------------------------------------------------------------------------------------


def _page_of_run(run: RunData, changed: Sequence[tuple[str, str, str]], files: _Files) -> Page:
    summary, split = run.summary, run.summary.get("split", "test")
    deployed = {c["name"]: c["model"] for c in summary.get("per_client") or []}
    own = [p for p in run.predictions if p.split == split and p.model == deployed.get(p.client)]
    by_balance = run.metric == "balanced_accuracy"
    intervals = {p.client: numbers.interval(p.logits, p.labels) for p in own if by_balance}
    sections = [
        Section(
            "Who gained, who lost",
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
        _settings(run, changed),
    ]
    return Page(
        f"{run.label} on {marked_synthetic(run.dataset, summary.get('synthetic'))}",
        f"{len(summary.get('per_client') or [])} clients, "
        f"{summary.get('stopped_after') or summary.get('rounds', '?')} rounds, seed {run.seed}; "
        f"{words(run.metric)} on {split} images",
        _notes([run]),
        _cards(run),
        [s for s in sections if s.texts or s.figures or s.tables or s.code],
    )


def _cards(run: RunData) -> list[Card]:
    summary = run.summary
    if not summary:
        return []
    first = next((row for row in run.history if row.get("small_mean") is not None), {})
    since = f"validation after round {first['round']}: " if first else ""
    worst = min(
        (
            c
            for c in summary.get("per_client") or []
            if c["role"] == "small" and _metrics(c).get(run.metric) is not None
        ),
        key=lambda c: c["metrics"][run.metric],
        default=None,
    )

    def before(key: str) -> str:
        return f"{since}{_number(first.get(key))}" if since else ""

    return [
        Card("Small clients, mean", _number(summary.get("small_mean")), before("small_mean")),
        Card(
            "Worst small client",
            _number(summary.get("worst_small")),
            str(worst["name"]) if worst else "",
        ),
        Card("Large clients, mean", _number(summary.get("large_mean")), before("large_mean")),
        Card("Gap, large less small", _number(summary.get("gap"), sign=True), before("gap")),
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
    names = dict.fromkeys(n for c in entries for n in _metrics(c))
    rest = [n for n in names if n not in (run.metric, NON_FINITE)]
    columns = [Column("client"), Column("role"), Column("training images", True)]
    columns += [Column(f"{split} images", True), Column(f"deployed: {words(run.metric)}", True)]
    if intervals:
        columns.append(Column("95 % interval", True))
    columns += [Column(f"{model} model", True) for model in others]
    columns += [Column(words(name), True) for name in rest]
    rows = []
    missing = math.inf
    for c in sorted(entries, key=lambda c: _sortable(_metrics(c).get(run.metric), missing)):
        metrics = _metrics(c)
        marked = " (diverged)" if c.get("diverged") else ""
        row = [Cell(f"{c['name']}{marked}"), Cell(c["role"])]
        row += [_count(c.get("n_train")), _count(c.get("n_test"))]
        row.append(_cell(metrics.get(run.metric)))
        if intervals:
            low, high = intervals.get(c["name"], (math.nan, math.nan))
            known = math.isfinite(low)
            row.append(
                Cell(f"{low:.2f} to {high:.2f}" if known else "-", high - low if known else None)
            )
        row += [_cell(by_model.get((c["name"], model))) for model in others]
        row += [_cell(metrics.get(name)) for name in rest]
        rows.append(row)
    note = "The worst client comes first; a click on a heading sorts by that column."
    if others:
        kinds = ", ".join(others)
        note += f" The columns of models ({kinds}) have the same metric for each deployed model."
    return [Table(columns, rows, note)]


def _answers(run: RunData, own: Sequence[Predictions], files: _Files) -> Section:
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
    tables = [_recalls(run, own), _thresholds(run, own)]
    return Section("What was confused", (), drawn, [t for t in tables if t is not None])


def _recalls(run: RunData, own: Sequence[Predictions]) -> Table | None:
    """Returns the recall of each class for each client, shaded by its value."""
    if not own:
        return None
    columns = [Column("client"), Column("role"), *(Column(name, True) for name in run.classes)]
    rows = []
    for p in own:
        table = numbers.confusion(p.logits, p.labels)
        cells = [
            Cell("-")
            if math.isnan(recall)
            else Cell(f"{recall:.2f} of {total}", recall, _shade(recall))
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
    if len(run.classes) != 2 or not own:
        return None
    validation = {(p.client, p.model): p for p in run.predictions if p.split == "validation"}
    rows = []
    for p in own:
        chosen = validation.get((p.client, p.model))
        if chosen is None or p.split == "validation":
            continue
        at = numbers.best_threshold(numbers.softmax(chosen.logits)[:, 1], chosen.labels)
        scores = numbers.softmax(p.logits)[:, 1]
        half = numbers.at_threshold(scores, p.labels, 0.5)
        own_way = numbers.at_threshold(scores, p.labels, at)
        row = [Cell(p.client), Cell(p.role), _count(len(chosen.labels)), _cell(at)]
        rows.append([*row, _cell(half), _cell(own_way), _cell(own_way - half, sign=True)])
    if not rows:
        return None
    rows.sort(key=lambda row: row[4].sort if row[4].sort is not None else 2.0)
    columns = [Column("client"), Column("role"), Column("validation images", True)]
    columns += [Column("own threshold", True), Column("balanced accuracy at 0.5", True)]
    columns += [Column("at its own", True), Column("change", True)]
    note = (
        f"Threshold on the probability of {run.classes[1]!r} that is best on the client's "
        "validation images, and what it does on its test images."
    )
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
    return Section("Segmentations", (), drawn)


def _foundation(run: RunData) -> Section:
    summary = run.summary
    if not summary.get("teacher"):
        return Section("The foundation model")
    rows = [
        ("model", str(summary["teacher"])),
        ("public images", str(summary.get("public"))),
        ("distinct images asked about, once", f"{summary.get('teacher_queries', 0):,}"),
    ]
    agreement = summary.get("teacher_agreement")
    if agreement is not None:
        rows.append(("answers that agree with the public labels", f"{agreement:.3f}"))
    return Section("The foundation model", (), (), [_pairs(rows)])


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
    return Section("Bytes and time", (), (), [_pairs(rows)])


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
        tables.append(_pairs(facts))
    code = (
        "import fedhelp_jax as fh\n\n"
        f"config = fh.load_run({str(run.folder)!r}).config\n"
        'fh.run(config, "again")'
    )
    return Section("How to make it again", (), (), tables, code if run.config else "")


# --- several runs ---------------------------------------------------------------------------------


def _page_of_runs(runs: Sequence[RunData], files: _Files) -> Page:
    sections = []
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    for number, dataset in enumerate(datasets):
        own = [run for run in runs if run.dataset == dataset]
        synthetic = any(run.summary.get("synthetic") for run in own)
        drawn = [figures.learning_of_methods(own), figures.clients_of_methods(own)]
        prefix = f"{number + 1}_" if len(datasets) > 1 else ""
        title = marked_synthetic(dataset, synthetic)
        sections.append(Section(title, (), files.drawn(drawn, prefix), [_methods(own)]))
    sections.append(Section("The runs", (), (), [_runs(runs)]))
    finished = [run for run in runs if run.summary]
    return Page(
        f"{len(dict.fromkeys(r.label for r in runs))} methods on {', '.join(datasets)}"
        if len(datasets) < 4
        else f"{len(runs)} runs on {len(datasets)} data sets",
        f"{len(finished)} finished runs of {len(runs)}",
        _notes(runs),
        (),
        sections,
    )


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
            Column("small clients better", True),
        ]
    columns += [Column("up a round", True), Column("time", True)]
    rows = []
    for label, own in by_label.items():
        row = [Cell(label), _count(len(own))]
        for key, _ in scores:
            mean, spread = numbers.mean_and_spread([r.summary.get(key) for r in own])
            more = "" if math.isnan(spread) else f" ± {spread:.3f}"
            row.append(Cell(_number(mean) + more, None if math.isnan(mean) else mean))
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
        _cell(float(np.mean(changes)), sign=True),
        Cell(f"{gained} of {len(changes)}", gained / len(changes)),
    ]


def _small(run: RunData) -> dict[str, float]:
    return {
        c["name"]: c["metrics"][run.metric]
        for c in run.summary.get("per_client") or []
        if c["role"] == "small" and _metrics(c).get(run.metric) is not None
    }


def _runs(runs: Sequence[RunData]) -> Table:
    columns = [Column("folder"), Column("method"), Column("data"), Column("seed", True)]
    columns += [Column("rounds", True), Column("small mean", True), Column("worst small", True)]
    columns += [Column("large mean", True), Column("gap", True)]
    rows = []
    for run in runs:
        s, done = run.summary, run.history[-1]["round"] if run.history else 0
        row = [Cell(str(run.folder)), Cell(run.label), Cell(run.dataset), _count(run.seed)]
        row.append(_count(done))
        keys = ("small_mean", "worst_small", "large_mean", "gap")
        rows.append([*row, *(_cell(s.get(key)) for key in keys)])
    return Table(columns, rows)


# --- sweeps ---------------------------------------------------------------------------------------


def _page_of_sweep(sweep: SweepData, files: _Files) -> Page:
    drawn = files.drawn([figures.swept(name, sweep.rows) for name in sweep.swept])
    columns = [
        Column(name.replace("_", " "), name not in ("split", "metric")) for name in sweep.rows[0]
    ]
    rows = [[Cell(_rounded(text)) for text in row.values()] for row in sweep.rows]
    metric = words(str(sweep.rows[0].get("metric", "?")))
    split = sweep.rows[0]["split"]
    notes = []
    if split == "validation":
        notes.append("These are results on validation images; no test image was used.")
    return Page(
        f"Sweep over {', '.join(sweep.swept)}",
        f"{len(sweep.rows)} runs; {metric} on {split} images",
        notes,
        (),
        [
            Section("What each setting does", (), drawn),
            Section("The runs", (), (), [Table(columns, rows, "A click on a heading sorts.")]),
        ],
    )


def _rounded(text: str) -> str:
    """Returns a number of a CSV file with at most four decimal places; other text unchanged."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if value.is_integer() or abs(value) < 1e-3 else f"{value:.4g}"


# --- small parts ----------------------------------------------------------------------------------


def _notes(runs: Sequence[RunData]) -> list[str]:
    """Returns what a reader must know first: synthetic data, missing files, diverged runs."""
    notes = []
    if any(run.summary.get("synthetic") for run in runs):
        notes.append(
            "Synthetic data: made by a procedure. This shows that the method runs, not what it "
            "does for patients."
        )
    if any(str(run.summary.get("teacher") or "").startswith("simulated") for run in runs):
        notes.append("The foundation model is simulated.")
    if any(run.summary.get("split") == "validation" for run in runs):
        notes.append("These are results on validation images; no test image was used.")
    for run in runs:
        named = f"{run.folder}: " if len(runs) > 1 else ""
        notes += [f"{named}{text}" for text in run.missing]
    return notes


def _metrics(client: Record) -> Record:
    return client.get("metrics") or {}


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    cells = [[Cell(name), Cell(value)] for name, value in rows]
    return Table([Column(""), Column("")], cells, sorts=False)


def _number(value: Any, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def _cell(value: Any, *, sign: bool = False) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("-")
    return Cell(_number(value, sign=sign), float(value))


def _count(value: Any) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:,}", float(value))


def _sortable(value: Any, missing: float) -> float:
    return missing if value is None or not math.isfinite(value) else float(value)


def _shade(share: float) -> str:
    """Returns a pale background between orange (0) and blue (1)."""
    low, high = np.array(_WORSE), np.array(_BETTER)
    strong = abs(share - 0.5) * 2
    colour = 255 - (255 - (low if share < 0.5 else high)) * 0.35 * strong
    return "rgb({:.0f},{:.0f},{:.0f})".format(*colour)
