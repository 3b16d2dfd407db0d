"""What a page consists of: sections with texts, figures and tables, and cells for tables."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedhelp_jax.report.page.run_data import RunData
from fedhelp_jax.typing import Record

_ABOUT = {
    "balanced_accuracy": (
        "Balanced accuracy is the share of a class's images that are recognised, averaged over the "
        "classes. 1 is perfect; guessing gives 1 divided by the number of classes."
    ),
    "dice": (
        "Dice is the overlap of the predicted and the true mask, twice what both share divided by "
        "the sum of their sizes. 1 is perfect, and 0 is no overlap."
    ),
}
_ROLES = (
    "Large clients have much data and a large network; small clients have little data and a small "
    "network."
)

ON_VALIDATION = "These are results on validation images; no test image was used."


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


def notes_of(runs: Sequence[RunData]) -> list[str]:
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
        notes.append(ON_VALIDATION)
    for run in runs:
        named = f"{run.folder}: " if len(runs) > 1 else ""
        notes += [f"{named}{text}" for text in run.missing]
    return notes


def explained(metric: str) -> list[str]:
    """Returns what a reader has to know of the headline metric and the roles of clients."""
    return [" ".join(filter(None, (_ABOUT.get(metric), _ROLES)))]


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
