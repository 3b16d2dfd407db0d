"""The table of a comparison, from results made up to have each case; its statistics."""

import csv
import io
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from fedhelp_jax.report import comparison
from fedhelp_jax.report.comparison import Result, compare_methods, rank_methods
from fedhelp_jax.report.statistics import (
    average_ranks,
    critical_difference,
    friedman_p_value,
    holm,
    paired_p_value,
)
from fedhelp_jax.report.tables import Cell, Grid, latex, markdown, print_grid

# Small means by method and seed.
SMALL = {
    "fedhelp": (0.80, 0.82, 0.84),
    "local": (0.60, 0.63, 0.63),
    "fed_avg": (0.7504, 0.7504, 0.7504),
    "fedprox": (0.7496, 0.7496, 0.7496),  # another number, the same three digits
    "central": (0.90, 0.91, 0.92),
}


def result(
    method: str, seed: int, small: float, data: str = "skin & chest", budget: str = ""
) -> Result:
    summary = {
        "algorithm": "centralized" if method == "central" else method,
        "metric": "balanced_accuracy",
        "synthetic": True,
        "bytes_up_per_round": 1_500_000,
        "bytes_down_per_round": 250_000,
        "wall_s": 100.0 + seed,
        "compile_s": 40.0,
    }
    scores = {"small_mean": small, "worst_small": math.nan, "large_mean": 0.5, "gap": 0.5 - small}
    return Result(data, budget, method, seed, summary, scores, 1.5 + seed)


@pytest.fixture
def results() -> list[Result]:
    return [result(m, seed, v) for m, values in SMALL.items() for seed, v in enumerate(values)]


def rows_by_method(results):
    rows = compare_methods(results, ["central", *SMALL], "fedhelp")
    return {row.method: row for row in rows}


def test_means_and_sample_deviations_over_seeds(results):
    rows = rows_by_method(results)
    for method, values in SMALL.items():
        assert rows[method].mean["small_mean"] == pytest.approx(np.mean(values))
        assert rows[method].std["small_mean"] == pytest.approx(np.std(values, ddof=1))
        assert math.isnan(rows[method].mean["worst_small"])
    assert rows["local"].costs == {
        "bytes_up_per_round": 1_500_000,
        "bytes_down_per_round": 250_000,
        "round_s": 2.5,
    }


def test_what_pools_data_is_last_and_outside_marks_and_tests(results):
    rows = rows_by_method(results)
    assert list(rows) == ["fedhelp", "local", "fed_avg", "fedprox", "central"]
    assert rows["central"].pooled
    assert rows["central"].marks == {}
    assert math.isnan(rows["central"].p)
    assert rows["fedhelp"].marks["small_mean"] == "best"


def test_what_reads_alike_is_marked_alike(results):
    rows = rows_by_method(results)
    assert rows["fed_avg"].marks["small_mean"] == rows["fedprox"].marks["small_mean"] == "second"
    assert "small_mean" not in rows["local"].marks
    assert all("gap" not in row.marks for row in rows.values())
    assert all("worst_small" not in row.marks for row in rows.values())


def test_p_values_pair_seeds_with_the_reference_and_are_adjusted(results):
    rows = rows_by_method(results)
    rivals = ["local", "fed_avg", "fedprox"]
    plain = [stats.ttest_rel(SMALL["fedhelp"], SMALL[m]).pvalue for m in rivals]
    low, middle, high = sorted(plain)
    adjusted = dict(zip(sorted(plain), (3 * low, max(3 * low, 2 * middle), 0), strict=True))
    adjusted[high] = max(adjusted[middle], high)
    for method, p in zip(rivals, plain, strict=True):
        assert rows[method].p == pytest.approx(min(1, adjusted[p]))
    assert math.isnan(rows["fedhelp"].p)


def test_a_seed_that_is_missing_is_left_out_of_the_pairs(results):
    kept = [r for r in results if (r.method, r.seed) != ("local", 2)]
    only = [r for r in kept if r.method in ("fedhelp", "local")]
    row = {r.method: r for r in compare_methods(only, list(SMALL), "fedhelp")}["local"]
    assert row.seeds == 2
    expected = stats.ttest_rel(SMALL["fedhelp"][:2], SMALL["local"][:2]).pvalue
    assert row.p == pytest.approx(expected)


def test_files_hold_the_table(results, tmp_path, capsys):
    comparison.write_comparison(results, list(SMALL), "fedhelp", tmp_path)
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == list(SMALL)
    assert float(rows[0]["small_mean"]) == pytest.approx(0.82)
    assert rows[0]["worst_small"] == rows[0]["p_holm"] == ""
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [(r["method"], r["seed"]) for r in runs] == [(r.method, str(r.seed)) for r in results]

    text = (tmp_path / "comparison.md").read_text()
    assert "### skin & chest (synthetic), balanced accuracy" in text
    assert "| fedhelp | **0.820 ± 0.020** | - | **0.500 ± 0.000** | -0.320 ± 0.020 | - |" in text
    assert "| fed\\_avg | *0.750 ± 0.000* |" in text
    assert "central pools all data" in text
    assert "Synthetic data" in text
    text = (tmp_path / "comparison.tex").read_text()
    assert r"fedhelp & \textbf{0.820 $\pm$ 0.020} & - & " in text
    assert r"fed\_avg & \underline{0.750 $\pm$ 0.000}" in text
    assert r"\caption{skin \& chest (synthetic), balanced accuracy." in text
    out = capsys.readouterr().out
    assert "0.820 ± 0.020*" in out
    assert "0.750 ± 0.000+" in out
    assert not (tmp_path / "ranks.png").exists()


def test_one_seed_is_said_to_prove_nothing(results, tmp_path, capsys):
    once = [r for r in results if r.seed == 0]
    comparison.write_comparison(once, list(SMALL), "fedhelp", tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "One seed: no method is shown to be better than another." in text
    assert "±" not in text
    assert "0.800*" in capsys.readouterr().out


def test_a_table_fits_a_terminal_of_usual_width(results, capsys):
    rows = [[Cell("per_fedavg"), *[Cell("0.123 ± 0.456", "best")] * 3, *[Cell("1.000")] * 5]]
    heads = ["method", "small mean", "worst small", "large mean", "gap", "p", "up MB", "down MB"]
    print_grid(Grid("t", [*heads, "time"], rows, []), Console(width=120))
    out = capsys.readouterr().out
    assert out.count("0.123 ± 0.456*") == 3
    assert "…" not in out


def test_signs_that_mean_something_to_typesetters_stay_what_they_are(capsys):
    odd = "a_b|c&d [bold]100%"
    grid = Grid(odd, ["method", odd], [[Cell("x"), Cell(odd, "best")]], [odd])
    print_grid(grid, Console(width=120))
    out = capsys.readouterr().out
    assert out.count(odd) == 4
    assert "| method | a\\_b\\|c&d [bold]100% |" in markdown(grid)
    assert "| x | **a\\_b\\|c&d [bold]100%** |" in markdown(grid)
    assert latex(grid).count(r"a\_b|c\&d [bold]100\%") == 4
    assert r"$-$0.5 & " in latex(Grid("", ["", ""], [[Cell("-0.5"), Cell("-")]], []))


# --- several data sets ---


def test_a_table_leaves_out_its_last_columns_where_they_do_not_fit():
    rows = [[Cell("fedhelp"), *[Cell("0.123 ± 0.456", "best")] * 4]]
    grid = Grid("t", ["method", "one", "two", "three", "four"], rows, ["A note."])

    def printed(width, terminal):
        console = Console(width=width, force_terminal=terminal, file=io.StringIO())
        print_grid(grid, console)
        return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())

    assert printed(60, True).count("0.123 ± 0.456*") == 3
    assert "only in the files: four." in " ".join(printed(60, True).split())
    assert max(map(len, printed(60, True).splitlines())) <= 60
    for whole in (printed(100, True), printed(100, False)):
        assert whole.count("0.123 ± 0.456*") == 4 and "only in the files" not in whole
    # What is written to a file is whole, whatever its width.
    assert "only in the files" not in printed(60, False)


def over_datasets() -> dict:
    tables = {}
    for data, order in (("a", (3, 2, 1)), ("b", (3, 1, 2)), ("c", (3, 2, 1))):
        names = ("fedhelp", "local", "fedavg")
        results = [
            result(m, s, 0.1 * v, data) for m, v in zip(names, order, strict=True) for s in (0, 1)
        ]
        results += [result("central", s, 0.9, data) for s in (0, 1)]
        tables[data] = results
    return tables


def test_ranks_are_of_contenders_that_every_data_set_has():
    tables = over_datasets()
    rows = {
        data: compare_methods(results, ["fedhelp", "local", "fedavg", "central"], "fedhelp")
        for data, results in tables.items()
    }
    names, ranks = rank_methods(rows)
    assert names == ["fedhelp", "local", "fedavg"]
    np.testing.assert_allclose(ranks, [1, 7 / 3, 8 / 3])
    rows["c"] = [row for row in rows["c"] if row.method != "local"]
    assert rank_methods(rows)[0] == ["fedhelp", "fedavg"]


def test_several_data_sets_have_ranks_and_their_diagram(tmp_path):
    results = [r for results in over_datasets().values() for r in results]
    methods = ["fedhelp", "local", "fedavg", "central"]
    comparison.write_comparison(results, methods, "fedhelp", tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "| fedhelp | 1.00 | 0.300 | 0.300 | 0.300 |" in text
    p = stats.friedmanchisquare([3, 3, 3], [2, 1, 2], [1, 2, 1]).pvalue
    assert f"Friedman p = {p:.3f}" in text
    assert f"Ranks closer than {critical_difference(3, 3):.2f}" in text
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "ranks.pdf").read_bytes().startswith(b"%PDF")


# --- statistics ---


def test_paired_p_values():
    ours, theirs = [0.3, 0.5, 0.4, 0.9], [0.2, 0.45, 0.1, 0.8]
    assert paired_p_value(ours, theirs) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert paired_p_value([*ours, math.nan], [*theirs, 1]) == paired_p_value(ours, theirs)
    assert math.isnan(paired_p_value([0.1], [0.2]))
    assert paired_p_value([0.5, 0.5], [0.5, 0.5]) == 1
    for ours in ([0.5, 0.75], [0.8, 0.9], [0.3, 0.4, 0.5]):  # no spread but rounding
        assert math.isnan(paired_p_value(ours, [value - 0.1 for value in ours]))


def test_holm_never_falls_nor_passes_one_and_skips_what_is_unknown():
    assert holm([0.5, math.nan, 0.01, 0.6]) == pytest.approx([1, math.nan, 0.03, 1], nan_ok=True)
    assert holm([]) == []


def test_friedman_of_what_is_equal_everywhere_is_unknown():
    assert math.isnan(friedman_p_value(np.ones((4, 3))))
    assert math.isnan(friedman_p_value(np.eye(2)))


def test_equal_values_share_their_ranks():
    np.testing.assert_array_equal(average_ranks(np.array([[1.0], [1.0], [0.0]])), [1.5, 1.5, 3])


# Demsar, JMLR 2006, table 5(a): q_0.05 of the Nemenyi test.
@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_has_the_published_quantiles(methods, q):
    expected = q * math.sqrt(methods * (methods + 1) / (6 * 12))
    assert critical_difference(methods, 12) == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_compiles(results, tmp_path):
    comparison.write_comparison(results, list(SMALL), "fedhelp", tmp_path)
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}"
        r"\input{comparison.tex}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 1000
