"""A method's small clients under your own ``jax.vmap``, aggregated by a median."""

import jax
import jax.numpy as jnp

import fedhelp_jax as fh

data = fh.data.load("phantoms", num_examples=400, image_size=16)
algorithm = fh.algorithms.fedavg(small=fh.models.cnn((8, 32), data.num_classes))
sim = fh.Simulation(algorithm, data, large=0, batch_size=16)
method, (group,) = sim.algorithm, sim.federation.groups
small, key = method.clients["small"], jax.random.key(0)


def update(key: jax.Array, download: dict, index: jax.Array, size: jax.Array):
    """Returns a client's upload and its report; all functions of `method` are pure."""
    examples = fh.data.ClientData(sim.federation.pool, None, index, size)
    state = small.init(key, jnp.int32(0))
    _, upload, info = small.update(key, download, state, examples)
    return upload, info


clients = fh.jit(jax.vmap(update, in_axes=(0, None, 0, 0)))
variables = method.download(method.init(key), "small")
for round in range(5):
    keys = jax.random.split(jax.random.fold_in(key, round), len(group.names))
    uploads, info = clients(keys, variables, *group.train)
    variables = jax.tree.map(lambda leaf: jnp.median(leaf, axis=0), uploads)
    print(round, info["loss"])
