"""Private and public images, and a foundation model's logits, from NumPy arrays."""

import jax
import numpy as np

import fedhelp_jax as fh

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
labels = rng.integers(0, 4, 300)
hospital = rng.choice(["north", "south", "east"], 300, p=[0.7, 0.2, 0.1])
data = fh.data.from_arrays(images, labels, clients=hospital, seed=0)

public = fh.data.public_from_arrays(rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
logits = rng.normal(size=(64, 10))
teacher = fh.teachers.from_logits(public, logits, label_names="abcdefghij", name="random numbers")

network = fh.models.cnn((8, 32), data.num_classes)
algorithm = fh.algorithms.fedhelp(small=network, learning_rate=1e-3)
sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, large=["north"], batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
