"""The command for owners of a GPU or TPU checks, measures, skips and judges as it says."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device
from benchmarks.device import Part, Row

OURS = "fedhelp_jax"
PARTS = device.parts(device._TINY, None)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, kept_programs: dict[str, str]) -> None:
    """Lets the command's processes use the programs of earlier tests, and one device."""
    for name, value in (kept_programs | {"JAX_PLATFORMS": "cpu"}).items():
        monkeypatch.setenv(name, value)


def reasons(found: dict[str, Any]) -> dict[str, str | None]:
    return {record["name"]: record["reason"] for record in found["records"]}


@pytest.mark.slow
def test_the_short_form_checks_and_measures_on_cpu(shared, monkeypatch):
    (fedavg,) = (part for part in PARTS if part.group == "fedavg")
    missing = fedavg._replace(name="unknown", needs=("no_such_library",))
    monkeypatch.setattr(device, "parts", lambda *_: [fedavg, missing])
    found = device.measure(device._TINY, 8, ["fedavg"])
    assert reasons(found) == {
        "parity": None,
        fedavg.name: None,
        "unknown": "no_such_library not installed",
    }
    parity, result, _ = (record["result"] for record in found["records"])
    assert found["device"] == parity["device"] == "cpu"
    assert all(row["ok"] and 0 < row["error"] <= row["bound"] for row in parity["rows"])
    assert {row["precision"] for row in parity["rows"]} == {"highest", "default", "bfloat16"}
    assert result["used"]["compile_s"] > 0
    rate = Row(f"{fedavg.name}, rounds a minute", result["rounds_per_minute"][OURS]["median"])
    assert rate in device.rows(found)


@pytest.mark.parametrize("part", [device.PARITY, *PARTS], ids=lambda part: part.name)
def test_benchmarks_have_the_flags_that_they_get(part):
    # Their modules cannot be imported together, since they define the same flags.
    files = [Path(device.__file__).with_name(f"{part.module.split('.')[1]}.py")]
    if part.group == "forms":
        files.append(files[0].with_name("roofline.py"))
    text = "".join(file.read_text() for file in files)
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', text))
    given = {flag.removeprefix("--").split("=")[0] for flag in (*part.flags, "--out")}
    assert {name if name in defined else name.removeprefix("no") for name in given} <= defined


# A module of the tests would be imported by the search for doctests, and break other tests.
BROKEN_PARITY = """
from absl import app
from benchmarks import parity
from fedhelp_jax.models import conv

def halved(*args, **options):
    x_grad, kernel_grad = right(*args, **options)
    return x_grad, 0.5 * kernel_grad

right, conv._gradients = conv._gradients, halved
app.run(parity.main)
"""


@pytest.mark.slow
def test_a_wrong_result_ends_with_exit_code_1_and_nothing_is_timed(shared, tmp_path, monkeypatch):
    (tmp_path / "broken_parity.py").write_text(BROKEN_PARITY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    broken = (
        "from absl import app; from benchmarks import device;"
        "device.PARITY = device.PARITY._replace(module='broken_parity');"
        "app.run(device.main)"
    )
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", broken, "--short", f"--out={out}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    (record,) = json.loads(out.read_text())["records"]
    assert record["part"] == "parity"
    assert record["reason"].startswith("failed: wrong: convolution (highest), ")
    wrong = [row["what"] for row in record["result"]["rows"] if not row["ok"]]
    # On CPU, the network takes the other form of the convolution.
    assert wrong == ["convolution"] * 3
    assert "| convolution, highest: error |" in ended.stdout and "| missed |" in ended.stdout


def test_what_there_is_no_time_for_is_skipped(monkeypatch):
    run, right = device.run, {"platform": "cpu", "rows": []}

    def stub(part: Part, left: float) -> dict[str, Any]:
        if part.group != "parity":
            return run(part, left)
        return {"part": "parity", "name": "parity", "reason": None, "result": right}

    monkeypatch.setattr(device, "run", stub)
    found = device.measure(device._LONG, 0, ["rounds", "forms", "sweep"])
    told = reasons(found)
    assert told.pop("parity") is None
    assert len(told) == 6
    assert set(told.values()) <= {f"0 s are left, it takes {n} or more" for n in (30, 45, 90)}
    rows = [row.text() for row in device.rows(found)]
    assert "| forms | 0 s are left, it takes 30 or more |  |  |" in rows


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_its_processes(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert device.run(Part("forms", "hangs", "hangs", ()), 10)["reason"] == "did not end within 5 s"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("its process lives on")


def test_a_round_is_judged_by_the_rivals_times_and_the_attainable_rate():
    def record(group: str, name: str, result: Any) -> dict[str, Any]:
        return {"part": group, "name": name, "reason": None, "result": result}

    def rounds(clients: int, dtype: str, **ms: float) -> dict[str, Any]:
        about = {OURS: {"devices": 2}}
        shape = {"clients": clients, "batch_size": 16, "compute_dtype": dtype, "about": about}
        result = shape | {"ms": {name: {"median": value} for name, value in ms.items()}}
        return record("rounds", device.rounds_name(clients, 16, dtype), result)

    found = {
        "short": False,
        "without_torch": None,
        "records": [
            rounds(64, "float32", fedhelp_jax=0.5, loop=20.0, vmap=2.0),
            rounds(64, "bfloat16", fedhelp_jax=0.25),
            rounds(1024, "float32", fedhelp_jax=0.125),
            # 64 clients need 8 ms a step at least, of which a round's step has two.
            record(
                "roofline",
                "roofline",
                {"batch_size": 16, "clients": 64, "ideal_s": 8e-3} | {"fraction": 0.7},
            ),
        ],
    }
    table = {row.what: (row.value, row.verdict) for row in device.rows(found)}
    assert table == {
        "64 clients, batch 16: ms a client and step": (0.5, ""),
        "64 clients, batch 16: PyTorch loop / ours": (40, "missed"),
        "64 clients, batch 16: torch.func.vmap / ours": (4, "reached"),
        "64 clients, batch 16: of attainable": (0.25, "missed"),
        "64 clients, batch 16, bfloat16: ms a client and step": (0.25, ""),
        "64 clients, batch 16, bfloat16: PyTorch loop / ours": (80, "reached"),
        "1024 clients, batch 16: ms a client and step": (0.125, ""),
        "1024 clients, batch 16: PyTorch loop / ours": (160, "reached"),
        "1024 clients, batch 16: of attainable": (1, "reached"),
        "stages of the network, of attainable": (0.7, ""),
    }


@pytest.mark.parametrize(
    ("value", "goal", "verdict"),
    [
        (51.0, ("at least", 50), "reached"),
        (49.0, ("at least", 50), "missed"),
        (0.29, ("at most", 0.3), "reached"),
        (0.31, ("at most", 0.3), "missed"),
        (float("nan"), ("at least", 50), "missed"),
        (float("nan"), ("at most", 0.3), "missed"),
        (None, ("at most", 0.3), ""),
        (1.0, None, ""),
    ],
)
def test_goals_are_judged(value, goal, verdict):
    assert Row("", value, "x", goal).verdict == verdict
