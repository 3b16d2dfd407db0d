"""Typesets tables as text for terminals, Markdown and LaTeX."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhelp_jax.report import console as consoles

BEST, SECOND = "best", "second"


class Cell(NamedTuple):
    """The text of a table cell and its mark: "best", "second" or none."""

    text: str
    mark: str = ""


class Grid(NamedTuple):
    """A table before it is typeset: title, column heads, rows, and notes below it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str]


def print_grid(grid: Grid, console: Console | None = None) -> None:
    """Prints a table; the best of a column is bold with ``*``, the second underlined with ``+``."""
    console = console or consoles.stdout_console()
    columns = len(grid.heads)
    table = _typeset(grid, columns)
    # Cells in several lines are harder to read than a table without its last columns.
    while console.is_terminal and columns > 2 and _is_too_wide(table, console):
        columns -= 1
        table = _typeset(grid, columns)
    console.print(table)
    notes = ["* best, + second best of the column."] if _marked(grid) else []
    if columns < len(grid.heads):
        left_out = ", ".join(grid.heads[columns:])
        notes.append(f"Too wide for this terminal, and so only in the files: {left_out}.")
    for note in [*notes, *grid.notes]:
        if console.is_terminal:
            console.print(Text(note))  # wrapped between words
        else:
            consoles.print_line(console, note)


def _typeset(grid: Grid, columns: int) -> Table:
    """Returns the first columns of a table."""
    table = Table(
        title=Text(grid.title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    for i, head in enumerate(grid.heads[:columns]):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=not i)
    styles = {BEST: ("bold", "*"), SECOND: ("underline", "+"), "": ("", " " * _marked(grid))}
    for row in grid.rows:
        cells = []
        for i, cell in enumerate(row[:columns]):
            style, sign = styles[cell.mark]
            cells.append(Text(cell.text, style).append(sign if i else "", style="not underline"))
        table.add_row(*cells)
    return table


def _is_too_wide(table: Table, console: Console) -> bool:
    widest = console.options.update(width=1000)
    return table.__rich_measure__(console, widest).maximum > console.width


def markdown(grid: Grid) -> str:
    """Returns a Markdown table, with the best of a column in bold and the second in italics."""
    around = {BEST: "**", SECOND: "*", "": ""}

    def line(cells: Iterable[str]) -> str:
        escaped = (re.sub(r"([|_])", r"\\\1", cell) for cell in cells)
        return f"| {' | '.join(escaped)} |"

    legend = ["**Best**, *second best* of the column."] if _marked(grid) else []
    lines = [
        f"### {grid.title}",
        "",
        line(grid.heads),
        "|---|" + "---:|" * (len(grid.heads) - 1),
        *(line(around[c.mark] + c.text + around[c.mark] for c in row) for row in grid.rows),
        "",
        " ".join([*legend, *grid.notes]),
        "",
    ]
    return "\n".join(lines)


def latex(grid: Grid) -> str:
    r"""Returns a LaTeX table for booktabs; best is ``\textbf``, second best ``\underline``."""
    around = {BEST: r"\textbf{%s}", SECOND: r"\underline{%s}", "": "%s"}
    # Rows begin with {}, since a leading [ or * would be read as an option of the row before.
    rows = ["{}" + " & ".join(around[c.mark] % _escaped(c.text) for c in row) for row in grid.rows]
    heads = " & ".join(_escaped(head) for head in grid.heads)
    legend = ["Best in bold, second best underlined."] if _marked(grid) else []
    notes = " ".join(_escaped(note) for note in [*legend, *grid.notes])
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}\renewcommand{\arraystretch}{1.2}",
            rf"\caption{{{_escaped(grid.title)}. {notes}}}",
            r"\smallskip",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}",
            r"\toprule",
            heads + r" \\",
            r"\midrule",
            *(row + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_LATEX = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
}


def _escaped(text: str) -> str:
    if re.match(r"-\d", text):  # a minus sign, which is longer than a hyphen
        return "$-$" + _escaped(text[1:])
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _marked(grid: Grid) -> bool:
    return any(cell.mark for row in grid.rows for cell in row)
