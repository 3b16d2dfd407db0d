"""FedHelp that also measures whether a small client's public and private steps pull alike.

    fedhelp train --config=configs/pneumonia.py:sixteen --workdir=runs/gradients \
        --config.algorithm.name=benchmarks.gradients:fedhelp_measured

Each round, before a small client trains, it takes the gradients of both losses with respect to the
shared features theta, over all its private and all public images, at the broadcast theta and its
own public heads. `metrics.jsonl` then holds, under ``train.small``, as means over the clients:

    cosine         of the public gradient to the private one
    cosine_halves  of the private gradients of two halves of the images to each other. If it is c,
                   the best direction would have a cosine of about sqrt(2 c / (1 + c)) to the
                   private gradient, as the client has few images
    ratio          length of the public gradient over that of the private one
"""

import jax
import jax.numpy as jnp
import optax

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Batch, PublicBatch, Updated
from fedhelp_jax.algorithms.fedhelp import Broadcast, SmallState, fedhelp, public_loss
from fedhelp_jax.algorithms.fedhelp_losses import FedHelpSettings
from fedhelp_jax.algorithms.local_training import supervised_loss
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import ClientData, normalize_images
from fedhelp_jax.typing import Params


@method(FedHelpSettings, uses_public=True, uses_teacher=True)
def fedhelp_measured(setup: Setup, settings: FedHelpSettings) -> FederatedAlgorithm:
    """FedHelp that trains as ever, and measures the gradients of its small clients.

    Raises:
      UserError: If there is nothing public.
    """
    if setup.public is None:
        raise UserError("algorithm.name: fedhelp_measured needs public images")
    algorithm = fedhelp.build(setup, settings)
    small = algorithm.clients["small"]

    def update(key: jax.Array, download: Broadcast, state: SmallState, data: ClientData) -> Updated:
        trained, upload, info = small.update(key, download, state, data)
        return trained, upload, info | gradients(setup, settings, download, state, data)

    clients = {**algorithm.clients, "small": small._replace(update=update)}
    return algorithm._replace(clients=clients)


def gradients(
    setup: Setup,
    settings: FedHelpSettings,
    download: Broadcast,
    state: SmallState,
    data: ClientData,
) -> dict[str, jax.Array]:
    """Returns the cosines and the ratio that the module describes, of one small client."""
    assert data.public is not None
    params, stats = download.variables["params"], download.variables["batch_stats"]
    known = jnp.arange(data.index.shape[0]) < data.size
    images = normalize_images(data.pool.images[data.index])
    targets = data.pool.targets[data.index]

    def private(mask: jax.Array) -> Params:
        loss = supervised_loss(setup, setup.models["small"], stats, Batch(images, targets, mask))
        return jax.grad(loss, has_aux=True)(params)[0]["features"]

    everything = PublicBatch(
        normalize_images(data.public.images), data.public.labels, data.public.answers
    )

    def loss(trained: Params) -> tuple[jax.Array, Params]:
        return public_loss(setup, settings, trained, stats, everything)

    trained = {"features": params["features"], "public_heads": state.public_heads}
    public = jax.grad(loss, has_aux=True)(trained)[0]["features"]
    own = private(known)
    even = jnp.arange(known.shape[0]) % 2 == 0
    return {
        "cosine": _cosine(public, own),
        "cosine_halves": _cosine(private(known & even), private(known & ~even)),
        "ratio": optax.tree.norm(public) / jnp.maximum(optax.tree.norm(own), 1e-12),
    }


def _cosine(one: Params, other: Params) -> jax.Array:
    length = optax.tree.norm(one) * optax.tree.norm(other)
    return jnp.asarray(optax.tree.vdot(one, other)) / jnp.maximum(length, 1e-12)
