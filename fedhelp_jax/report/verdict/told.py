"""Tells verdicts in tables and ``verdict.csv``."""

import math
from collections.abc import Sequence
from pathlib import Path

from fedhelp_jax.report import run_files
from fedhelp_jax.report.page.figures import words
from fedhelp_jax.report.tables import Cell, Grid
from fedhelp_jax.report.verdict.gain import UNCLEAR
from fedhelp_jax.report.verdict.judge import Verdict, wrong_by_chance

VERDICT = "verdict.csv"

# A class with fewer test images than this says little.
_FEW = 5
# More test images than any hospital will have.
_MANY = 100_000


def of_hospitals(verdicts: Sequence[Verdict], against: str) -> Grid:
    """Returns the table of one method and metric on one data set, a row per hospital."""
    first = verdicts[0]
    heads = ["hospital", against, first.method, "gain", "95 % interval", "verdict", "images"]
    rows = [
        [
            Cell(v.hospital),
            Cell(f"{v.theirs:.3f}"),
            Cell(f"{v.ours:.3f}"),
            *_gain_cells(v),
            Cell(v.gain.verdict),
            Cell(_images(v)),
        ]
        for v in _worst_first(verdicts)
    ]
    title = f"{first.place}: {words(first.metric)} of {first.method} against {against}"
    notes = _notes(verdicts)
    if any(v.gain.verdict == UNCLEAR for v in verdicts):
        notes.append(
            "images: how many test images there are, and, where the verdict is unclear, how many "
            "would tell a gain of this size in four cases out of five."
        )
    return Grid(title, heads, rows, notes)


def _images(verdict: Verdict) -> str:
    """Returns how many test images there are, and how many there should be."""
    g = verdict.gain
    if g.verdict != UNCLEAR or g.value == 0:
        return f"{g.examples:,}"
    if math.isinf(g.needed):
        return f"{g.examples:,}; more seeds"
    wanted = f">{_MANY:,}" if g.needed > _MANY else f"{_rounded(g.needed):,}"
    return f"{g.examples:,} of {wanted}"


def of_methods(verdicts: Sequence[Verdict], against: str) -> Grid:
    """Returns the table of one metric on one data set, with a row for each method and role."""
    heads = ["method", "hospitals", "gain", "95 % interval", "gain", "lose", UNCLEAR]
    rows = []
    for method, role in dict.fromkeys((v.method, v.role) for v in verdicts):
        own = [v for v in verdicts if (v.method, v.role) == (method, role)]
        each = [v.gain.verdict for v in own if not v.is_of_all]
        counts = [each.count(word) for word in ("gains", "loses", UNCLEAR)]
        whole = next((v for v in own if v.is_of_all), own[0])
        rows.append([Cell(method), Cell(f"{len(each)} {role}"), *_gain_cells(whole)])
        rows[-1] += [Cell(str(count)) for count in counts]
    first = verdicts[0]
    title = f"{first.place}: {words(first.metric)} against {against}"
    return Grid(title, heads, rows, _notes(verdicts))


def grids(verdicts: Sequence[Verdict], against: str) -> list[Grid]:
    """Returns a table for each data set and metric: of hospitals, or of methods if many."""
    tables = []
    for place, metric in dict.fromkeys((v.place, v.metric) for v in verdicts):
        own = [v for v in verdicts if (v.place, v.metric) == (place, metric)]
        one = len({v.method for v in own}) == 1
        tables.append(of_hospitals(own, against) if one else of_methods(own, against))
    return tables


def _gain_cells(verdict: Verdict) -> list[Cell]:
    g = verdict.gain
    return [Cell(f"{g.value:+.3f}"), Cell(f"{g.low:+.3f} to {g.high:+.3f}")]


def write_verdicts(path: Path, verdicts: Sequence[Verdict], against: str, rule: str) -> None:
    """Writes a row for each data set, method, metric and hospital."""
    rows = [
        {
            "data": v.place,
            "method": v.method,
            "against": against,
            "deployed": rule,
            "metric": v.metric,
            "hospital": v.hospital,
            "role": v.role,
            "seeds": v.gain.seeds,
            "test_images": v.gain.examples,
            "fewest_of_a_class": _fewest(v),
            "value": v.ours,
            "value_against": v.theirs,
            "gain": v.gain.value,
            "low": v.gain.low,
            "high": v.gain.high,
            "probability": v.gain.probability,
            "verdict": v.gain.verdict,
            "images_needed": v.gain.needed,
        }
        for v in verdicts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    run_files.write_csv(path, list(rows[0]), rows)


def _worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Returns the hospitals by their gain, the smallest first, and the groups after them."""
    return sorted(verdicts, key=lambda v: (v.is_of_all, v.gain.value))


def _notes(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns how the table is to be read."""
    hospitals = [v for v in verdicts if not v.is_of_all]
    seeds = {v.gain.seeds for v in verdicts}
    notes = [
        "The interval covers the choice of test images"
        + (" and of seeds." if max(seeds) > 1 else "; with one seed, it cannot cover training."),
        f"{UNCLEAR}: the interval contains 0, so it cannot be told from these images and seeds.",
    ]
    by_chance = wrong_by_chance(verdicts)
    if by_chance >= 0.5:
        notes.append(
            f"If nobody gained or lost, about {by_chance:.0f} of these {len(hospitals)} verdicts "
            "on single hospitals would say otherwise by chance."
        )
    counts = {v.hospital: _fewest(v) for v in hospitals}
    few = {name: count for name, count in counts.items() if count is not None and count < _FEW}
    if few:
        named = ", ".join(f"{name} ({count})" for name, count in list(few.items())[:3])
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        notes.append(
            f"Every class has the same weight, even one with fewer than {_FEW} test images: "
            f"{named}{more}. Look at such hospitals with care."
        )
    return notes


def _fewest(verdict: Verdict) -> int | None:
    """Returns how many test images the smallest class has; None for masks."""
    return None if verdict.metric == "dice" else verdict.fewest


def _rounded(count: float) -> int:
    """Returns a count with two significant digits."""
    digits = max(0, int(math.log10(max(count, 1))) - 1)
    return int(round(count, -digits))
