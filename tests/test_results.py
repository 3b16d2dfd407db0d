"""Tests the tables of docs/results.md: groups by size, the summary of a study, and the page."""

import re
import shutil

import numpy as np
import pytest
from made_up_runs import make_run, tell_dice

from benchmarks.results.collect import METRICS, as_lines, collect, of_one_size
from benchmarks.results.figures import drawn
from benchmarks.results.pages import RESULTS, figure_name, generated
from benchmarks.results.tables import guard_record, tables
from fedhelp_jax.report.run_data import find_runs, read_runs
from fedhelp_jax.report.verdict.judge import judge
from fedhelp_jax.report.verdict.rules import RULES


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study of three methods and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    for method, lift in {"local": 0.0, "better": 3.0, "worse": -3.0}.items():
        for seed in range(2):
            make_run(folder / "made" / method / f"seed{seed}", method=method, seed=seed, lift=lift)
    return folder


def test_hospitals_of_about_one_size_and_one_role_are_a_group(study):
    runs = read_runs(find_runs([study]), [study])
    clients = runs[0].summary["per_client"]
    sizes = (1000, 900, 300, 290, 52, 51)
    for client, size in zip(clients, sizes, strict=True):
        client |= {"n_train": size, "role": "large" if size > 290 else "small"}
    names = [client["name"] for client in clients]
    assert of_one_size(runs[:1]) == {
        "large, 1,000": names[:2],
        "large, 300": names[2:3],
        "small, 290": names[3:4],
        "small, 52": names[4:],
    }


def test_the_summary_has_the_gains_of_the_verdict(study):
    found = collect(study, "fedhelp compare", "a processor")
    assert found["runs"] == 6 and found["processor"] == "a processor"
    runs = read_runs(find_runs([study]), [study])
    for rule in RULES:
        for v in judge(runs, "local", rule):
            if v.hospital == "all small" and v.metric in METRICS:
                (row,) = (
                    row
                    for row in found["rows"]
                    if (row["method"], row["rule"], row["metric"], row["group"])
                    == (v.method, rule, v.metric, v.hospital)
                )
                assert row["value"] == pytest.approx(v.gain.value, abs=1e-5)
                assert row["low"] == pytest.approx(v.gain.low, abs=1e-5)
                assert row["theirs"] == pytest.approx(v.theirs, abs=1e-5)


def test_each_data_set_has_hospitals_of_its_own(tmp_path):
    for data, small in {"few": 4, "many": 6}.items():
        for method in ("local", "better"):
            make_run(tmp_path / data / method / "seed0", method=method, small=small)
    found = collect(tmp_path, "fedhelp compare", "a processor")
    assert {data: sum(own.values()) for data, own in found["groups"].items()} == {
        "few": 6,
        "many": 8,
    }
    heads = [line for line in tables(found).splitlines() if line.startswith("| method | large")]
    assert len(set(heads)) == 2


def test_the_course_is_that_of_the_small_hospitals(study):
    found = collect(study, "fedhelp compare", "a processor", against="better")
    assert found["against"] == "better" and {row["method"] for row in found["rows"]} == {
        "local",
        "worse",
    }
    (row,) = (row for row in found["course"] if row["method"] == "worse")
    runs = [run for run in read_runs(find_runs([study]), [study]) if run.label == "worse"]
    last = [run.history[-1]["small_mean"] for run in runs]
    assert len(last) == 2 and row["validation"]["10"] == pytest.approx(sum(last) / 2, abs=1e-5)
    assert "Gain over `better`" in tables(found) and "| round 10 |" in tables(found)


def test_of_masks_the_dice_is_told(tmp_path):
    for method, dice in (("local", 0.6), ("better", 0.8)):
        make_run(folder := tmp_path / "made" / method / "seed0", method=method)
        tell_dice(folder, dice + np.arange(8) / 1000)
    found = collect(tmp_path, "fedhelp compare", "a processor")
    assert {row["rule"] for row in found["rows"]} == {"as_run"}
    text = tables(found)
    assert "Gain over staying alone in Dice on made" in text
    assert "+0.200" in text and "calibration" not in text and "by what they deploy" not in text
    assert "| dice |" not in guard_record({"made": found}).lower()


def test_learning_curves_are_told_at_few_rounds(study):
    found = collect(study, "fedhelp compare", "a processor")
    for row in found["course"]:
        row["validation"] = {str(number): number / 100 for number in range(1, 19)}
    head = next(line for line in tables(found).splitlines() if "| round " in line)
    assert [cell.strip() for cell in head.split("|") if "round" in cell] == [
        f"round {number}" for number in (2, 6, 10, 14, 18)
    ]


def test_the_settings_that_trials_have_chosen_are_named(study):
    assert collect(study, "fedhelp compare", "a processor")["tuned"] == []
    path = study / "tuning.csv"
    path.write_text(
        "data,method,trial,settings,validation,diverged,chosen\n"
        "made,better,0,learning_rate=0.1 mu=1,0.5,0,0\n"
        "made,better,2,learning_rate=0.3 mu=1,,1,0\n"
        "made,better,1,learning_rate=0.2 mu=1,0.6,0,1\n"
        "made,worse,0,\"learning_rate=0.1 way=('a', 'b')\",0.5,0,0\n"
        "made,worse,1,learning_rate=0.2 way=None,0.4,0,0\n"
        "made,worse,2,learning_rate=0.3 way=True,0.7,0,1\n"
    )
    found = collect(study, "fedhelp compare", "a processor")
    path.unlink()
    lines = tables(found).splitlines()
    assert "| better | `learning_rate=0.2 mu=1` | 0.600, 0.500 |  |" in lines
    assert (
        "| worse | `learning_rate=0.3 way=True` | 0.700, 0.500, 0.400 | `learning_rate` |" in lines
    )


def test_fedhelp_is_compared_with_each_other_method(tmp_path):
    lifts = {"fedhelp": 1.0, "local": 0.0, "better": 3.0, "centralized": 3.0}
    for method, lift in lifts.items():
        for seed in range(2):
            folder = tmp_path / "made" / method / f"seed{seed}"
            make_run(folder, method=method, seed=seed, lift=lift)
    found = collect(tmp_path, "fedhelp compare", "a processor")
    rows = {(r["method"], r["rule"]): r for r in found["contest"] if r["metric"] == "auroc"}
    assert set(rows) == {(m, r) for m in lifts if m != "fedhelp" for r in ("as_run", "global")}
    (v,) = (
        v
        for v in judge(read_runs(find_runs([tmp_path]), [tmp_path]), "local", metric="auroc")
        if (v.method, v.hospital) == ("fedhelp", "all small")
    )
    assert rows["local", "as_run"]["value"] == pytest.approx(v.gain.value, abs=1e-5)
    assert rows["local", "as_run"]["p"] == pytest.approx(2 * (1 - v.gain.probability), rel=0.01)
    # Of two methods, as nobody can join `centralized`: twice the smaller p, once the larger.
    rows["local", "as_run"]["p"], rows["better", "as_run"]["p"] = 0.03, 0.04
    table = tables(found).split("over each other method")[1].split("\n\n")[1]
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines()}
    assert cells["local"].endswith(") p 0.06") and cells["better"].endswith(") p 0.06")
    assert cells["centralized"].endswith(")")  # not in bold, and without a p


def test_without_fedhelp_nothing_is_compared_with_it(study):
    found = collect(study, "fedhelp compare", "a processor")
    assert found["contest"] == [] and "over each other method" not in tables(found)


def test_a_single_small_hospital_is_all_small_ones(tmp_path):
    for method, lift in {"local": 0.0, "fedhelp": 3.0}.items():
        make_run(tmp_path / "made" / method / "seed0", method=method, small=1, lift=lift)
    found = collect(tmp_path, "fedhelp compare", "a processor")
    gains = {r["group"]: r["value"] for r in found["rows"] if r["metric"] == "auroc"}
    (own,) = (value for group, value in gains.items() if group.startswith("small"))
    assert gains["all small"] == own != 0
    assert "| all small |" not in tables(found) and "all small" not in drawn(found)["made"]
    assert "| made |" in guard_record(
        {"made": found | {"course": [{**c, "up": 1} for c in found["course"]]}}
    )


def test_hospitals_have_the_roles_of_the_alternative(tmp_path):
    for method in ("local", "zzz"):
        make_run(folder := tmp_path / "made" / method / "seed0", method=method)
        if method == "zzz":
            path = folder / "summary.json"
            path.write_text(path.read_text().replace('"role": "large"', '"role": "small"'))
    found = collect(tmp_path, "fedhelp compare", "a processor")
    assert sum(n for group, n in found["groups"]["made"].items() if "large" in group) == 2
    (row,) = (
        r
        for r in found["rows"]
        if (r["metric"], r["group"], r["rule"]) == ("auroc", "all small", "as_run")
    )
    runs = read_runs(find_runs([tmp_path]), [tmp_path])
    small = [c["name"] for c in runs[0].summary["per_client"] if c["name"].startswith("clinic")]
    (v,) = (
        v for v in judge(runs, "local", metric="auroc", groups={"s": small}) if v.hospital == "s"
    )
    assert row["value"] == pytest.approx(v.gain.value, abs=1e-5)


def test_only_seeds_of_all_methods_count(tmp_path, capsys):
    for method, seeds in {"local": 3, "better": 2}.items():
        for seed in range(seeds):
            make_run(tmp_path / "made" / method / f"seed{seed}", method=method, seed=seed)
    assert collect(tmp_path, "fedhelp compare", "a processor")["runs"] == 4
    assert "better lacks seeds, which are left out: 2" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "made" / "better")
    make_run(tmp_path / "made" / "better" / "seed7", method="better", seed=7)
    with pytest.raises(ValueError, match="no seed has been run with all methods"):
        collect(tmp_path, "fedhelp compare", "a processor")


def test_a_table_marks_what_can_be_told(study):
    lines = tables(collect(study, "fedhelp compare", "a processor")).splitlines()
    better = next(line for line in lines if line.startswith("| better"))
    assert better.rstrip(" |").endswith("**") and "| **+" in better
    assert next(line for line in lines if line.startswith("| local")).startswith("| local, itself")


def test_a_figure_has_a_panel_for_each_size(study):
    found = collect(study, "fedhelp compare", "a processor")
    figure = drawn(found)["made"]
    for text in ("better", "worse", *found["groups"]["made"], "all small", "AUROC", "broadcast"):
        assert text in figure
    assert drawn(found)["made"] == figure  # the same bytes every time


def test_a_figure_tells_what_lies_beyond_its_panels(study):
    found = collect(study, "fedhelp compare", "a processor")
    for row in found["rows"]:
        row |= {"value": 0.01, "low": 0.0, "high": 0.02}
    assert "\u2190" not in drawn(found)["made"] and "broadcast" not in drawn(found)["made"]
    row |= {"value": -0.5, "low": -0.6, "high": -0.4, "rule": "as_run", "metric": "auroc"}
    assert "\u2190 -0.50" in drawn(found)["made"]
    row |= {"value": 0.02, "low": -0.6, "high": 0.6}
    assert drawn(found)["made"].count("\u2190") == drawn(found)["made"].count("\u2192") == 1
    for row in found["rows"]:
        row |= {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "better" in drawn(found)["made"]


def test_files_are_made_from_all_summaries(study, tmp_path):
    found = collect(study, "fedhelp compare", "a processor")
    (tmp_path / "made_up.json").write_text(as_lines(found))
    files = generated(tmp_path)
    assert set(files) == {"made_up.md", "made_up_made.svg", "guard.md"}
    assert tables(found) in files["made_up.md"]
    assert f"]({figure_name('made_up', 'made')})" in files["made_up.md"]
    assert guard_record({"made_up": found}) in files["guard.md"]


def test_the_committed_files_are_those_of_the_summaries():
    files = generated()
    assert {path.name for path in RESULTS.iterdir()} == files.keys() | {
        path.name for path in RESULTS.glob("*.json")
    }
    page = (RESULTS.parent / "results.md").read_text()
    for name, text in files.items():
        committed = (RESULTS / name).read_text()
        if name.endswith(".svg"):  # other versions of matplotlib draw other bytes
            drawn_from = re.compile(r"\b[0-9a-f]{64}\b")
            assert drawn_from.findall(committed) == drawn_from.findall(text) != []
        else:
            assert committed == text
        assert f"(results/{name})" in page


def test_the_record_of_the_guard_counts_the_methods_that_lose(study):
    found = collect(study, "fedhelp compare", "a processor")
    against = collect(study, "fedhelp compare", "a processor", against="better")
    lines = guard_record({"made": found, "other": against}).splitlines()
    assert "other" not in "".join(lines)  # under the guard only staying alone is an alternative
    (line,) = (line for line in lines if "| AUROC |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    gains = [
        row["value"]
        for row in found["rows"]
        if (row["group"], row["rule"], row["metric"]) == ("all small", "as_run", "auroc")
    ]
    assert cells[:4] == ["made", "made", "AUROC", "2"]
    assert cells[4] == f"{sum(gains) / 2:+.3f}, {min(gains):+.3f}, 1, 1"
    assert cells[7].endswith(", 0, 1")
    for row in found["course"]:
        row["up"] = 0.0 if row["method"] == "worse" else 1.0
    (line,) = (line for line in guard_record({"made": found}).splitlines() if "| AUROC |" in line)
    assert "| 1 |" in line  # nobody can join a method in which nothing is sent
