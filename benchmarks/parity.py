"""Checks a convolution and a training step on this device against float64 on the CPU.

    python -m benchmarks.parity

The convolution is computed as accelerators do, with both gradients. Its reference is the CPU's form
in float64. The step is one of plain gradient descent of a ResNet, and what is compared is the loss
and by how much the parameters and the batch statistics move. Errors are relative: the root of the
sum of squared differences, divided by that of the squared reference. The largest counts of those of
value and gradients, or of loss, parameters and statistics. The precisions are

- ``highest``: float32, as exact as the device can;
- ``default``: float32 as XLA multiplies it by default, TF32 on recent NVIDIA GPUs and one pass of
  bfloat16 on TPUs;
- ``bfloat16``: activations in bfloat16, as with ``model.compute_dtype``.

The exit code is 1 if an error exceeds its bound.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks.alternate import device_peak_gib
from fedhelp_jax.algorithms.client import gradient_step
from fedhelp_jax.core.compilation import compile_totals, jit
from fedhelp_jax.core.memory import device_bytes
from fedhelp_jax.losses import cross_entropy_loss, masked_mean
from fedhelp_jax.models import conv, conv_cpu
from fedhelp_jax.models.model import Model, apply_model, with_compute_dtype
from fedhelp_jax.models.resnet import resnet

_DEPTH = flags.DEFINE_integer("depth", 20, "layers of the ResNet")
_BATCH = flags.DEFINE_integer("batch_size", 16, "images")
_SIZE = flags.DEFINE_integer("image_size", 32, "side of an image in pixels")
_OUT = flags.DEFINE_string("out", None, "file that gets a line of JSON")

_CLASSES = 8
# By what is computed and precision. On a CPU whose operands were rounded, the step's errors were
# 0.05 with TF32 and 0.15 with bfloat16; a lost gradient gives about 1.
BOUNDS = {
    "convolution": {"highest": 1e-5, "default": 0.01, "bfloat16": 0.01},
    "training step": {"highest": 1e-4, "default": 0.3, "bfloat16": 0.3},
}


def error(found: Any, expected: Any) -> float:
    """Returns the largest relative difference of the trees in two tuples."""

    def apart(found: Any, expected: Any) -> float:
        a, b = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (found, expected)
        )
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    # Python's max would leave out NaN.
    return float(np.max([apart(*pair) for pair in zip(found, expected, strict=True)]))


def on(device: Any, dtype: Any, fn: Callable[..., Any], *arrays: Any) -> Any:
    """Returns what a function computes on a device from arrays of a dtype, as NumPy arrays."""

    def put(x: Any) -> Any:
        x = np.asarray(x)
        return jax.device_put(x.astype(dtype) if x.dtype.kind == "f" else x, device)

    found = jit(fn, platform=device.platform)(*jax.tree.map(put, arrays))
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float64)), found)


def native(x: jax.Array, kernel: jax.Array) -> Any:
    """Returns a convolution, and the gradients of half its square, as on accelerators."""
    out = conv._value(x, kernel, 1, 1)
    return out, *conv._gradients(x, kernel, out, 1, 1)


def reference(x: jax.Array, kernel: jax.Array) -> Any:
    """Returns the same as on CPU."""
    out = conv_cpu.value(x, kernel, 1, 1)
    return out, *conv_cpu.gradients(x, kernel, out, 1, 1)


def moved_by(model: Model) -> Callable[..., Any]:
    """Returns a function of ``(variables, x, labels)`` to how far a step moves the variables."""

    def step(variables: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss_fn(params: Any) -> Any:
            logits, stats = apply_model(model, variables | {"params": params}, x, train=True)
            return masked_mean(cross_entropy_loss(logits, labels)), stats

        before, tx = variables["params"], optax.sgd(1.0)
        params, _, loss, stats = gradient_step(tx, loss_fn, before, tx.init(before))
        moved = jax.tree.map(jnp.subtract, (params, stats), (before, variables["batch_stats"]))
        return loss, *moved

    return step


def check(device: Any, cpu: Any) -> list[dict[str, Any]]:
    """Returns the errors with their bounds, by what is computed and precision."""
    rng, side = np.random.default_rng(0), _SIZE.value
    x, kernel = rng.normal(size=(16, _BATCH.value, side, side)), rng.normal(size=(3, 3, 16, 16))
    images = rng.normal(size=(_BATCH.value, side, side, 3))
    labels = (np.arange(_BATCH.value) % _CLASSES).astype(np.int32)
    model = resnet(_DEPTH.value, _CLASSES)
    with jax.default_device(cpu):
        variables = jit(model.init, platform="cpu", static_argnums=1)(
            jax.random.key(0), images.shape[1:]
        )
    # What both sides get must be the same numbers.
    kernel = kernel / 12  # so that the output is about as large as the input
    x, kernel, images, variables = jax.tree.map(np.float32, (x, kernel, images, variables))
    small = jax.tree.map(lambda v: np.asarray(jnp.bfloat16(v), np.float32), (x, kernel))
    step = (variables, images, labels)
    exact_step = on(cpu, np.float64, moved_by(model), *step)
    rows = []

    def add(what: str, precision: str, found: Any, expected: Any) -> None:
        bound, apart = BOUNDS[what][precision], error(found, expected)
        told = {"what": what, "precision": precision, "error": apart, "bound": bound}
        rows.append(told | {"ok": apart <= bound})  # which NaN is not

    exact = on(cpu, np.float64, reference, x, kernel)
    for precision in ("highest", "default"):
        with jax.default_matmul_precision(precision):
            add("convolution", precision, on(device, np.float32, native, x, kernel), exact)
            found = on(device, np.float32, moved_by(model), *step)
            add("training step", precision, found, exact_step)
    exact = on(cpu, np.float64, reference, *small)
    add("convolution", "bfloat16", on(device, jnp.bfloat16, native, *small), exact)
    found = on(device, np.float32, moved_by(with_compute_dtype(model, "bfloat16")), *step)
    add("training step", "bfloat16", found, exact_step)
    return rows


def main(_: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    compile_totals()  # starts counting
    device = jax.devices()[0]
    rows = check(device, jax.devices("cpu")[0])
    found = {
        "rows": rows,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_gib": (device_bytes(device) or 0) / 2**30 or None,
        "compile_s": compile_totals().seconds,
        "device_gib": device_peak_gib(),
        "version": f"jax {jax.__version__}",
    }
    print(json.dumps(found))
    if _OUT.value:
        with Path(_OUT.value).open("a") as file:
            file.write(json.dumps(found) + "\n")
    for row in rows:
        verdict = "ok" if row["ok"] else "WRONG"
        print("{what}, {precision}: error {error:.1e}, bound {bound:.0e}: ".format(**row) + verdict)
    wrong = [f"{row['what']} ({row['precision']})" for row in rows if not row["ok"]]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    app.run(main)
