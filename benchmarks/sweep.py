"""Compares a sweep with the same runs one by one, in one process and as separate commands.

    python -m benchmarks.sweep

The sweep is the quickstart with 3 learning rates x 3 weights lambda_b x 8 seeds, as one command
that starts without compiled programs. Only a sample of the single runs is timed, ``--sample`` of
them spread over the grid. They run once before they are timed, so that all their programs come from
the cache. In one process, a run is what the sweep computes: all rounds and one evaluation. As a
command, it is ``fedhelp train``, which also starts Python and JAX, saves a checkpoint and evaluates
on the test split; ``--nocommands`` leaves these out. First, one round of two runs in float64 must
give the same results in a sweep and alone, unless ``--nocheck``.
"""

import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.alternate import Worker

_SAMPLE = flags.DEFINE_integer("sample", 4, "single runs")
_SEEDS = flags.DEFINE_integer("seeds", 8, "seeds of the sweep")
_COMMANDS = flags.DEFINE_bool("commands", True, "whether single runs are timed as commands too")
_CHECK = flags.DEFINE_bool("check", True, "compare results in a sweep and alone first")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON")

_CONFIG = "configs/quickstart.py"
_RATES, _WEIGHTS = ("1e-4", "3e-4", "1e-3"), ("0", "0.2", "1")
_TOLERANCE = 1e-6


def single_runs(points: list[dict[str, str]]) -> Worker:
    """Starts a process that runs them one by one."""
    return Worker("benchmarks.sweep_single", {"points": points, "config": _CONFIG})


def assert_parity(folder: Path) -> float:
    """Returns the largest float64 difference of two runs' validation results, in a sweep and alone.

    Raises:
      AssertionError: If the difference exceeds the tolerance.
    """
    os.environ["JAX_ENABLE_X64"] = "1"
    command("sweep", folder, "--config.rounds=1", "--sweep=learning_rate=1e-4,1e-3")
    rows = csv.DictReader((folder / "runs.csv").read_text().splitlines())
    worker = single_runs([{"learning_rate": rate, "rounds": "1"} for rate in ("1e-4", "1e-3")])
    alone = worker.ask("all")["small_mean"]
    worker.close()
    del os.environ["JAX_ENABLE_X64"]
    worst = max(abs(float(row["small_mean"]) - v) for row, v in zip(rows, alone, strict=True))
    assert worst < _TOLERANCE, f"in a sweep and alone differ by {worst:.1e}: nothing is timed"
    return worst


def command(name: str, workdir: Path, *rest: str) -> float:
    """Runs one of our commands and returns its seconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import fedhelp_jax.cli as c; c.main_entry()", name]
        + [f"--config={_CONFIG}", f"--workdir={workdir}", *rest],
        check=True,
        stdout=sys.stderr,
    )
    return time.perf_counter() - began


def sample() -> list[dict[str, str]]:
    """Returns single runs, spread over the grid."""
    grid = list(itertools.product(_RATES, _WEIGHTS, map(str, range(_SEEDS.value))))
    chosen = [grid[i * (len(grid) - 1) // (_SAMPLE.value - 1)] for i in range(_SAMPLE.value)]
    names = ("learning_rate", "algorithm.lambda_b", "seed")
    return [dict(zip(names, point, strict=True)) for point in chosen]


def measure(folder: Path) -> dict[str, Any]:
    """Measures all three variants, in seconds for the whole grid."""
    os.environ["FEDHELP_CACHE_DIR"] = str(folder / "cache")
    parity = assert_parity(folder / "parity") if _CHECK.value else None
    sweep = [
        f"--sweep=learning_rate={','.join(_RATES)}",
        f"--sweep=algorithm.lambda_b={','.join(_WEIGHTS)}",
        f"--seeds=0:{_SEEDS.value}",
    ]
    together = command("sweep", folder / "sweep", *sweep)
    points = sample()
    worker = single_runs(points)
    worker.ask("all")
    single = worker.ask("all")
    worker.close()
    commands = []
    timed = [points[0], *points] if _COMMANDS.value else []  # the extra first one is a warm-up
    for i, point in enumerate(timed):
        settings = [f"--config.{k}={v}" for k, v in point.items()]
        commands.append(command("train", folder / f"run{i}", *settings))
    runs = len(_RATES) * len(_WEIGHTS) * _SEEDS.value
    return {
        "runs": runs,
        "parity": parity,
        "sweep": together,
        "one_by_one": runs * statistics.median(single["seconds"]),
        "commands": runs * statistics.median(commands[1:]) if commands else None,
        "device_gib": single["device_gib"],
        "single_seconds": single["seconds"],
        "command_seconds": commands[1:],
        "version": worker.about["version"],
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(json.dumps(found))
    if _OUT.value:
        with Path(_OUT.value).open("a") as file:
            file.write(json.dumps(found) + "\n")
    print(f"\n| {found['runs']} runs | s | sweep / this |\n|---|---|---|")
    names = {
        "sweep": "the sweep, nothing compiled before",
        "one_by_one": f"one by one in one process, from {_SAMPLE.value} runs",
        "commands": f"a command each, from {_SAMPLE.value} runs",
    }
    for key, name in names.items():
        if found[key] is None:
            continue
        print(f"| {name} | {found[key]:.0f} | {found['sweep'] / found[key]:.2f} |")
    print(f"\n{found['machine']}; {found['version']}; {found['date']}")


if __name__ == "__main__":
    app.run(main)
