"""Tests the tables of docs/results.md: groups by size, the summary of a study, and the page."""

import json

import pytest
from made_up_runs import make_run

from benchmarks.results import DOCS, METRICS, collect, guard_record, of_one_size, render, tables
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


def test_the_settings_that_trials_have_chosen_are_named(study):
    assert collect(study, "fedhelp compare", "a processor")["tuned"] == []
    path = study / "tuning.csv"
    path.write_text(
        "data,method,trial,settings,validation,diverged,chosen\n"
        "made,better,0,learning_rate=0.1,0.5,0,0\n"
        "made,better,1,learning_rate=0.2 mu=1,0.6,0,1\n"
    )
    found = collect(study, "fedhelp compare", "a processor")
    path.unlink()
    assert "| better | `learning_rate=0.2 mu=1` |" in tables(found).splitlines()


def test_a_table_marks_what_can_be_told(study):
    lines = tables(collect(study, "fedhelp compare", "a processor")).splitlines()
    better = next(line for line in lines if line.startswith("| better"))
    assert better.rstrip(" |").endswith("**") and "| **+" in better
    assert next(line for line in lines if line.startswith("| local")).startswith("| local, itself")


def test_the_page_has_a_place_for_each_summary_and_no_other(study, tmp_path):
    found = collect(study, "fedhelp compare", "a processor")
    (tmp_path / "made.json").write_text(json.dumps(found))
    page = "before\n\n<!-- made -->\nold\n<!-- end -->\n\nafter\n"
    new = render(page, tmp_path)
    assert "old" not in new and tables(found) in new
    assert new.startswith("before\n") and new.endswith("after\n")
    assert render(new, tmp_path) == new
    with pytest.raises(ValueError, match="no place for made"):
        render("nothing", tmp_path)
    with pytest.raises(ValueError, match="other.json is missing"):
        render(page + page.replace("made", "other"), tmp_path)


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
    assert cells[4] == f"{sum(gains) / 2:+.3f}, {min(gains):+.3f}, 1"
    assert cells[6].endswith(", 0")
    for row in found["course"]:
        row["up"] = 0.0 if row["method"] == "worse" else 1.0
    (line,) = (line for line in guard_record({"made": found}).splitlines() if "| AUROC |" in line)
    assert "| 1 |" in line  # nobody can join a method in which nothing is sent


def test_the_page_holds_what_the_summaries_say():
    page = (DOCS / "results.md").read_text()
    assert render(page, DOCS / "results") == page
