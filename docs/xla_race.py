"""JAX alone: a loop, then a matrix product, whose first block can come out wrong on CPU.

    python docs/xla_race.py            # as XLA compiles it
    python docs/xla_race.py --safe     # without the pass that splits operations over threads

Two CPU devices run the same program on the same input. The products of several widths are tried,
because which of them XLA shares out in blocks depends on the processor's caches. Prints a line for
each, and exits with code 1 if any product was wrong.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

SAFE = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
STEPS, TIMES, WIDTHS = 1500, 10, (2304, 8192, 16384)


def program(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a.T @ b`` after a loop whose every step is split over the threads of the pool."""
    x = x[0] + 0 * (a.T @ b)[0, 0]  # moves the execution onto a thread of the pool
    x = lax.fori_loop(0, STEPS, lambda _, x: jnp.tanh(x * 1.01 + 0.1), x)
    return (a.T @ (b + 0 * x[0, 0]))[None]


def main() -> int:
    """Counts wrong products."""
    jax.config.update("jax_num_cpu_devices", 2)
    options = SAFE if "--safe" in sys.argv[1:] else None
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("d",))
    on_each = jax.shard_map(
        program, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d"), check_vma=False
    )
    run, draw, total = jax.jit(on_each, compiler_options=options), np.random.RandomState(0), 0
    for width in WIDTHS:
        a, b = draw.rand(576, 64).astype("f"), draw.rand(576, width).astype("f")
        x, expected = np.ones((2, 512, 512), "f"), (a.T @ b)[None]
        wrong = sum(not np.allclose(run(x, a, b), expected, rtol=1e-3) for _ in range(TIMES))
        print(f"jaxlib {jax.lib.__version__}, 64x576 @ 576x{width}: wrong {wrong} of {TIMES}")
        total += wrong
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
