"""A network in Flax NNX."""

import jax
from flax import nnx

import fedhelp_jax as fh


class Features(nnx.Module):
    """Maps images ``[B, H, W, C]`` to features ``[B, 16]``; `from_nnx` adds the head."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))


data = fh.data.load("phantoms", num_examples=400, image_size=16)
public = fh.data.load_public("phantoms", num_examples=32, image_size=16)
teacher = fh.teachers.simulated(public)
network = fh.models.from_nnx(Features, data.num_classes)
algorithm = fh.algorithms.fedhelp(small=network, large=fh.models.cnn((32, 32), data.num_classes))
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
