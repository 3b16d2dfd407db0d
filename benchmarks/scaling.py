"""Measures time and memory of a round as clients, images, devices or the runs of a sweep grow.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --axes=clients --clients=8,80,800,10000

A round is FedAvg with all clients on the network and the synthetic images of `benchmarks.peers`:
two convolutions and two dense layers, batches of 10, plain SGD. A sweep consists of FedAvg runs
with different learning rates, on phantoms with a small network. Each case has its own process,
whose peak resident memory is reported. The time of a case is that of its second round; with 1,000
clients or more, it is that of the first round minus compilation. Slopes are those of straight lines
fitted to the logarithms. One line of JSON per case is appended to ``--out``.
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.alternate import Worker
from benchmarks.peers_workload import make_workload, save_workload

_AXES = flags.DEFINE_list("axes", ["clients", "images", "devices", "runs"], "what grows")
_CLIENTS = flags.DEFINE_list("clients", ["8", "80", "800", "10000"], "with 50 images each")
_IMAGES = flags.DEFINE_list("images", ["10", "50", "250"], "of each of 48 clients")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4"], "for 48 clients of 50 images")
_RUNS = flags.DEFINE_list("runs", ["2", "8", "32"], "in a sweep")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON a case")

_MANY = 1000  # with this many clients, a second round would take too long


def federation(clients: int, images: int, devices: int) -> dict[str, Any]:
    """Returns a round's seconds and the process's peak in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        save_workload(make_workload(clients, images, float64=False), folder)
        options = {
            "folder": folder,
            "float64": False,
            "cohort": clients,
            "batch_size": 10,
            "rate": 0.1,
            "warm_up": 0,
            "rounds": 1,
            "devices": devices,
        }
        worker = Worker("benchmarks.peers_ours", options)
        first = worker.ask("round")
        if clients >= _MANY:
            found = first | {"seconds": first["seconds"] - first["compile_s"]}
        else:
            found = worker.ask("round")
        worker.close()
    return found | {"about": worker.about}


def sweep(runs: int) -> dict[str, Any]:
    """Returns a sweep's seconds without compilation, and the process's peak in GiB."""
    worker = Worker("benchmarks.scaling_sweep", {"runs": runs})
    found = worker.ask("sweep")
    worker.close()
    return found | {"about": worker.about}


def cases(axis: str, cores: int) -> list[tuple[int, Any]]:
    """Returns the sizes along an axis, and a function that measures each of them."""
    if axis == "clients":
        return [(n, lambda n=n: federation(n, 50, cores)) for n in map(int, _CLIENTS.value)]
    if axis == "images":
        return [(n, lambda n=n: federation(48, n, cores)) for n in map(int, _IMAGES.value)]
    if axis == "devices":
        return [(n, lambda n=n: federation(48, 50, n)) for n in map(int, _DEVICES.value)]
    return [(n, lambda n=n: sweep(n)) for n in map(int, _RUNS.value)]


def slope(sizes: list[int], values: list[float]) -> float:
    """Returns the slope of the straight line fitted to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(_: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} cores, {platform.machine()}, {time.strftime('%Y-%m-%d')}"
    lines, about = [], ""
    for axis in _AXES.value:
        rows = []
        for size, measure in cases(axis, cores):
            row = {"axis": axis, "size": size, **measure(), "machine": machine}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if _OUT.value:
                with Path(_OUT.value).open("a") as file:
                    file.write(json.dumps(row) + "\n")
        about = rows[-1]["about"]["version"]
        sizes = [row["size"] for row in rows]
        for row in rows:
            lines.append(
                f"| {axis} | {row['size']} | {row['seconds']:.2f} | {row['peak_gib']:.2f} |"
            )
        if len(rows) > 1:
            slopes = [slope(sizes, [row[key] for row in rows]) for key in ("seconds", "peak_gib")]
            lines.append(f"| {axis} | slope | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    print("\n| what grows | how many | s | peak, GiB |\n|---|---|---|---|")
    print("\n".join(lines))
    print(f"\n{machine}; {about}")


if __name__ == "__main__":
    app.run(main)
