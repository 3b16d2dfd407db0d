"""Compares forms of a convolution in the stages of a ResNet, for vectorised clients.

    python -m benchmarks.forms --clients=64 --batch_size=16 --noone_core   # on an accelerator

Each client has its own 3x3 kernel. The forms are XLA's own convolution ("native"), shifted copies
with products of matrices as on CPU ("shifts"), and the patches of
``lax.conv_general_dilated_patches`` with a product ("patches"). A time is that of the value and
both gradients. Rates and FLOP are those of `benchmarks.roofline`, whose flags are used too. Before
they are timed, the forms must agree.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax

from benchmarks import roofline
from fedhelp_jax.core.compilation import compile_totals, jit
from fedhelp_jax.models import conv, conv_cpu

_FORMS = flags.DEFINE_list("forms", ["native", "shifts", "patches"], "which of them")

# Default precision is TF32 on some accelerators and one pass of bfloat16 on others.
_TOLERANCE = 0.03

Gradients = tuple[jax.Array, jax.Array]


# A form takes x ``[C, B, H, W]`` and the kernel, and returns the gradients of ``sum(out**2) / 2``
# with respect to both.


def native(x: jax.Array, kernel: jax.Array) -> Gradients:
    """Computes as `fedhelp_jax.models.conv` does on accelerators."""
    return conv._gradients(x, kernel, conv._value(x, kernel, 1, 1), 1, 1)


def shifts(x: jax.Array, kernel: jax.Array) -> Gradients:
    """Computes as on CPU."""
    return conv_cpu.gradients(x, kernel, conv_cpu.value(x, kernel, 1, 1), 1, 1)


def patches(x: jax.Array, kernel: jax.Array) -> Gradients:
    """Multiplies patches ``[9 C, B, H, W]``, and leaves the gradients to autodiff."""

    def value(x: jax.Array, kernel: jax.Array) -> jax.Array:
        columns = lax.conv_general_dilated_patches(
            x, (3, 3), (1, 1), "SAME", dimension_numbers=("CNHW", "OIHW", "CNHW")
        )
        matrix = kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[-1], -1)
        return (matrix @ columns.reshape(len(columns), -1)).reshape(-1, *x.shape[1:])

    out, pull = jax.vjp(value, x, kernel)
    return pull(out)


FORMS = {"native": native, "shifts": shifts, "patches": patches}


def repeated(form: Callable[[jax.Array, jax.Array], Gradients]) -> Callable[..., Gradients]:
    """Returns the steps of a dispatch, each of which takes the gradient of the last one as x.

    The kernel changes by next to nothing, so that nothing can be computed only once.
    """

    def step(_: Any, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, kernel, _last = arrays
        x_grad, kernel_grad = form(x, kernel)
        return x_grad, kernel - 1e-9 * kernel_grad, kernel_grad

    def steps(x: jax.Array, kernel: jax.Array) -> Gradients:
        start = (x, kernel, jnp.zeros_like(kernel))
        x, _, kernel_grad = lax.fori_loop(0, roofline._STEPS.value, step, start)
        return x, kernel_grad

    return steps


def difference(found: Any, expected: Any) -> float:
    """Returns the largest difference of any array, relative to the array's largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def measure(channels: int, side: int, rates: tuple[float, float]) -> list[dict[str, Any]]:
    """Measures the forms in one stage, given the rates of a product and of a copy.

    Raises:
      AssertionError: If forms disagree.
    """
    clients, batch = roofline._CLIENTS.value, roofline._BATCH.value
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (clients, channels, batch, side, side))
    # With this scale, x keeps its size from step to step.
    kernel = jax.random.normal(keys[1], (clients, 3, 3, channels, channels))
    kernel = kernel / (9 * channels) ** 0.5
    work = roofline.convolution(channels, channels, side, side)
    attainable = min(rates[0], work.flop / work.bytes * rates[1])
    rows, first = [], None
    for name in _FORMS.value:
        steps = jit(jax.vmap(repeated(FORMS[name])))
        found = steps(x, kernel)
        first = found if first is None else first
        apart = difference(found, first)
        assert apart < _TOLERANCE, f"{name} differs by {apart:.1e}: nothing is timed"
        took = roofline.seconds(steps, x, kernel) / roofline._STEPS.value
        rows.append(
            {
                "form": name,
                "channels": channels,
                "side": side,
                "ms": 1e3 * took,
                "fraction": clients * work.flop / took / attainable,
                "difference": apart,
            }
        )
    return rows


def main(_: list[str]) -> None:
    roofline.on_one_core()
    compile_totals()  # starts counting
    if jax.default_backend() != "cpu":
        # Parts of a batch fit a CPU's cache. Elsewhere they would be a loop of small kernels.
        conv_cpu._TOGETHER_BYTES = conv_cpu._MOST_BYTES
    rates, rows = roofline.rates(), []
    for i, channels in enumerate((16, 32, 64)):
        rows += measure(channels, roofline._SIZE.value >> i, rates)
    peak, bandwidth = rates
    found = roofline.about() | {"peak": peak / 1e9, "bandwidth": bandwidth / 1e9, "rows": rows}
    roofline.write(found)
    print(f"\n{found['clients']} clients, batch {found['batch_size']}; {found['device']}")
    print("| channels, side | form | ms | fraction of attainable |\n|---|---|---|---|")
    for row in rows:
        where = f"{row['channels']}, {row['side']}x{row['side']}"
        print(f"| {where} | {row['form']} | {row['ms']:.3f} | {row['fraction']:.2f} |")


if __name__ == "__main__":
    app.run(main)
