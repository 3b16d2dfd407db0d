"""A network in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp

import fedhelp_jax as fh


class Features(eqx.Module):
    """Maps one image ``[H, W, C]`` to features ``[16]``; `from_equinox` adds the head."""

    conv: eqx.nn.Conv2d

    def __init__(self, key: jax.Array):
        self.conv = eqx.nn.Conv2d(3, 16, 3, stride=2, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.conv(jnp.moveaxis(x, -1, 0))).mean(axis=(1, 2))


data = fh.data.load("phantoms", num_examples=400, image_size=16)
public = fh.data.load_public("phantoms", num_examples=32, image_size=16)
teacher = fh.teachers.simulated(public)
network = fh.models.from_equinox(Features, data.num_classes)
algorithm = fh.algorithms.fedhelp(small=network, large=fh.models.cnn((32, 32), data.num_classes))
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
