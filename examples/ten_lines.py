"""FedHelp on generated images, with a simulated foundation model."""

import jax
import optax

import fedhelp_jax as fh

data = fh.data.load("phantoms", seed=0)
public = fh.data.load_public("phantoms", seed=0)
teacher = fh.teachers.simulated(public, accuracy=0.85)
algorithm = fh.algorithms.fedhelp(
    small=fh.models.resnet(20, data.num_classes),
    large=fh.models.resnet(32, data.num_classes),
    optimizer=optax.adam(1e-3),
    lambda_b=0.2,
)
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(50):
    state, info = sim.step(state)
print(sim.evaluate(state, "test"))
