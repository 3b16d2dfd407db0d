"""A network made of two plain functions."""

import jax
import jax.numpy as jnp

import fedhelp_jax as fh


def init(key: jax.Array, sample_shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Draws the weights of a 3x3 convolution."""
    return {"kernel": 0.1 * jax.random.normal(key, (3, 3, sample_shape[-1], 16))}


def features(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Maps images ``[B, H, W, C]`` to features ``[B, 16]``; `from_functions` adds the head."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=layout)
    return jnp.mean(jax.nn.relu(x), axis=(1, 2))


data = fh.data.load("phantoms", num_examples=400, image_size=16)
public = fh.data.load_public("phantoms", num_examples=32, image_size=16)
teacher = fh.teachers.simulated(public)
network = fh.models.from_functions(init, features, data.num_classes)
algorithm = fh.algorithms.fedhelp(small=network, large=fh.models.cnn((32, 32), data.num_classes))
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
