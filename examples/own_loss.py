"""A custom loss, and a learning rate that decays over the rounds."""

import jax
import jax.numpy as jnp
import optax

import fedhelp_jax as fh


def focal_loss(
    logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Returns ``-(1 - p_y)^2 log p_y`` of each example (Lin et al., arXiv:1708.02002)."""
    log_probs = jax.nn.log_softmax(logits)
    log_p = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    loss = -((1 - jnp.exp(log_p)) ** 2) * log_p
    return loss if where is None else jnp.where(where, loss, 0)


data = fh.data.load("phantoms", num_examples=400, image_size=16)
algorithm = fh.algorithms.fedavg(
    small=fh.models.cnn((8, 32), data.num_classes),
    optimizer=optax.adamw,
    learning_rate=optax.cosine_decay_schedule(3e-3, decay_steps=5),
)
task = fh.tasks.classification._replace(loss=focal_loss)
sim = fh.Simulation(algorithm, data, task=task, batch_size=16)
state = sim.init(jax.random.key(0))
for _ in range(5):
    state, info = sim.step(state)
print(sim.clients(state, "test"))
