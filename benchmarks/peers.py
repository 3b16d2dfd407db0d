"""Compares FedAvg's rounds per minute and final loss with other simulation frameworks.

    python -m benchmarks.peers --setup --python312=PATH
    python -m benchmarks.peers
    python -m benchmarks.peers --peers=   # ours only

The workload has the shape of the CIFAR-10 benchmark of pfl-research: 1,000 users with 50 images
each, 50 users per round, one local epoch of plain SGD in batches of 10, and a CNN of two
convolutions and two dense layers. Its dropout is removed, so that all frameworks compute the same.
Images are synthetic.

Ours is compared with pfl, Flower and blazefl. Each has its own environment (``--setup`` makes them)
and runs in the ways that its documentation describes. Every variant of a framework (a number of
workers and of threads) must first reproduce our weights in float64, in a deterministic case in
which all users take part with a single batch. Then it runs a few rounds, and the fastest variant is
kept. The fastest variants of all frameworks alternate in separate processes and in blocks of
rounds: one warm-up round, then ``--rounds`` timed rounds, without evaluation or start-up. A
framework without an environment is not measured. A line of JSON is appended to ``--out``, and a
Markdown table is printed.

Each framework makes its own random draws: pfl samples users with replacement, as in its benchmark,
and uses a user's images in a fixed order; the others sample without replacement and shuffle.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.alternate import Worker, alternate, spread
from benchmarks.peers_workload import load_workload, make_workload, mean_loss, save_workload

_SETUP = flags.DEFINE_bool("setup", False, "make the frameworks' environments and end")
_FOLDER = flags.DEFINE_string("environments", ".peers", "where they are")
_PYTHON312 = flags.DEFINE_string(
    "python312", "python3.12", "for blazefl, which needs 3.12 or newer"
)
_PEERS = flags.DEFINE_list("peers", ["pfl", "flower", "blazefl"], "which of them")
_USERS = flags.DEFINE_integer("users", 1000, "users")
_IMAGES = flags.DEFINE_integer("images", 50, "images of a user")
_COHORT = flags.DEFINE_integer("cohort", 50, "users in a round")
_BATCH = flags.DEFINE_integer("batch_size", 10, "images a step")
_RATE = flags.DEFINE_float("learning_rate", 0.1, "of the clients")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds a block that count")
_REPEATS = flags.DEFINE_integer("repeats", 7, "alternations")
_EVALUATED = flags.DEFINE_integer("evaluated", 10000, "training images of the final loss")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON")

_OURS = "fedhelp_jax"
_TOLERANCE = 1e-6
_PACKAGES = {
    "pfl": ["pfl[pytorch]==0.6.0", "torch==2.13.0"],
    "flower": ["flwr[simulation]==1.30.0", "torch==2.13.0"],
    "blazefl": ["blazefl[contrib,reproducibility]==2.0.3", "torch==2.13.0"],
}


def variants(name: str) -> list[dict[str, Any]]:
    """Returns the ways to use all cores: one worker per core, or one worker with all threads."""
    cores = len(os.sched_getaffinity(0))
    many, one = {"workers": cores, "threads": 1}, {"workers": 1, "threads": cores}
    if name == _OURS:
        return [{}]
    if name != "blazefl":
        return [many, one] if cores > 1 else [one]
    return [
        {"mode": "processes", **many},
        {"mode": "threads", **many},
        {"mode": "single-threaded", **one},
    ]


def setup() -> None:
    """Makes the environments; an existing one is updated to the versions above."""
    for name in _PEERS.value:
        python = _PYTHON312.value if name == "blazefl" else sys.executable
        if shutil.which(python) is None:
            print(f"{name}: no {python}; --python312 names it", file=sys.stderr)
            continue
        subprocess.run([python, "-m", "venv", Path(_FOLDER.value) / name], check=True)
        install = [interpreter(name), "-m", "pip", "install", *_PACKAGES[name]]
        subprocess.run(install, check=True)


def interpreter(name: str) -> Path:
    if name == _OURS:
        return Path(sys.executable)
    return Path(_FOLDER.value) / name / "bin" / "python"


def start(name: str, options: dict[str, Any]) -> Worker:
    module = "ours" if name == _OURS else name
    return Worker(f"benchmarks.peers_{module}", options, interpreter(name))


def weights_of(worker: Worker, options: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(Path(options["folder"]) / str(worker.ask("result"))) as file:
        return dict(file)


def certain_weights(name: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the averaged weights after the rounds of the deterministic case."""
    worker = start(name, options)
    worker.ask("round")
    weights = weights_of(worker, options)
    worker.close()
    return weights


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Returns the largest difference, relative to the layer's largest weight."""
    return max(float(np.abs(ours[k] - v).max() / np.abs(v).max()) for k, v in theirs.items())


def certain_case(folder: str) -> dict[str, Any]:
    """Makes the deterministic case: four users with one batch each, two full rounds in float64."""
    users, images = 4, _BATCH.value
    save_workload(make_workload(users, images, float64=True), folder)
    return {
        "folder": folder,
        "float64": True,
        "all": True,
        "cohort": users,
        "batch_size": images,
        "rate": _RATE.value,
        "warm_up": 0,
        "rounds": 2,
    }


def choose(name: str, certain: dict[str, Any], ours: Any, options: dict[str, Any]) -> Any:
    """Returns the fastest variant, and the difference and seconds per round of all variants.

    Raises:
      AssertionError: If the weights of a variant differ from ours.
    """
    tried = []
    for variant in variants(name):
        if name == _OURS:
            tried.append({"variant": variant, "difference": 0.0, "seconds": 0.0})
            continue
        found = difference(ours, certain_weights(name, certain | variant))
        assert found < _TOLERANCE, f"{name} {variant}: weights differ by {found:.1e}, not timed"
        worker = start(name, options | variant | {"rounds": 2})
        seconds = min(worker.ask("round")["seconds"] for _ in range(2))
        worker.close()
        tried.append({"variant": variant, "difference": found, "seconds": seconds})
        print(f"{name}: {json.dumps(tried[-1])}", file=sys.stderr)
    return min(tried, key=lambda one: one["seconds"])["variant"], tried


def measure(names: list[str]) -> dict[str, Any]:
    """Checks parity, chooses variants, and times them in alternation."""
    with tempfile.TemporaryDirectory() as certain_folder, tempfile.TemporaryDirectory() as folder:
        certain = certain_case(certain_folder)
        save_workload(make_workload(_USERS.value, _IMAGES.value, float64=False), folder)
        options = {
            "folder": folder,
            "float64": False,
            "all": False,
            "cohort": _COHORT.value,
            "batch_size": _BATCH.value,
            "rate": _RATE.value,
            "warm_up": 1,
            "rounds": _ROUNDS.value,
        }
        ours = certain_weights(_OURS, certain) if len(names) > 1 else None
        chosen = {name: choose(name, certain, ours, options) for name in names}
        running = {name: start(name, options | chosen[name][0]) for name in names}
        seconds = alternate(running, _REPEATS.value)
        workload = load_workload(folder)
        rows = slice(0, _EVALUATED.value)
        used = running[_OURS].ask("used")
        losses = {
            "start": mean_loss(workload.weights, workload.images[rows], workload.labels[rows])
        }
        for name, worker in running.items():
            weights = weights_of(worker, options)
            losses[name] = mean_loss(weights, workload.images[rows], workload.labels[rows])
            worker.close()
    return {
        **{key: options[key] for key in ("cohort", "batch_size", "rate", "rounds", "warm_up")},
        "users": _USERS.value,
        "images": _IMAGES.value,
        "repeats": _REPEATS.value,
        "rounds_in_all": (_REPEATS.value + 1) * (options["rounds"] + options["warm_up"]),
        "chosen": {name: variant for name, (variant, _) in chosen.items()},
        "tried": {name: tried for name, (_, tried) in chosen.items() if name != _OURS},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "rounds_per_minute": {
            name: spread([60 / s for s in values]) for name, values in seconds.items()
        },
        "ratio": {
            name: spread([b / a for a, b in zip(seconds[_OURS], values, strict=True)])
            for name, values in seconds.items()
            if name != _OURS
        },
        "evaluated": _EVALUATED.value,
        "loss": losses,
        "used": used,
        "about": {name: worker.about for name, worker in running.items()},
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def described(variant: dict[str, Any]) -> str:
    """Describes a variant in words."""
    workers, threads = variant["workers"], variant["threads"]
    how = f"{workers} worker{'s' * (workers > 1)}, torch threads: {threads}"
    return f"{variant['mode']}: {how}" if "mode" in variant else how


def table(row: dict[str, Any]) -> str:
    lines = [
        "| framework | how it ran | s a round | rounds a minute | theirs / ours | final loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in [_OURS, *_PACKAGES]:
        if name not in row["seconds"]:
            lines.append(
                f"| {name} | | not measured | not measured | not measured | not measured |"
            )
            continue
        about, variant = row["about"][name], row["chosen"][name]
        how = about.get("how") or described(variant)
        ratio = "" if name == _OURS else _text(row["ratio"][name], 2)
        cells = [about["version"].split(",")[0] if name != _OURS else name, how]
        cells += [_text(row["seconds"][name], 2), _text(row["rounds_per_minute"][name], 1)]
        lines.append("| " + " | ".join([*cells, ratio, f"{row['loss'][name]:.4f}"]) + " |")
    versions = "; ".join(about["version"] for about in row["about"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"{row['users']} users of {row['images']} synthetic images, {row['cohort']} in a round;"
            f" loss {row['loss']['start']:.3f} before, and after {row['rounds_in_all']} rounds.",
            f"{row['machine']}; {versions}; {row['date']}",
        ]
    )


def _text(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} - {found['high']:.{digits}f})"


def main(_: list[str]) -> None:
    if _SETUP.value:
        setup()
        return
    names = [_OURS]
    for name in _PEERS.value:
        if interpreter(name).exists():
            names.append(name)
        else:
            print(f"{name}: no environment, not measured; see --setup", file=sys.stderr)
    row = measure(names)
    print(json.dumps(row), flush=True)
    if _OUT.value:
        with Path(_OUT.value).open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(f"\n{table(row)}")


if __name__ == "__main__":
    app.run(main)
