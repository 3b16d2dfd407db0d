"""Compares one FedHelp round with PyTorch on the same weights, batches and steps.

    python -m benchmarks.round --role=small --clients=1,8 --batch_sizes=4,16
    python -m benchmarks.round --role=large --clients=1 --batch_sizes=4 --large_depth=110
    python -m benchmarks.round --clients=64 --rivals= --compute_dtype=bfloat16   # ours only

The rivals are a tuned PyTorch loop and, for small clients, ``torch.func.vmap``
(`benchmarks/round_torch.py`). For each case, all of them first run two rounds of a smaller version
in float64, and the averaged weights must agree, unless ``--nocheck``. Then they alternate in
separate processes. Images are random pixels. One line of JSON per case is appended to ``--out``,
and a Markdown table is printed.
"""

import itertools
import json
import os
import pickle
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.alternate import Worker, alternate, spread

_ROLE = flags.DEFINE_enum("role", "small", ["small", "large"], "which clients")
_CLIENTS = flags.DEFINE_list("clients", ["1", "8"], "numbers of clients")
_BATCHES = flags.DEFINE_list("batch_sizes", ["4", "16"], "images a step, private and public each")
_STEPS = flags.DEFINE_integer("steps", 4, "steps a client and round")
_SIZE = flags.DEFINE_integer("image_size", 32, "side of an image in pixels")
_SMALL_DEPTH = flags.DEFINE_integer("depth", 20, "layers of the small ResNet")
_DEPTH = flags.DEFINE_integer("large_depth", 110, "layers of the large ResNet")
_RIVALS = flags.DEFINE_list("rivals", ["loop", "vmap"], "loop, vmap (small clients only)")
_COMPILE = flags.DEFINE_bool("torch_compile", True, "let the loop try torch.compile, minutes")
_CHECK = flags.DEFINE_bool("check", True, "compare the weights with the rivals' first")
_DTYPE = flags.DEFINE_string("compute_dtype", "float32", "of our activations, not the rivals'")
_CHUNK = flags.DEFINE_integer("chunk_size", None, "ours; None takes the back end's default")
_REPEATS = flags.DEFINE_integer("repeats", 7, "alternations")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON a case")

_OURS = "fedhelp_jax"
_TOLERANCE = 1e-6
_TOLD = ("role", "clients", "batch_size", "image_size", "steps", "depth", "compute_dtype")


def workers(options: dict[str, Any], rivals: list[str]) -> dict[str, Worker]:
    """Starts our worker, which saves the initial state, and then its rivals."""
    started = {_OURS: Worker("benchmarks.round_jax", options)}
    for rival in rivals:
        started[rival] = Worker("benchmarks.round_torch", {**options, "rival": rival})
    return started


def assert_parity(options: dict[str, Any], rivals: list[str]) -> float:
    """Returns the largest relative difference of the averaged weights after two float64 rounds.

    Raises:
      AssertionError: If the difference exceeds the tolerance.
    """
    small = options | {"float64": True, "clients": min(2, options["clients"]), "steps": 2}
    running = workers(small, rivals)
    found = {}
    for name, worker in running.items():
        worker.ask("round")
        worker.ask("round")
        file = Path(options["folder"]) / str(worker.ask("result"))
        found[name] = pickle.loads(file.read_bytes())
        worker.close()
    worst = max(difference(found[_OURS], found[rival]) for rival in rivals)
    assert worst < _TOLERANCE, f"the rivals' weights differ by {worst:.1e}: nothing is timed"
    return worst


def difference(ours: Any, theirs: Any) -> float:
    """Returns the largest difference of any leaf of ``theirs``, relative to the leaf's maximum."""
    if isinstance(theirs, dict):
        return max((difference(ours[k], v) for k, v in theirs.items()), default=0.0)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-8))


def measure(clients: int, batch_size: int, rivals: list[str]) -> dict[str, Any]:
    """Checks parity of one case, then times it in milliseconds per client and step."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "role": _ROLE.value,
            "clients": clients,
            "batch_size": batch_size,
            "steps": _STEPS.value,
            "image_size": _SIZE.value,
            "depth": _SMALL_DEPTH.value,
            "large_depth": _DEPTH.value,
            "compute_dtype": _DTYPE.value,
            "chunk_size": _CHUNK.value,
            "compile": [False, True] if _COMPILE.value else [False],
            "float64": False,
            "folder": folder,
        }
        parity = assert_parity(options, rivals) if _CHECK.value and rivals else None
        running = workers(options, rivals)
        seconds = alternate(running, _REPEATS.value)
        peak = {name: worker.ask("memory")["device_gib"] for name, worker in running.items()}
        for worker in running.values():
            worker.close()
    steps = 1e3 / (clients * _STEPS.value)
    return {
        **{key: options[key] for key in _TOLD},
        "large_depth": _DEPTH.value if _ROLE.value == "large" else None,
        "parity": parity,
        "ms": {name: spread([steps * s for s in values]) for name, values in seconds.items()},
        "ratio": {
            rival: spread([b / a for a, b in zip(seconds[_OURS], seconds[rival], strict=True)])
            for rival in rivals
        },
        "device_gib": peak,
        "about": {name: worker.about for name, worker in running.items()},
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(_: list[str]) -> None:
    rivals = [r for r in _RIVALS.value if r == "loop" or _ROLE.value == "small"]
    rows = []
    for clients, batch_size in itertools.product(
        map(int, _CLIENTS.value), map(int, _BATCHES.value)
    ):
        row = measure(clients, batch_size, rivals)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if _OUT.value:
            with Path(_OUT.value).open("a") as file:
                file.write(json.dumps(row) + "\n")
    small = f"ResNet-{_SMALL_DEPTH.value}"
    network = small if _ROLE.value == "small" else f"ResNet-{_DEPTH.value} and {small}"
    print(f"\n{_ROLE.value} clients, {network}, {_SIZE.value}x{_SIZE.value}; ms a client and step")
    columns = ["clients", "batch", "ours", *(c for r in rivals for c in (r, "ratio")), "loop is"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = [f"{row['clients']}", f"{row['batch_size']}", _text(row["ms"][_OURS], 1)]
        for rival in rivals:
            cells += [_text(row["ms"][rival], 1), _text(row["ratio"][rival], 2) + "x"]
        how = row["about"]["loop"]["how"] if "loop" in rivals else ""
        print("| " + " | ".join([*cells, how]) + " |")
    last = rows[-1]
    versions = ", ".join(dict.fromkeys(about["version"] for about in last["about"].values()))
    print(f"\n{last['machine']}, ours on {last['about'][_OURS]['how']}; {versions}, {last['date']}")


def _text(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} - {found['high']:.{digits}f})"


if __name__ == "__main__":
    app.run(main)
