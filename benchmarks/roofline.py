"""Compares the training of each stage of a ResNet with the roofline of the machine.

    python -m benchmarks.roofline --clients=8 --batch_size=16
    python -m benchmarks.roofline --clients=1024 --batch_size=16 --noone_core   # on an accelerator

Everything runs on one device. A stage's rate is its number of FLOP, counted analytically, divided
by the time of its forward and backward pass for all clients, each with its own weights. The
attainable rate is the smaller of two: the measured rate of a large matrix product, and the stage's
FLOP per byte times the measured bandwidth of a copy.

Only the FLOP of convolutions count: one product in the forward pass and one for each gradient
(there is none with respect to the image). Bytes are a lower bound: each product reads its two
arrays and writes its result once, and everything else is free. The attainable rate is therefore not
fully reachable.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.alternate import device_peak_gib
from fedhelp_jax.core.compilation import compile_totals, jit
from fedhelp_jax.models.resnet import Stage, Stem
from fedhelp_jax.simulation.vectorize import make_mapping, over_clients

_CLIENTS = flags.DEFINE_integer("clients", 8, "clients")
_BATCH = flags.DEFINE_integer("batch_size", 16, "images a step")
_SIZE = flags.DEFINE_integer("image_size", 32, "side of an image in pixels")
_DEPTH = flags.DEFINE_integer("depth", 20, "layers of the ResNet")
_REPEATS = flags.DEFINE_integer("repeats", 7, "of which the median is taken")
_STEPS = flags.DEFINE_integer("steps", 5, "steps in a dispatch")
_ONE_CORE = flags.DEFINE_bool("one_core", True, "use one core of the CPU, if that computes")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON")

_FLOAT = 4


class Work(NamedTuple):
    """FLOP, and minimum bytes to move, of one client's step through one stage."""

    flop: float
    bytes: float


def stages() -> list[tuple[str, Any, tuple[int, int], Work]]:
    """Returns name, module, ``(channels, side)`` of the input, and work of each stage."""
    side, blocks, found = _SIZE.value, (_DEPTH.value - 2) // 6, []
    found.append(("stem", Stem(train=True), (3, side), convolution(3, 16, side, side, products=2)))
    channels = 16
    for i, features in enumerate((16, 32, 64)):
        stride = 1 if i == 0 else 2
        out = side // stride
        layers = [convolution(channels, features, side, out)]
        layers += [convolution(features, features, out, out)] * (2 * blocks - 1)
        work = Work(sum(w.flop for w in layers), sum(w.bytes for w in layers))
        stage = Stage(features, stride, blocks, train=True)
        found.append((f"stage {i + 1}", stage, (channels, side), work))
        channels, side = features, out
    return found


def convolution(inputs: int, outputs: int, side: int, out: int, products: int = 3) -> Work:
    """Returns the work of training a 3x3 convolution."""
    weights, images = 9 * inputs * outputs, _BATCH.value
    arrays = images * (inputs * side**2 + outputs * out**2) + weights
    return Work(2 * products * weights * images * out**2, products * _FLOAT * arrays)


def seconds(fn: Callable[..., Any], *arguments: Any) -> float:
    """Returns the median time of a call."""
    jax.block_until_ready(fn(*arguments))
    times = []
    for _ in range(_REPEATS.value):
        began = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def matrix_rate() -> float:
    """Returns the FLOP per second of a product of two large square matrices."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, n, n))
    return 2 * n**3 / seconds(jit(jnp.matmul), a, b)


def copy_bandwidth() -> float:
    """Returns the bytes per second, read and written, of a copy that exceeds all caches."""
    x = jnp.zeros(2**28 // _FLOAT if jax.default_backend() == "cpu" else 2**32 // _FLOAT)
    return 2 * x.nbytes / seconds(jit(lambda x: x + 1), x)


def stage_seconds(module: Any, channels: int, side: int) -> float:
    """Returns the seconds of one forward and backward step of all clients through a stage."""
    mapping = make_mapping(num_devices=1)
    shape = (channels, _BATCH.value, side, side)
    mask = jnp.ones(_BATCH.value, bool)

    def init(key: jax.Array) -> Any:
        x = jax.random.normal(key, shape)
        return module.init(key, x, mask), x

    def one(_: Any, own: Any) -> Any:
        variables, x = own
        stats = {"batch_stats": variables["batch_stats"]}

        def apply(params: Any, x: jax.Array) -> jax.Array:
            out, _ = module.apply({"params": params, **stats}, x, mask, mutable=["batch_stats"])
            return out

        out, pull = jax.vjp(apply, variables["params"], x)
        params, x_grad = pull(out)
        moved = jax.tree.map(lambda p, g: p - 1e-9 * g, variables["params"], params)
        # The stem's input is the image, whose gradient is not needed.
        x = x if channels == 3 else x - 1e-9 * x_grad
        return {"params": moved, **stats}, x

    def steps(own: Any) -> Any:
        step = over_clients(one, mapping)
        return jax.lax.fori_loop(0, _STEPS.value, lambda _, own: step((), own), own)

    own = jit(jax.vmap(init))(jax.random.split(jax.random.key(1), _CLIENTS.value))
    return seconds(jit(steps), own) / _STEPS.value


def on_one_core() -> None:
    """Restricts the process to one core, if so asked, before the back end starts.

    XLA's thread pool has as many threads as the process may then use cores.
    """
    if _ONE_CORE.value and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def rates() -> tuple[float, float]:
    """Returns the measured FLOP per second of a product and bytes per second of a copy."""
    return matrix_rate(), copy_bandwidth()


def about() -> dict[str, Any]:
    """Returns the workload, the device, what compiling took and the peak memory."""
    device = jax.devices()[0].device_kind
    return {
        "clients": _CLIENTS.value,
        "batch_size": _BATCH.value,
        "compile_s": compile_totals().seconds,
        "device_gib": device_peak_gib(),
        "device": f"{device}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "version": f"jax {jax.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def write(found: dict[str, Any]) -> None:
    """Prints a line of JSON, and appends it to ``--out``."""
    print(json.dumps(found), flush=True)
    if _OUT.value:
        with Path(_OUT.value).open("a") as file:
            file.write(json.dumps(found) + "\n")


def main(_: list[str]) -> None:
    on_one_core()
    compile_totals()  # starts counting
    peak, bandwidth = rates()
    rows, flop, ideal, spent = [], 0.0, 0.0, 0.0
    for name, module, (channels, side), work in stages():
        took = stage_seconds(module, channels, side)
        total = _CLIENTS.value * work.flop
        attainable = min(peak, work.flop / work.bytes * bandwidth)
        row = {
            "stage": name,
            "gflop": total / 1e9,
            "flop_per_byte": work.flop / work.bytes,
            "attainable": attainable / 1e9,
            "achieved": total / took / 1e9,
            "ms": 1e3 * took,
        }
        rows.append(row)
        flop, ideal, spent = flop + total, ideal + total / attainable, spent + took
    found = {
        **about(),
        "peak": peak / 1e9,
        "bandwidth": bandwidth / 1e9,
        "rows": rows,
        "fraction": ideal / spent,
        "ideal_s": ideal,
    }
    write(found)
    print(f"\n{_CLIENTS.value} clients, batch {_BATCH.value}, {_SIZE.value}x{_SIZE.value}")
    print("| stage | GFLOP | FLOP a byte | attainable, GFLOP/s | achieved | fraction | ms |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        fraction = row["achieved"] / row["attainable"]
        print(
            f"| {row['stage']} | {row['gflop']:.2f} | {row['flop_per_byte']:.0f} | "
            f"{row['attainable']:.0f} | {row['achieved']:.0f} | {fraction:.2f} | {row['ms']:.1f} |"
        )
    totals = f"{flop / ideal / 1e9:.0f} | {flop / spent / 1e9:.0f} | {ideal / spent:.2f}"
    print(f"| all | {flop / 1e9:.2f} | | {totals} | {1e3 * spent:.1f} |")
    print(f"\nproduct {peak / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s; {found['device']}")


if __name__ == "__main__":
    app.run(main)
