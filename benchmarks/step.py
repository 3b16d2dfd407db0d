"""Compares compile and step times of a ResNet with a PyTorch loop in the same run.

    python -m benchmarks.step --depth=20 --batch_size=4
    python -m benchmarks.step --depth=110 --batch_size=4
    python -m benchmarks.step --compute_dtype=float32,bfloat16

The step trains one client by Adam with L2 decay on cross-entropy, with a fixed batch that is ready
in memory. Each side has one core, so that neither profits from its thread pool. The two alternate;
medians and ranges are reported. Without PyTorch (extra `bench`), only ours is timed.
"""

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from fedhelp_jax.algorithms.client import adam_l2, gradient_step
from fedhelp_jax.core.compilation import jit
from fedhelp_jax.losses import cross_entropy_loss, masked_mean
from fedhelp_jax.models.model import apply_model, with_compute_dtype
from fedhelp_jax.models.resnet import resnet

_DEPTH = flags.DEFINE_integer("depth", 20, "layers of the ResNet")
_BATCH = flags.DEFINE_integer("batch_size", 4, "images a step")
_SIZE = flags.DEFINE_integer("image_size", 32, "side of an image in pixels")
_DTYPES = flags.DEFINE_list("compute_dtype", ["float32"], "of our activations; several alternate")
_STEPS = flags.DEFINE_integer("steps", 20, "steps a repeat")
_REPEATS = flags.DEFINE_integer("repeats", 7, "alternations")

_CLASSES = 8


def ours(dtype: str) -> tuple[Callable[[], None], float]:
    """Returns a function that runs all steps in one dispatch, and the seconds to compile it."""
    model, tx = with_compute_dtype(resnet(_DEPTH.value, _CLASSES), dtype), adam_l2(1e-3, 1e-4)
    shape = (_SIZE.value, _SIZE.value, 3)
    variables = jit(model.init, static_argnums=1)(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (_BATCH.value, *shape))
    labels = jnp.arange(_BATCH.value) % _CLASSES

    def step(_, carry):
        params, stats, opt_state = carry

        def loss_fn(params):
            now = {"params": params, "batch_stats": stats}
            logits, new_stats = apply_model(model, now, x, train=True)
            return masked_mean(cross_entropy_loss(logits, labels)), new_stats

        params, opt_state, _, stats = gradient_step(tx, loss_fn, params, opt_state)
        return params, stats, opt_state

    start = (variables["params"], variables["batch_stats"], tx.init(variables["params"]))
    lowered = jit(lambda c: jax.lax.fori_loop(0, _STEPS.value, step, c)).lower(start)
    began = time.perf_counter()
    run = lowered.compile()
    seconds = time.perf_counter() - began

    def all_steps() -> None:
        jax.block_until_ready(run(start))

    return all_steps, seconds


def rival() -> Callable[[], None]:
    """Returns a function that runs the same steps as a plain PyTorch loop."""
    import torch

    from tests.torch_reference import CifarResNet

    torch.set_num_threads(1)
    network = CifarResNet(_DEPTH.value, _CLASSES).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    x = torch.randn(_BATCH.value, 3, _SIZE.value, _SIZE.value)
    labels = torch.arange(_BATCH.value) % _CLASSES

    def run() -> None:
        for _ in range(_STEPS.value):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()

    return run


def main(_: list[str]) -> None:
    """Times all variants and prints a table."""
    compiled = {f"ours, {dtype}": ours(dtype) for dtype in _DTYPES.value}
    runs = {name: run for name, (run, _) in compiled.items()}
    if importlib.util.find_spec("torch"):
        runs["PyTorch loop"] = rival()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for function in runs.values():
        function()
    for _repeat in range(_REPEATS.value):
        for name, function in runs.items():
            began = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - began) / _STEPS.value)
    print(f"ResNet-{_DEPTH.value}, batch {_BATCH.value}, {_SIZE.value}x{_SIZE.value}")
    machine = f"one core of {os.cpu_count()}, {platform.machine()}"
    print(f"{machine}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    for name, (_, seconds) in compiled.items():
        print(f"{name:14s} compiled in {seconds:.1f} s")
    first, *others = times
    for name, values in times.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:14s} {median:7.1f} ms a step ({low:.1f} to {high:.1f})")
    for name in others:
        ratios = [b / a for a, b in zip(times[first], times[name], strict=True)]
        low, high = min(ratios), max(ratios)
        print(f"{name} / {first}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    # Both use one core: XLA's thread pool has as many threads as the process may use cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    app.run(main)
