"""Console output of runs: progress and tables of results.

Everything goes to stdout. In a terminal, the progress is one live line; elsewhere it is plain
lines, at most one every few seconds. Nothing is cut: where a line or a table is too wide, parts of
it are left out.
"""

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.terminal import wrapped
from fedhelp_jax.report import run_files
from fedhelp_jax.report.summary import SYNTHETIC
from fedhelp_jax.simulation.divergence import NON_FINITE
from fedhelp_jax.typing import Record

_SECONDS_A_LINE = 2.0

# More columns than this would be too narrow to read.
_MOST_METRICS = 6

# Pairs of a key in summary.json and its label in tables.
_GROUP_ROWS = (
    ("small_mean", "small clients, mean"),
    ("worst_small", "small clients, worst"),
    ("large_mean", "large clients, mean"),
    ("gap", "gap, large - small"),
)


class Progress:
    """Shows the progress of a run; a context manager.

    Args:
        rounds: number of rounds of the whole run.
        first_round: number of rounds completed before, if a stopped run is resumed.
        metric: name of the headline metric.
        console: the console to print to; stdout if None.

    Example:
        >>> with Progress(2) as display:
        ...     display.update({"round": 1, "loss": 1.5, "small_mean": 0.25, "seconds": 2.0})
        round 1/2  loss 1.500  balanced accuracy small 0.250 worst - large -  2.0 s/round  left 2s
    """

    def __init__(
        self,
        rounds: int,
        *,
        first_round: int = 0,
        metric: str = "balanced_accuracy",
        console: Console | None = None,
    ):
        self._rounds = rounds
        self._first_round = first_round
        self._metric = metric
        self._console = console or stdout_console()
        self._seconds: list[float] = []
        self._printed = -math.inf
        self._live: progress.Progress | None = None
        self._task = progress.TaskID(0)

    def __enter__(self) -> "Progress":
        """Starts the display."""
        if self._console.is_terminal:
            self._live = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}", markup=False),
                console=self._console,
                refresh_per_second=4,  # leaves the cores to training
            )
            self._task = self._live.add_task("", total=self._rounds, completed=self._first_round)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the display and leaves its last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def compiling(self, done: int, total: int) -> None:
        """Shows how many of the programs are compiled."""
        if self._live is not None:
            text = f"compiling, {done} of {total} programs done" if done < total else "round 1"
            self._live.update(self._task, description=text)
        elif done == 0:
            print_line(self._console, f"compiling {total} programs; a later start loads them")

    def update(self, row: Record) -> None:
        """Shows a completed round.

        Args:
            row: `round`, and optionally `loss`, `small_mean`, `large_mean`, `worst_small` and
                `seconds`, each of which may be missing or None. `metric` names the headline metric.
        """
        if row.get("seconds") is not None:
            self._seconds.append(float(row["seconds"]))
        self._metric = row.get("metric") or self._metric
        text = self._line(row)
        now = time.perf_counter()
        if self._live is not None:
            self._live.update(self._task, completed=row["round"], description=text)
        elif row["round"] == self._rounds or now - self._printed >= _SECONDS_A_LINE:
            self._printed = now
            print_line(self._console, text)

    def note(self, message: str) -> None:
        """Shows a message above the progress."""
        print_line(self._console, message)

    def _line(self, row: Record) -> str:
        """Returns the line of a round, with as many of its parts as the console is wide."""
        width = len(str(self._rounds))
        # Each part, and its rank: those with the largest are left out first.
        parts = [
            (f"round {row['round']:{width}d}/{self._rounds}", 0),
            (f"  loss {_number(row.get('loss'))}", 4),
        ]
        if "small_mean" in row or "large_mean" in row:
            name = self._metric.replace("_", " ")
            small, worst = _number(row.get("small_mean")), _number(row.get("worst_small"))
            parts.append((f"  {name} small {small} worst {worst}", 1))
            parts.append((f" large {_number(row.get('large_mean'))}", 3))
        count = sum(map(len, (row.get("diverged") or {}).values()))
        if count:
            parts.append((f"  diverged {count}", 2))
        if self._seconds:
            # The first round of a process compiles, so its time does not predict later rounds.
            usual = statistics.median(self._seconds[1:] or self._seconds)
            parts.append((f"  {self._seconds[-1]:.1f} s/round", 5))
            parts.append((f"  left {duration(usual * (self._rounds - row['round']))}", 1))
        room = self._console.width - (2 if self._live is not None else 0)  # two for the spinner
        lines = ["".join(part for part, own in parts if own < rank) for rank in range(6, 1, -1)]
        return next((line for line in lines if len(line) <= room), lines[-1])


def print_summary(summary: Record, console: Console | None = None) -> None:
    """Prints the results of a run: a table of its clients and a table of its groups.

    Args:
        summary: the content of `summary.json`.
        console: the console to print to; stdout if None.
    """
    console = console or stdout_console()
    metric = str(summary.get("metric", "balanced_accuracy"))
    clients = summary.get("per_client") or []
    names = _shown_metrics(metric, _metric_names(clients))
    title = f"{summary.get('algorithm', '-')} on {_dataset(summary)}, teacher {_teacher(summary)}"

    def with_metrics(shown: Sequence[str]) -> Table:
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("client", overflow="fold")
        table.add_column("role")
        for name in ("train", "test", *shown):
            table.add_column(name.replace("_", " "), justify="right")
        for client in clients:
            metrics = client.get("metrics") or {}
            table.add_row(
                str(client.get("name", "-")) + (" (diverged)" if client.get("diverged") else ""),
                str(client.get("role", "-")),
                _whole(client.get("n_train")),
                _whole(client.get("n_test")),
                *(_number(metrics.get(name)) for name in shown),
            )
        return table

    # The headline metric is always shown.
    counts = range(len(names), 0, -1)
    fitting = next((n for n in counts if _fits(with_metrics(names[:n]), console)), 1)
    console.print(with_metrics(names[:fitting]))
    if fitting < len(names):
        left_out = ", ".join(name.replace("_", " ") for name in names[fitting:])
        console.print(f"Too wide for this terminal, see clients.csv: {left_out}\n")
    groups = Table(title=_metric(summary), box=box.SIMPLE_HEAD, title_justify="left")
    groups.add_column("group", no_wrap=True)
    groups.add_column("", justify="right")
    for key, label in _GROUP_ROWS:
        groups.add_row(label, _number(summary.get(key)))
    groups.add_row("clients diverged", _diverged(summary))
    if summary.get("stopped_after") is not None:
        groups.add_row("stopped after round", _whole(summary["stopped_after"]))
    for source, count in (summary.get("left_out") or {}).items():
        if count:
            groups.add_row(f"{source} examples left out", _whole(count))
    console.print(groups)


def show(folders: Sequence[Path], console: Console | None = None) -> None:
    """Prints finished runs side by side, and their gains over a `local` run if there is one.

    Raises:
        UserError: A folder does not hold a finished run.
    """
    summaries = [run_files.read_summary(folder) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if "algorithm" not in summary or not isinstance(summary.get("per_client"), list):
            raise UserError(f"{folder / 'summary.json'}: must hold algorithm and per_client")
    print_comparison(_short_names(folders), summaries, console)


def print_comparison(
    names: Sequence[str], summaries: Sequence[Record], console: Console | None = None
) -> None:
    """Prints runs as columns: their settings, their groups, their clients, and their costs."""
    console = console or stdout_console()
    reference = _reference(summaries)
    if _fits(_runs_as_columns([""] * len(names), summaries, reference, texts=False), console):
        console.print(_runs_as_columns(names, summaries, reference))
    else:
        console.print(_runs_as_rows(names, summaries, reference, console))
        print_line(console, "A wider terminal shows each client; so does fedhelp report.")
    if reference is not None and len(summaries) > 1:
        print_line(console, "In brackets: the change against local.")
    if any(s.get("synthetic") for s in summaries):
        print_line(console, wrapped(SYNTHETIC, console.file))


def _runs_as_columns(
    names: Sequence[str],
    summaries: Sequence[Record],
    reference: Record | None,
    *,
    texts: bool = True,
) -> Table:
    """Returns a table with a column per run; without ``texts``, only the rows of numbers.

    Texts may be folded into several lines, numbers must not.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")

    def add(label: str, cells: Sequence[str], *, last: bool = False) -> None:
        table.add_row(label, *cells, end_section=last)

    if texts:
        add("algorithm", [str(s.get("algorithm", "-")) for s in summaries])
        add("data", [_dataset(s) for s in summaries])
        add("teacher", [_teacher(s) for s in summaries])
    left_out = [sum((s.get("left_out") or {}).values()) for s in summaries]
    if any(left_out):
        add("examples left out", [_whole(count) for count in left_out])
    add("seed, rounds", [f"{_whole(s.get('seed'))}, {_whole(s.get('rounds'))}" for s in summaries])
    if texts:
        add("metric", [_metric(s) for s in summaries], last=True)
    for key, label in _GROUP_ROWS:
        base = reference.get(key) if reference else None
        cells = [
            _number(s.get(key)) + ("" if s is reference else _change(s.get(key), base))
            for s in summaries
        ]
        add(label, cells)
    if texts:
        add("clients diverged", [_diverged(s) for s in summaries], last=True)
    clients = _client_rows(summaries)
    for number, (label, values) in enumerate(clients, start=1):
        add(label, [_number(value) for value in values], last=number == len(clients))
    add("up a round", [amount(s.get("bytes_up_per_round")) for s in summaries])
    add("down a round", [amount(s.get("bytes_down_per_round")) for s in summaries])
    add("teacher queries", [_whole(s.get("teacher_queries")) for s in summaries])
    add("time", [duration(s.get("wall_s")) for s in summaries])
    return table


def _runs_as_rows(
    names: Sequence[str],
    summaries: Sequence[Record],
    reference: Record | None,
    console: Console,
) -> Table:
    """Returns a table with a row per run, and as many columns as fit."""

    def with_scores(count: int, *, changes: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("", overflow="fold")
        shown = _GROUP_ROWS[:count]
        for _, label in shown:
            table.add_column(label.replace(" clients,", ""), justify="right")
        for name, s in zip(names, summaries, strict=True):
            cells = [_number(s.get(key)) for key, _ in shown]
            if changes and reference is not None and s is not reference:
                cells = [
                    cell + _change(s.get(key), reference.get(key))
                    for cell, (key, _) in zip(cells, shown, strict=True)
                ]
            table.add_row(name, *cells)
        return table

    tries = [(n, changes) for changes in (True, False) for n in range(len(_GROUP_ROWS), 0, -1)]
    tables = (with_scores(n, changes=changes) for n, changes in tries)
    return next((t for t in tables if _fits(t, console)), with_scores(1, changes=False))


# --- implementation -----------------------------------------------------------------------------


def stdout_console() -> Console:
    """Returns a console on the current stdout, 120 columns wide if it is not a terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def _fits(table: Table, console: Console) -> bool:
    """Returns whether a table is not wider than the console, without a cut or folded cell."""
    unlimited = console.options.update(max_width=10_000)
    return Measurement.get(console, unlimited, table).maximum <= console.width


def print_line(console: Console, text: str) -> None:
    """Prints a line without wrapping it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    console.file.flush()  # lets users follow a log file


def _metric_names(clients: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(name for c in clients for name in (c.get("metrics") or {}))
    # Left out, since the number of diverged clients summarises this metric.
    return [name for name in names if name != NON_FINITE]


def _shown_metrics(headline: str, names: Sequence[str]) -> list[str]:
    """Returns the headline metric, followed by the other metrics.

    If there are many, parts of metrics other than the headline metric are left out.
    """
    if len(names) > _MOST_METRICS:
        others = [n for n in names if not any(n.startswith(f"{whole}_") for whole in names)]
        parts = [n for n in names if n.startswith(f"{headline}_")]
        names = [*parts, *(n for n in others if n not in parts)]
    return [headline, *(name for name in names if name != headline)]


def marked_synthetic(name: str, synthetic: Any) -> str:
    """Returns a data set's name, with "(synthetic)" added if it is and the name does not say so."""
    return f"{name} (synthetic)" if synthetic and "synthetic" not in name else name


def _dataset(summary: Record) -> str:
    return marked_synthetic(str(summary.get("dataset", "-")), summary.get("synthetic"))


def _diverged(summary: Record) -> str:
    """Returns the number of diverged clients by role, and the number of uploads left out."""
    counts = summary.get("diverged")
    if not isinstance(counts, Mapping):
        return "-"
    words = ", ".join(f"{count} {role}" for role, count in counts.items() if count) or "0"
    left_out = sum((summary.get("quarantined") or {}).values())
    return words + (f" ({left_out} uploads left out)" if left_out else "")


def _teacher(summary: Record) -> str:
    return str(summary.get("teacher") or "none")


def _metric(summary: Record) -> str:
    """Returns the split and the headline metric that is measured on it."""
    return f"{summary.get('split', 'test')} {str(summary.get('metric', '-')).replace('_', ' ')}"


def _reference(summaries: Sequence[Record]) -> Record | None:
    """Returns the local run to compare the others with, if data, seed, rounds and metric agree."""
    for summary in summaries:
        same = all(
            other.get(key) == summary.get(key)
            for other in summaries
            for key in ("dataset", "seed", "rounds", "metric")
        )
        if summary.get("algorithm") == "local" and same:
            return summary
    return None


def _client_rows(
    summaries: Sequence[Record],
) -> list[tuple[str, list[Any]]]:
    """Returns (label, headline metric in each run) per client, in order of first appearance."""
    rows: dict[str, list[Any]] = {}
    for column, summary in enumerate(summaries):
        for client in summary.get("per_client") or []:
            label = f"{client.get('name')} ({client.get('role')}, {_whole(client.get('n_train'))})"
            values = rows.setdefault(label, [None] * len(summaries))
            values[column] = (client.get("metrics") or {}).get(summary.get("metric"))
    return list(rows.items())


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the last part of each path, or the whole paths if those are not distinct."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _number(value: Any) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _change(value: Any, base: Any) -> str:
    return "" if value is None or base is None else f" ({value - base:+.3f})"


def _whole(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def amount(count: Any, unit: str = "B") -> str:
    """Returns a number of bytes, or of another unit, with a prefix; "-" for None.

    Example:
        >>> amount(70656), amount(268_336, ""), amount(0)
        ('70.7 kB', '268 k', '0 B')
    """
    if count is None or count != count:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:.0f} {unit}".rstrip()


def duration(seconds: Any) -> str:
    """Returns seconds as hours and minutes, or minutes and seconds; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
