"""What a page consists of: sections with texts, figures and tables, and cells for tables."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.report.run_data import RunData
from fedhelp_jax.report.summary import SYNTHETIC
from fedhelp_jax.typing import Record

_WORDS = (
    ("client", "A hospital: its images, which it shows nobody, and its networks."),
    ("large, small", "Large clients have much data and large networks, small ones little of both."),
    (
        "round",
        "The clients train. Under most methods, they then send weights or other numbers, but no "
        "images, to a server, which sends back what it makes of them.",
    ),
    ("personal model", "A client's model after training on its own images."),
    ("global model", "What the server sends: under most methods, the mean of small networks."),
    ("large model", "A large client's own network, which it never sends."),
    ("gap", "Large clients' mean minus small clients' mean; below 0, the small ones are better."),
    (
        "balanced accuracy",
        "The share of a class's images that are recognised, averaged over the classes. 1 is "
        "perfect; guessing gives 1 divided by the number of classes.",
    ),
    (
        "Dice, IoU",
        "The overlap of the predicted and the true mask: twice what both share divided by the sum "
        "of their sizes, or what they share divided by what either covers. 1 is perfect.",
    ),
    ("HD95", "How far apart the borders of both masks are, but for the farthest 5 %."),
    ("AUROC", "How well scores rank the images of a class above the others. 0.5 is guessing."),
    ("calibration error", "How far the stated confidence is from the share of right answers."),
    ("macro f1", "The mean over classes of F1, which falls with missed and with wrong findings."),
    ("loss", "The mean cross-entropy in nats; lower is better."),
)

_WORSE, _BETTER = (213, 94, 0), (0, 114, 178)

ON_VALIDATION = "These are results on validation images; no test image was used."


class Column(NamedTuple):
    """A column of a table; numbers are aligned to the right."""

    title: str
    number: bool = False


class Cell(NamedTuple):
    """A cell of a table: its text, the value to sort by, its background, and where it leads."""

    text: str
    sort: float | None = None
    shade: str = ""
    link: str = ""


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
    """A section of the page, which may be folded until a reader opens it."""

    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Drawn] = ()
    tables: Sequence[Table] = ()
    code: str = ""
    folded: bool = False


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


def notes_of(runs: Sequence[RunData]) -> list[str]:
    """Returns what a reader must know first: synthetic data, missing files, diverged runs."""
    notes = []
    if any(run.summary.get("synthetic") for run in runs):
        notes.append(SYNTHETIC)
    if any(str(run.summary.get("teacher") or "").startswith("simulated") for run in runs):
        notes.append("The foundation model is simulated.")
    if any(run.summary.get("split") == "validation" for run in runs):
        notes.append(ON_VALIDATION)
    for run in runs:
        named = f"{run.folder}: " if len(runs) > 1 else ""
        notes += [f"{named}{text}" for text in run.missing]
    return notes


def glossary() -> Section:
    """Returns the section that explains the words of the page."""
    return Section("What the words mean", (), (), [table_of_pairs(_WORDS)], folded=True)


def metrics_of(client: Record) -> Record:
    """Returns the metrics in a client's entry of ``summary.json``."""
    return client.get("metrics") or {}


def table_of_pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Returns a table without a heading, of names and values."""
    cells = [[Cell(name), Cell(value)] for name, value in rows]
    return Table([Column(""), Column("")], cells, sorts=False)


def number_text(value: Any, *, sign: bool = False) -> str:
    """Returns a number with three decimal places; "-" if it is undefined."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def number_cell(value: Any, *, sign: bool = False) -> Cell:
    """Returns the cell of a number, which may be undefined."""
    if value is None or not math.isfinite(value):
        return Cell("-")
    return Cell(number_text(value, sign=sign), float(value))


def count_cell(value: Any) -> Cell:
    """Returns the cell of a whole number, which may be unknown."""
    return Cell("-") if value is None else Cell(f"{value:,}", float(value))


def shade(share: float) -> str:
    """Returns a pale background between orange (0) and blue (1)."""
    low, high = np.array(_WORSE), np.array(_BETTER)
    strong = abs(share - 0.5) * 2
    colour = 255 - (255 - (low if share < 0.5 else high)) * 0.35 * strong
    return "rgb({:.0f},{:.0f},{:.0f})".format(*colour)
