"""The table of a comparison, with one row per method, for terminals, Markdown and LaTeX."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhelp_jax.report import console as consoles
from fedhelp_jax.report import run_files
from fedhelp_jax.report.critical_difference import critical_difference_diagram
from fedhelp_jax.report.numbers import spread_text
from fedhelp_jax.report.statistics import (
    average_ranks,
    critical_difference,
    friedman_p_value,
    holm,
    paired_p_value,
)
from fedhelp_jax.report.summary import SYNTHETIC, has_diverged
from fedhelp_jax.report.tables import BEST, SECOND, Cell, Grid, latex, markdown, print_grid
from fedhelp_jax.typing import JsonObject, Record

# Key and column name of each score, and whether larger is better; a gap has no better direction.
_SCORES = (
    ("small_mean", "small mean", True),
    ("worst_small", "worst small", True),
    ("large_mean", "large mean", True),
    ("gap", "gap", False),
)
_COSTS = (
    ("bytes_up_per_round", "up MB"),
    ("bytes_down_per_round", "down MB"),
    ("round_s", "s/round"),
)
_TESTED = "small_mean"
POOLS_DATA = "centralized"


class Result(NamedTuple):
    """One finished run.

    Attributes:
      dataset: Name of the data set, followed by that of the budget if it has one.
      budget: Name of the budget alone.
      method: Label of the method.
      seed: The seed.
      summary: Content of the run's ``summary.json``.
      scores: ``small_mean``, ``worst_small``, ``large_mean`` and ``gap`` of the headline metric on
        the test split; NaN if undefined.
      round_s: Typical seconds per round.
    """

    dataset: str
    budget: str
    method: str
    seed: int
    summary: Record
    scores: Mapping[str, float]
    round_s: float


class Row(NamedTuple):
    """The results of a method on a data set.

    Attributes:
      method: Label of the method.
      pooled: Whether the method trains on the pooled data of all clients, so that it is only a
        reference and not a contender.
      seeds: Number of runs that have a `small_mean`.
      mean: Mean of each score over the seeds; NaN if there is none.
      std: Sample standard deviation of each score; NaN for fewer than two seeds.
      marks: "best" or "second", for each score that is.
      p: p-value of the paired t test of `small_mean` against the reference, Holm-adjusted over the
        methods.
      costs: Means over the seeds of the bytes sent up and down per round, and of the seconds per
        round.
    """

    method: str
    pooled: bool
    seeds: int
    mean: Mapping[str, float]
    std: Mapping[str, float]
    marks: Mapping[str, str]
    p: float
    costs: Mapping[str, float]


def write_comparison(
    results: Sequence[Result], methods: Sequence[str], reference: str, folder: Path
) -> None:
    """Prints the comparison, and writes it to ``comparison.csv``, ``.md`` and ``.tex``.

    ``runs.csv`` has one line per run. With several data sets, a table of average ranks is added,
    and a critical-difference diagram is written to ``ranks.pdf`` and ``ranks.png``.

    Args:
      results: The finished runs.
      methods: Labels of the methods, in the order of the rows.
      reference: The method that the others are tested against.
      folder: Folder for the files.
    """
    datasets = list(dict.fromkeys(result.dataset for result in results))
    tables = {
        dataset: compare_methods([r for r in results if r.dataset == dataset], methods, reference)
        for dataset in datasets
    }
    grids = [
        _grid(dataset, rows, [r for r in results if r.dataset == dataset], reference)
        for dataset, rows in tables.items()
    ]
    # Only data sets are blocks, since the budgets of a data set are not independent of each other.
    for budget in dict.fromkeys(result.budget for result in results):
        of_budget = {result.dataset for result in results if result.budget == budget}
        ranked = {dataset: rows for dataset, rows in tables.items() if dataset in of_budget}
        names, ranks = rank_methods(ranked)
        pictures = [folder / f"{f'ranks {budget}'.strip()}.{kind}" for kind in ("png", "pdf")]
        for picture in pictures:
            picture.unlink(missing_ok=True)
        if len(ranked) > 1 and len(names) > 1:
            distance = critical_difference(len(names), len(ranked))
            grids.append(_rank_grid(names, ranks, ranked, budget, distance))
            for picture in pictures:
                critical_difference_diagram(picture, names, ranks, distance)
    run_files.write_csv(folder / "runs.csv", *_run_lines(results))
    run_files.write_csv(folder / "comparison.csv", *_comparison_lines(tables))
    run_files.write_text(folder / "comparison.md", "\n".join(markdown(grid) for grid in grids))
    run_files.write_text(folder / "comparison.tex", "\n".join(latex(grid) for grid in grids))
    for grid in grids:
        print_grid(grid)


def compare_methods(results: Sequence[Result], methods: Sequence[str], reference: str) -> list[Row]:
    """Returns the rows of one data set: contenders first, then pooled methods, as in `methods`."""
    by_method = {method: [r for r in results if r.method == method] for method in methods}
    by_method = {method: runs for method, runs in by_method.items() if runs}
    pooled = {m for m, runs in by_method.items() if runs[0].summary["algorithm"] == POOLS_DATA}
    rivals = [m for m in by_method if m != reference and m not in pooled]
    ours = {r.seed: r.scores[_TESTED] for r in by_method.get(reference, [])}
    p_values = dict(zip(rivals, holm([_paired(ours, by_method[m]) for m in rivals]), strict=True))
    means = {
        method: {key: _mean([r.scores[key] for r in runs]) for key, *_ in _SCORES}
        for method, runs in by_method.items()
    }
    marks: dict[str, dict[str, str]] = {method: {} for method in by_method}
    for key, _, larger_is_better in _SCORES:
        if larger_is_better:
            found = _marks({m: means[m][key] for m in by_method if m not in pooled})
            for method, mark in found.items():
                marks[method][key] = mark
    return [
        Row(
            method=method,
            pooled=method in pooled,
            seeds=sum(math.isfinite(r.scores[_TESTED]) for r in by_method[method]),
            mean=means[method],
            std={key: _std([r.scores[key] for r in by_method[method]]) for key, *_ in _SCORES},
            marks=marks[method],
            p=p_values.get(method, math.nan),
            costs={key: _mean([_cost(r, key) for r in by_method[method]]) for key, _ in _COSTS},
        )
        for method in sorted(by_method, key=lambda m: m in pooled)
    ]


def rank_methods(tables: Mapping[str, Sequence[Row]]) -> tuple[list[str], np.ndarray]:
    """Returns the contenders that all data sets have, and their average ranks by `small_mean`.

    The best method is first.
    """
    values = [
        {r.method: r.mean[_TESTED] for r in rows if not r.pooled and math.isfinite(r.mean[_TESTED])}
        for rows in tables.values()
    ]
    names = [name for name in values[0] if all(name in other for other in values)]
    if not names:
        return [], np.zeros(0)
    ranks = average_ranks(np.array([[block[name] for block in values] for name in names]))
    order = np.argsort(ranks, kind="stable")
    return [names[i] for i in order], ranks[order]


# --- implementation -----------------------------------------------------------------------------


def _grid(dataset: str, rows: Sequence[Row], results: Sequence[Result], reference: str) -> Grid:
    first = results[0].summary
    metric = str(first["metric"]).replace("_", " ")
    seeds = len({r.seed for r in results})
    short = [f"{row.method} {row.seeds}" for row in rows if row.seeds < seeds]
    synthetic = first["synthetic"]
    notes = [
        f"Mean ± standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: no method is shown to be better than another.",
        f"p: paired t test of small mean against {reference} over seeds, Holm-adjusted."
        if any(row.method == reference for row in rows)
        else f"No run of {reference} is finished: nothing is tested against it.",
        "up, down: sent by and to all clients in a round. s/round: the median after the first.",
        *([f"Fewer seeds: {', '.join(short)}."] if short else []),
        *_diverged(results),
        *(
            [
                f"{row.method} pools all data: outside marks, tests and ranks."
                for row in rows
                if row.pooled
            ]
        ),
        *([SYNTHETIC] if synthetic else []),
    ]
    title = f"{consoles.marked_synthetic(dataset, synthetic)}, {metric}"
    heads = ["method", *(name for _, name, _ in _SCORES), "p", *(name for _, name in _COSTS)]
    return Grid(title, heads, [_cells(row) for row in rows], notes)


def _diverged(results: Sequence[Result]) -> list[str]:
    """Returns a note that lists the runs with diverged clients."""
    found = []
    for r in results:
        count = _count_diverged(r)
        if count:
            lost = ", no score" if has_diverged(r.summary) else ""
            of = len(r.summary["per_client"])
            found.append(f"{r.method} seed {r.seed} ({count} of {of} clients{lost})")
    return [f"Diverged (NaN or infinity): {', '.join(found)}."] if found else []


def _count_diverged(result: Result) -> int:
    return sum((result.summary.get("diverged") or {}).values())


def _cells(row: Row) -> list[Cell]:
    scores = [
        Cell(spread_text(row.mean[key], row.std[key]), row.marks.get(key, ""))
        for key, *_ in _SCORES
    ]
    up, down, seconds = (row.costs[key] for key, _ in _COSTS)
    costs = [f"{up / 1e6:.2f}", f"{down / 1e6:.2f}", f"{seconds:.2f}"]
    return [Cell(row.method), *scores, Cell(_p(row.p)), *map(Cell, costs)]


def _rank_grid(
    names: Sequence[str],
    ranks: np.ndarray,
    tables: Mapping[str, Sequence[Row]],
    budget: str,
    distance: float,
) -> Grid:
    values = np.array(
        [
            [next(r.mean[_TESTED] for r in rows if r.method == name) for rows in tables.values()]
            for name in names
        ]
    )
    rows = [
        [Cell(name), Cell(f"{rank:.2f}"), *(Cell(f"{value:.3f}") for value in line)]
        for name, rank, line in zip(names, ranks, values, strict=True)
    ]
    notes = [
        f"Average ranks by small mean over {len(tables)} data sets; Friedman p = "
        f"{_p(friedman_p_value(values))}.",
        f"Ranks closer than {distance:.2f} do not differ at 0.05 (Nemenyi).",
    ]
    left_out = {r.method for t in tables.values() for r in t if not r.pooled} - set(names)
    if left_out:
        notes.append(f"Not on all data sets: {', '.join(sorted(left_out))}.")
    return Grid(f"Average ranks {budget}".strip(), ["method", "rank", *tables], rows, notes)


def _run_lines(results: Sequence[Result]) -> tuple[list[str], list[JsonObject]]:
    """Returns the columns and the lines of ``runs.csv``."""
    lines = [
        {
            "data": r.dataset,
            "method": r.method,
            "seed": r.seed,
            "metric": r.summary["metric"],
            **r.scores,
            "diverged": _count_diverged(r),
            **{key: _cost(r, key) for key, _ in _COSTS},
            "wall_s": r.summary["wall_s"],
            "compile_s": r.summary["compile_s"],
        }
        for r in results
    ]
    return list(lines[0]), lines


def _comparison_lines(
    tables: Mapping[str, Sequence[Row]],
) -> tuple[list[str], list[JsonObject]]:
    """Returns the columns and the lines of ``comparison.csv``."""
    lines = [
        {
            "data": dataset,
            "method": row.method,
            "seeds": row.seeds,
            **{
                f"{key}{suffix}": values[key]
                for key, *_ in _SCORES
                for suffix, values in (("", row.mean), ("_std", row.std))
            },
            "p_holm": row.p,
            **row.costs,
        }
        for dataset, rows in tables.items()
        for row in rows
    ]
    return list(lines[0]), lines


def _cost(result: Result, key: str) -> float:
    return result.round_s if key == "round_s" else result.summary[key]


def _paired(ours: Mapping[int, float], runs: Sequence[Result]) -> float:
    theirs = {r.seed: r.scores[_TESTED] for r in runs if r.seed in ours}
    return paired_p_value([ours[seed] for seed in theirs], list(theirs.values()))


def _marks(values: Mapping[str, float]) -> dict[str, str]:
    """Returns the best and second-best marks; values that print with equal digits are equal."""
    shown = {name: round(value, 3) for name, value in values.items() if math.isfinite(value)}
    places = dict(zip(sorted(set(shown.values()), reverse=True), (BEST, SECOND), strict=False))
    return {name: places[value] for name, value in shown.items() if value in places}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _std(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.stdev(known) if len(known) > 1 else math.nan


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
