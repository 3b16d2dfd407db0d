"""How many small clients of FedHelp are vectorised at a time on a device with so much memory.

    python -m benchmarks.clients_at_once --clients=10000 --memory_gib=80

The programs are compiled for this machine's first device, but not run; the images are random
pixels. On CPU the plan of memory differs from that of a GPU, and only the procedure can be seen.
"""

import logging
import time

import jax
import numpy as np
from absl import app, flags

import fedhelp_jax as fh
from fedhelp_jax.algorithms import Given
from fedhelp_jax.core.memory import gib
from fedhelp_jax.data.federation import make_federation
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset
from fedhelp_jax.simulation import memory
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import make_program, public_spec
from fedhelp_jax.simulation.vectorize import make_mapping

_CLIENTS = flags.DEFINE_integer("clients", 10_000, "clients")
_MEMORY = flags.DEFINE_float("memory_gib", 80, "memory of the pretended device")
_IMAGES = flags.DEFINE_integer("images", 50, "training images of a client")
_SIDE = flags.DEFINE_integer("side", 32, "side of an image")
_BATCH = flags.DEFINE_integer("batch_size", 16, "private and public images in a step")
_DEPTH = flags.DEFINE_integer("depth", 20, "depth of the ResNet")


def main(_: list[str]) -> None:
    """Prints what the programs need with all clients at once, and with what is chosen."""
    logging.basicConfig(format="%(message)s")
    clients, each = _CLIENTS.value, _IMAGES.value
    images = np.zeros((clients * each, _SIDE.value, _SIDE.value, 3), np.uint8)
    own = np.arange(len(images), dtype=np.int32).reshape(clients, each)
    splits = tuple(ClientSplit(f"c{i}", rows, rows[:8], rows[:8]) for i, rows in enumerate(own))
    names = tuple(map(str, range(8)))
    labels = np.zeros(len(images), np.int32)
    data = FederatedDataset("blank", True, images, labels, names, splits)
    public_images = np.zeros((256, _SIDE.value, _SIDE.value, 3), np.uint8)
    public = PublicDataset("blank", True, public_images, labels[:256], names, (), public_images)
    network = fh.models.resnet(_DEPTH.value, len(names))
    given = Given(
        task=fh.tasks.classification,
        num_classes=len(names),
        sample_shape=images.shape[1:],
        batch_size=_BATCH.value,
        public_batch_size=_BATCH.value,
        local_epochs=1,
        public=public_spec(public, None),
        augment=(),
        rounds=1,
    )
    federation = make_federation(data, ["small"] * clients, public, None)
    program = make_program(
        fh.algorithms.fedhelp(small=network, large=network),
        given,
        federation,
        make_mapping(0, 1),
    )
    measure = memory.needs_of

    def shown(rounds: CompiledRounds, *, training: bool = True) -> list[memory.Need]:
        began = time.perf_counter()
        needs = measure(rounds, training=training)
        for need in needs:
            parts = f"{gib(need.fixed)} fixed, {gib(need.temporary)} temporary"
            print(f"{need.clients} at a time: {parts}")
        print(f"  compiled in {time.perf_counter() - began:.0f} s", flush=True)
        return needs

    memory.needs_of = shown
    chosen = memory.fit(CompiledRounds(program, federation), memory=int(_MEMORY.value * 2**30))
    chunk = chosen.mapping.chunk_size or clients
    print(f"{chunk} of {clients} at a time; {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    app.run(main)
