"""Measures the cost of the compiler option that keeps CPU matrix products correct.

    python -m benchmarks.splitting
    python -m benchmarks.splitting --devices=1 --role=large --large_depth=32

See ``docs/cpu-race.md`` for the option. FedHelp rounds, and evaluations on their training images,
run with and without it on random pixels. The two alternate in separate processes. **Without the
option, results may be wrong**, so only times are compared.
"""

import itertools
import os
import platform
import tempfile
import time

import jax
from absl import app, flags

from benchmarks.alternate import Worker, alternate, spread

_ROLE = flags.DEFINE_enum("role", "small", ["small", "large"], "which clients")
_CLIENTS = flags.DEFINE_integer("clients", 4, "number of clients")
_DEVICES = flags.DEFINE_list("devices", ["1", "2"], "numbers of CPU devices")
_BATCHES = flags.DEFINE_list("batch_sizes", ["4", "16", "64"], "images a step")
_STEPS = flags.DEFINE_integer("steps", 2, "steps a client and round")
_SIZE = flags.DEFINE_integer("image_size", 32, "side of an image in pixels")
_DEPTH = flags.DEFINE_integer("large_depth", 32, "layers of the large ResNet")
_REPEATS = flags.DEFINE_integer("repeats", 5, "alternations")


def main(_: list[str]) -> None:
    network = "ResNet-20" if _ROLE.value == "small" else f"ResNet-{_DEPTH.value} and ResNet-20"
    print(f"{_CLIENTS.value} {_ROLE.value} clients, {network}; seconds, and with / without")
    print("| devices | batch | what | with the option | without it | ratio |")
    print("|---|---|---|---|---|---|")
    for devices, batch in itertools.product(map(int, _DEVICES.value), map(int, _BATCHES.value)):
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "role": _ROLE.value,
                "clients": _CLIENTS.value,
                "batch_size": batch,
                "steps": _STEPS.value,
                "image_size": _SIZE.value,
                "large_depth": _DEPTH.value,
                "devices": devices,
                "float64": False,
                "folder": folder,
            }
            workers = {
                name: Worker("benchmarks.round_jax", options | {"splitting": splitting})
                for name, splitting in (("with", False), ("without", True))
            }
            found = {w: alternate(workers, _REPEATS.value, w) for w in ("round", "evaluate")}
            for worker in workers.values():
                worker.close()
        for what, seconds in found.items():
            ours, theirs = (spread(seconds[name]) for name in ("with", "without"))
            pairs = zip(seconds["with"], seconds["without"], strict=True)
            ratio = spread([a / b for a, b in pairs])
            print(
                f"| {devices} | {batch} | {what} | {ours['median']:.3f} | {theirs['median']:.3f} "
                f"| {ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f}) |",
                flush=True,
            )
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, {platform.machine()}, jax {jax.__version__}, {time.strftime('%F')}")


if __name__ == "__main__":
    app.run(main)
