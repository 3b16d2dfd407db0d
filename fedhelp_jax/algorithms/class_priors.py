"""Class priors that stay at the client: the head's bias is averaged without them.

Hospitals see different shares of each disease, so the biases of their heads differ even if the
images of a disease look alike everywhere, and an average of them fits nobody. With pi_i the class
shares of client i and b the bias of the head:

    before training:      b_i <- b + log pi_i          the rest of the round is unchanged
    sent to the server:   b_i - log pi_i
    deployed:             b + log pi_i

What is averaged is thus trained by the balanced softmax, -log softmax(z + log pi_i)_y (Ren et al.,
"Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv:2007.10740), as is
the generic head of Fed-RoD (Chen and Chao, ICLR 2022, arXiv:2107.00778). Its logits would be those
of a hospital that sees all classes equally often (logit adjustment: Menon et al., ICLR 2021,
arXiv:2007.07314), and what is deployed is the posterior at the client's own shares. Nothing more is
sent.

Notes: pi_ic = (n_ic + 1) / (n_i + C), so that a class without images is unlikely but not
impossible; training still lowers the logits of such a class, which then lower the average. Weight
decay acts on b + log pi_i. The posterior at the client's own shares is best for accuracy; for
balanced accuracy, logits without log pi_i would be.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.base import ClientAlgorithm, Setup
from fedhelp_jax.algorithms.client import Updated
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.model import Variables
from fedhelp_jax.typing import ClientState, Download

# What the setting is about, in all methods that have it.
LOCAL_PRIORS = "clients keep the log of their class shares out of what is averaged"


def log_class_priors(num_classes: int, data: ClientData) -> jax.Array:
    """Returns the log shares of the classes in a client's training data, float ``[C]``."""
    known = jnp.arange(data.index.shape[0]) < data.size
    members = jax.nn.one_hot(data.pool.targets[data.index], num_classes) * known[:, None]
    return jnp.log((jnp.sum(members, axis=0) + 1) / (data.size + num_classes))


def add_to_bias(variables: Variables, change: jax.Array) -> Variables:
    """Returns a network whose logits are higher by ``change``, ``[C]``."""
    params, head = variables["params"], variables["params"]["head"]
    head = {**head, "bias": head["bias"] + change}
    return {**variables, "params": {**params, "head": head}}


def with_local_priors(
    setup: Setup,
    client: ClientAlgorithm,
    change: Callable[[Any, Callable[[Variables], Variables]], Any] = lambda given, f: f(given),
) -> ClientAlgorithm:
    """Returns a client that does the same, but keeps its class priors to itself.

    Args:
      setup: What the method is given.
      client: A client that receives and sends networks of one architecture.
      change: ``(download, f) ->`` the download with ``f`` applied to its network.

    Raises:
      UserError: If the run is not about classification.
    """
    if setup.task.name != "classification":
        raise UserError("algorithm.local_priors: only images with one label each have them")

    def own(download: Download, priors: jax.Array) -> Download:
        return change(download, lambda network: add_to_bias(network, priors))

    def update(key: jax.Array, download: Download, state: ClientState, data: ClientData) -> Updated:
        priors = log_class_priors(setup.num_classes, data)
        state, upload, info = client.update(key, own(download, priors), state, data)
        return state, add_to_bias(upload, -priors), info

    def deploy(download: Download, state: ClientState, data: ClientData) -> dict[str, Variables]:
        priors = log_class_priors(setup.num_classes, data)
        return client.deploy(own(download, priors), state, data)

    return client._replace(update=update, deploy=deploy, adapts=True)
