"""Measures memory of a training step of a 3D U-Net, with and without rematerialisation.

    python -m benchmarks.memory                        # compiled only: the sizes XLA allocates
    python -m benchmarks.memory --run --remat=true     # one step is run, and its peak measured

The step is Adam with L2 decay on softmax cross-entropy and Dice of three classes; parameters and
optimizer state are updated in place. On a CPU the peak is that of the process, so run one setting
per process. Elsewhere it is that of the device.
"""

import platform
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.alternate import peak_gib
from fedhelp_jax.algorithms.client import adam_l2, gradient_step
from fedhelp_jax.core.compilation import jit
from fedhelp_jax.losses.segmentation import mask_loss
from fedhelp_jax.models.model import apply_model
from fedhelp_jax.models.unet import UNETS, unet

_MODEL = flags.DEFINE_enum("model", "unet_large", list(UNETS), "the network")
_SHAPE = flags.DEFINE_list("shape", ["48", "60", "48"], "sides of a volume")
_BATCH = flags.DEFINE_integer("batch_size", 2, "volumes a step")
_REMAT = flags.DEFINE_list("remat", ["false", "true"], "settings of model.remat")
_RUN = flags.DEFINE_boolean("run", False, "run one step too")

_GIB = 2**30


def compiled(remat: bool):
    """Returns a compiled step, a function that makes its state, and the shapes of its batch."""
    shape = (*map(int, _SHAPE.value), 1)
    model, tx = unet(UNETS[_MODEL.value], 3, remat=remat), adam_l2(1e-3, 1e-4)

    def step(variables, opt_state, x, targets):
        def loss_fn(params):
            now = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, stats = apply_model(model, now, x, train=True)
            return mask_loss(logits, targets).mean(), stats

        params, opt_state, loss, stats = gradient_step(tx, loss_fn, variables["params"], opt_state)
        return {"params": params, "batch_stats": stats}, opt_state, loss

    def start():
        variables = model.init(jax.random.key(0), shape)
        return variables, tx.init(variables["params"])

    x = jax.ShapeDtypeStruct((_BATCH.value, *shape), jnp.float32)
    targets = jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32)
    lowered = jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(start), x, targets)
    program = lowered.compile()
    return program, start, x, targets


def peak_bytes() -> int:
    """Returns the peak memory of the device, or of this process if the device is the CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return round(2**30 * peak_gib())


def main(_: list[str]) -> None:
    """Prints one line per setting."""
    print(f"{_MODEL.value}, batch {_BATCH.value}, {'x'.join(_SHAPE.value)}")
    machine = f"{jax.devices()[0].device_kind}, {platform.machine()}"
    print(f"{machine}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    for remat in (value == "true" for value in _REMAT.value):
        program, start, x, targets = compiled(remat)
        sizes = program.memory_analysis()
        state, temporary = sizes.argument_size_in_bytes / _GIB, sizes.temp_size_in_bytes / _GIB
        line = f"remat {remat!s:5}  state {state:.2f} GiB  temporary {temporary:.2f} GiB"
        if _RUN.value:
            # Constants instead of random parameters, whose temporaries would add to the peak.
            given = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), jax.eval_shape(start))
            images = jax.random.normal(jax.random.key(0), x.shape)
            masks = jax.random.randint(jax.random.key(1), targets.shape, 0, 3)
            began = time.perf_counter()
            loss = jax.block_until_ready(program(*given, images, masks))[2]
            seconds = time.perf_counter() - began
            line += f"  peak {peak_bytes() / _GIB:.2f} GiB  {seconds:.0f} s  loss {loss:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
