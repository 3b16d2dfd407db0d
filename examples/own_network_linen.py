"""A network in Flax Linen."""

import jax
from flax import linen as nn

import fedhelp_jax as fh


class Features(nn.Module):
    """Maps images ``[B, H, W, C]`` to features ``[B, 32]``; `from_linen` adds the head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x.mean(axis=(1, 2))


data = fh.data.load("phantoms", num_examples=400, image_size=16)
public = fh.data.load_public("phantoms", num_examples=32, image_size=16)
teacher = fh.teachers.simulated(public)
network = fh.models.from_linen(Features(), data.num_classes)
algorithm = fh.algorithms.fedhelp(small=network, large=fh.models.cnn((32, 32), data.num_classes))
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
