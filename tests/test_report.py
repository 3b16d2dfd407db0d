import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.report import console, run_files


def capture(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def make_summary(algorithm="fedhelp", **changes):
    client = {"name": "clinic-5", "role": "small", "n_train": 24, "n_test": 8}
    summary = {
        "algorithm": algorithm,
        "dataset": "phantoms",
        "synthetic": True,
        "teacher": "simulated (accuracy 0.85)",
        "seed": 0,
        "rounds": 6,
        "metric": "balanced_accuracy",
        "small_mean": 0.5,
        "large_mean": 0.75,
        "worst_small": 0.25,
        "gap": 0.25,
        "evaluated": {"small": "personal", "large": "large"},
        "per_client": [client | {"metrics": {"balanced_accuracy": 0.125, "auroc": None}}],
        "bytes_up_per_round": 6_540_000,
        "bytes_down_per_round": 6_540_000,
        "teacher_queries": 512,
        "compile_s": 20.0,
        "wall_s": 61.0,
        "versions": {},
    }
    return summary | changes


# --- files --------------------------------------------------------------------------------------


def test_no_nan_ever_stands_in_json(tmp_path):
    value = {
        "a": float("nan"),
        "b": np.float32(np.inf),
        "c": (np.arange(2), np.bool_(True)),
        3: "x",
    }
    run_files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": None, "b": None, "c": [[0, 1], True], "3": "x"}
    assert "NaN" not in text and "Infinity" not in text


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    run_files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        run_files.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_metrics_are_cut_back_to_a_round(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for round in range(1, 6):
        run_files.append_metrics(path, {"round": round, "loss": np.float32("nan")})
    with path.open("a") as file:
        file.write('{"round": 6, "lo')  # killed while writing
    run_files.cut_metrics(path, 3)
    run_files.append_metrics(path, {"round": 4, "loss": 1.0})
    assert [row["round"] for row in run_files.read_metrics(path)] == [1, 2, 3, 4]
    assert run_files.read_metrics(path)[0] == {"round": 1, "loss": None}


def test_no_metrics_yet_is_nothing_to_cut(tmp_path):
    run_files.cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_broken_line_in_the_middle_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"roun\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        run_files.cut_metrics(path, 3)


def test_clients_csv_has_a_row_per_value(tmp_path):
    path = tmp_path / "clients.csv"
    row = {"client": "a, b", "role": "small", "model": "personal", "split": "test"}
    rows = [
        row | {"metric": "accuracy", "value": np.float32(0.5)},
        row | {"metric": "auroc", "value": float("nan")},
    ]
    run_files.write_csv(path, run_files.CLIENT_COLUMNS, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["client"] for r in read] == ["a, b"] * 2
    assert [r["value"] for r in read] == ["0.5", ""]
    assert tuple(read[0]) == run_files.CLIENT_COLUMNS


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        run_files.prepare_folder(tmp_path / "file" / "run")
    run_files.prepare_folder(tmp_path / "a" / "run")
    assert list((tmp_path / "a" / "run").iterdir()) == []


# --- progress -----------------------------------------------------------------------------------


MEASURED = {
    "round": 2,
    "loss": 1.25,
    "small_mean": 0.5,
    "large_mean": 0.75,
    "worst_small": float("nan"),
    "metric": "balanced_accuracy",
    "seconds": 6.0,
}


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_A_LINE", 0.0)
    out = capture()
    with console.Progress(12, console=out) as display:
        display.note("a note [with brackets]")
        display.update({"round": 1, "loss": None, "seconds": 30.0})
        display.update(MEASURED)
    lines = text_of(out).splitlines()
    assert lines == [
        "a note [with brackets]",
        "round  1/12  loss -  30.0 s/round  left 5m30s",
        "round  2/12  loss 1.250  balanced accuracy small 0.500 worst - large 0.750  6.0 s/round"
        "  left 1m00s",
    ]
    assert "\x1b" not in text_of(out)


def test_plain_lines_are_seconds_apart_and_the_last_is_always_there():
    out = capture()
    with console.Progress(50, console=out) as display:
        for round in range(1, 51):
            display.update({"round": round, "loss": 1.0})
    assert [line.split()[1] for line in text_of(out).splitlines()] == ["1/50", "50/50"]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (120, "round  2/12  loss 1.250  SCORES large 0.750  diverged 1  6.0 s/round  left 1m00s"),
        (105, "round  2/12  loss 1.250  SCORES large 0.750  diverged 1  left 1m00s"),
        (90, "round  2/12  SCORES large 0.750  diverged 1  left 1m00s"),
        (80, "round  2/12  SCORES  diverged 1  left 1m00s"),
        (70, "round  2/12  SCORES  left 1m00s"),
        (30, "round  2/12  SCORES  left 1m00s"),
    ],
)
def test_a_narrow_line_leaves_out_whole_parts(width, line):
    out = Console(file=io.StringIO(), width=width)
    with console.Progress(12, console=out) as display:
        display.update({**MEASURED, "worst_small": 0.25, "diverged": {"small": ["a"]}})
    scores = "balanced accuracy small 0.500 worst 0.250"
    assert text_of(out) == line.replace("SCORES", scores) + "\n"


def test_without_diverged_clients_every_score_fits_80_columns_of_a_terminal():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    with console.Progress(50, console=out) as display:
        display.update({**MEASURED, "round": 12, "worst_small": 0.25})
    line = "round 12/50  balanced accuracy small 0.500 worst 0.250 large 0.750  left 3m48s"
    assert line in text_of(out)


def test_progress_in_a_terminal_is_live():
    out = capture(terminal=True)
    with console.Progress(2, console=out) as display:
        display.update({"round": 2, "loss": 0.5, "seconds": 1.0})
    assert "\x1b" in text_of(out)
    assert "loss 0.500" in text_of(out)


# --- tables -------------------------------------------------------------------------------------


def test_the_summary_names_clients_groups_and_what_is_not_real():
    out = capture()
    console.print_summary(make_summary(), out)
    text = text_of(out)
    for word in ("synthetic", "simulated", "clinic-5", "0.125", "worst", "0.250", "gap"):
        assert word in text


def test_runs_stand_side_by_side_with_what_they_gain_over_local():
    out = capture()
    ours, alone = make_summary(), make_summary("local", small_mean=0.375, teacher=None)
    console.print_comparison(["a", "b"], [ours, alone], out)
    text = text_of(out)
    assert "0.500 (+0.125)" in text
    assert "0.375 (" not in text
    assert text.count("phantoms (synthetic)") == 2
    assert "simulated" in text
    assert "clinic-5 (small, 24)" in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_number_is_cut_at_any_width(width):
    """Columns are left out, or runs become rows; what is shown is whole."""
    out = Console(file=io.StringIO(), width=width)
    many = make_summary()
    for client in many["per_client"]:
        client["metrics"] |= dict.fromkeys(("accuracy", "macro_f1", "auroc", "ece", "loss"), 0.123)
    console.print_summary(many, out)
    runs = [make_summary(), make_summary("local", small_mean=0.375), *[make_summary()] * 4]
    console.print_comparison([f"a_run_of_a_study_{i}" for i in range(6)], runs, out)
    text = text_of(out)
    tables = [line for line in text.splitlines() if not line.startswith(("Synthetic", "A wider"))]
    assert max(map(len, tables)) <= width and "…" not in text
    numbers = re.findall(r"\d\.\d+", text)
    assert numbers and all(len(number.split(".")[1]) in (2, 3) for number in numbers)
    assert ("see clients.csv" in text) == (width < 140)
    assert ("0.500 (+0.125)" in text) == (width >= 60)


def test_runs_of_other_data_are_not_held_against_local():
    out = capture()
    console.print_comparison(["a", "b"], [make_summary(), make_summary("local", seed=1)], out)
    assert "(+" not in text_of(out)


def test_show_reads_run_folders(tmp_path):
    for name in ("fedhelp", "local"):
        run_files.prepare_folder(tmp_path / name)
        run_files.write_json(tmp_path / name / "summary.json", make_summary(name, worst_small=None))
    out = capture()
    console.show([tmp_path / "fedhelp", tmp_path / "local"], out)
    assert "fedhelp" in text_of(out) and "local" in text_of(out)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_show_of_no_finished_run_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match="summary.json"):
        console.show([tmp_path])
