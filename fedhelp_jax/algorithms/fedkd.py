"""FedKD.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature
Communications 2022, arXiv:2108.13323, algorithm 1. Every client has its own mentor W_i, of its
role's architecture, and a copy v_i of the shared small mentee. Both learn from the same batch at
once, with features h and a projection P_i of the mentee's features to the mentor's width:

    c         = CE(W_i) + CE(v_i)                      how unsure both are
    W_i:        CE(W_i) + ( KL(v_i || W_i) + mean |h_W - P_i h_v|^2 ) / c
    v_i, P_i:   CE(v_i) + ( KL(W_i || v_i) + mean |h_W - P_i h_v|^2 ) / c

Each treats the other, and c, as constant. A client sends its mentee's update, in which every matrix
is reduced to the fewest singular vectors that hold the share T of its energy sum_j sigma_j^2. The
server averages the updates, reduces the mean in the same way, and sends it. In round t of R,

    T = energy_start + (energy_end - energy_start) t / R

A client deploys its mentor; the mentee is also reported (``global``).

Notes: a convolution's kernel is treated as the matrix [all other axes, outputs]. Arrays with one
axis and batch statistics are sent in full, and so is a matrix that its factors would not make
smaller. ``bytes_up`` and ``bytes_down`` count what is sent. The first download is the whole mentee,
and a client that missed a round is counted as if it had not. ``setup.tx`` also trains the
projection, which stays with its client. The paper's attention terms do not apply to these networks.
``energy_start = energy_end = 1`` sends everything.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.aggregation import Averaged, average, init_averaged
from fedhelp_jax.algorithms.base import (
    PRIVATE,
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    client_init_key,
    feature_width,
    init_private,
    init_shared,
)
from fedhelp_jax.algorithms.client import Batch, Info, Updated, gradient_step
from fedhelp_jax.algorithms.local_training import local_epochs
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.core.tree import num_bytes
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.layers import he_normal
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.settings import between, setting
from fedhelp_jax.typing import Carry, Upload


@dataclasses.dataclass(frozen=True)
class FedKDSettings:
    """Settings of FedKD."""

    energy_start: float = setting(
        0.95, "share of an update's energy that is sent at the start", between(0, 1)
    )
    energy_end: float = setting(0.98, "the same in the last round", between(0, 1))


class Server(NamedTuple):
    """The mentee, the number of rounds done, and the bytes of the update that clients lack."""

    averaged: Averaged
    round: jax.Array
    bytes_down: jax.Array


class Broadcast(NamedTuple):
    """The mentee after the update, the number of rounds done, and the update's bytes."""

    variables: Variables
    round: jax.Array
    bytes_down: jax.Array


class Mentor(NamedTuple):
    """A client's state between rounds: W, and its projection P ``[D_small, D_role]``."""

    variables: Variables
    projection: jax.Array


class Seen(NamedTuple):
    """A network's outputs on a batch in training mode: h, logits, batch statistics and CE."""

    features: jax.Array
    logits: jax.Array
    batch_stats: Variables
    loss: jax.Array


@method(FedKDSettings, schedules=lambda s: s.energy_start != s.energy_end)
def fedkd(setup: Setup, settings: FedKDSettings) -> FederatedAlgorithm:
    """FedKD: mutual distillation with a shared model, sent compressed."""
    small = setup.models["small"]

    def energy(round: jax.Array) -> jax.Array:
        progress = (round + 1) / setup.rounds
        return settings.energy_start + (settings.energy_end - settings.energy_start) * progress

    def client(role: str) -> ClientAlgorithm:
        own = setup.models[role]

        def init(run_key: jax.Array, client_id: jax.Array) -> Mentor:
            key = for_purpose(client_init_key(run_key, client_id), Purpose.CLIENT_INIT)
            shape = feature_width(setup), feature_width(setup, role)
            return Mentor(init_private(setup, role, run_key, client_id), he_normal(key, shape))

        def update(key: jax.Array, download: Broadcast, state: Mentor, data: ClientData) -> Updated:
            def step(carry: Carry, batch: Batch, _: jax.Array) -> tuple[Carry, Info]:
                return mutual_step(setup, own, carry, batch)

            w, v = state.variables, download.variables
            trained = {**v["params"], "projection": state.projection}
            start = (w, setup.tx.init(w["params"])), (v, trained, setup.tx.init(trained))
            ((w, _), (v, trained, _)), info = local_epochs(setup, key, step, start, data)
            v, sent = compressed(download.variables, v, energy(download.round))
            info |= {"bytes_up": sent, "bytes_down": download.bytes_down}
            return Mentor(w, trained["projection"]), v, info

        def deploy(download: Broadcast, state: Mentor, data: ClientData) -> dict[str, Variables]:
            del data
            return {PRIVATE[role]: state.variables, "global": download.variables}

        return ClientAlgorithm({PRIVATE[role]: own, "global": small}, init, update, deploy)

    def init(run_key: jax.Array) -> Server:
        v = init_shared(setup, run_key)
        return Server(init_averaged(setup, v), jnp.int32(0), jnp.int32(num_bytes(v)))

    def aggregate(
        state: Server,
        uploads: Mapping[str, Upload],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Server:
        del data
        mean = average(setup, state.averaged, uploads, weights)
        v, sent = compressed(state.averaged.variables, mean.variables, energy(state.round))
        return Server(mean._replace(variables=v), state.round + 1, sent)

    return FederatedAlgorithm(
        init=init,
        download=lambda state, role: Broadcast(
            state.averaged.variables, state.round, state.bytes_down
        ),
        clients={role: client(role) for role in ROLES},
        aggregate=aggregate,
        mean_only=True,
    )


def mutual_step(setup: Setup, own: Model, carry: Carry, batch: Batch) -> tuple[Carry, Info]:
    """Takes one step of mentor and mentee on a batch, each taught by the other's old variables."""
    (w, w_opt), (v, trained, v_opt) = carry
    small = setup.models["small"]

    def seen(model: Model, params: Variables, batch_stats: Variables) -> Seen:
        variables = {"params": params, "batch_stats": batch_stats}
        h, stats = model.features(variables, batch.images, train=True, mask=batch.mask)
        logits = model.head(params["head"], h)
        loss = setup.task.loss(logits, batch.targets, where=batch.mask)
        return Seen(h, logits, stats, masked_mean(loss, batch.mask))

    w_seen = seen(own, w["params"], w["batch_stats"])
    v_seen = seen(small, trained, v["batch_stats"])
    unsure = w_seen.loss + v_seen.loss

    def hidden(mentor: jax.Array, mentee: jax.Array, projection: jax.Array) -> jax.Array:
        apart = jnp.mean(jnp.square(mentor - mentee @ projection), axis=-1)
        return masked_mean(jnp.mean(apart.reshape(len(apart), -1), axis=-1), batch.mask)

    def taught(student: Seen, teacher: Seen, distance: jax.Array) -> jax.Array:
        mutual = setup.task.distill(
            student.logits, teacher.logits, temperature=1.0, where=batch.mask
        )
        return student.loss + (masked_mean(mutual, batch.mask) + distance) / unsure

    def mentor_loss(params: Variables) -> tuple[jax.Array, Variables]:
        mine = seen(own, params, w["batch_stats"])
        distance = hidden(mine.features, v_seen.features, trained["projection"])
        return taught(mine, v_seen, distance), mine.batch_stats

    def mentee_loss(params: Variables) -> tuple[jax.Array, Variables]:
        mine = seen(small, params, v["batch_stats"])
        distance = hidden(w_seen.features, mine.features, params["projection"])
        return taught(mine, w_seen, distance), mine.batch_stats

    params, w_opt, loss, stats = gradient_step(setup.tx, mentor_loss, w["params"], w_opt)
    w = {"params": params, "batch_stats": stats}
    trained, v_opt, mentee, stats = gradient_step(setup.tx, mentee_loss, trained, v_opt)
    params = {name: leaf for name, leaf in trained.items() if name != "projection"}
    v = {"params": params, "batch_stats": stats}
    return ((w, w_opt), (v, trained, v_opt)), {"loss": loss, "mentee_loss": mentee}


def compressed(
    before: Variables, after: Variables, energy: jax.Array
) -> tuple[Variables, jax.Array]:
    """Returns ``after`` as a receiver that has ``before`` reconstructs it, and the bytes sent.

    The bytes are an int32 scalar.
    """
    leaves, tree = jax.tree.flatten(after["params"])
    cut = [
        low_rank(new - old, energy)
        for new, old in zip(leaves, jax.tree.leaves(before["params"]), strict=True)
    ]
    update = tree.unflatten([leaf for leaf, _ in cut])
    sent = sum(size for _, size in cut) + num_bytes(after["batch_stats"])
    params = jax.tree.map(jnp.add, before["params"], update)
    return {**after, "params": params}, jnp.asarray(sent, jnp.int32)


def low_rank(update: jax.Array, energy: jax.Array) -> tuple[jax.Array, jax.Array | int]:
    """Reduces a leaf to the fewest singular vectors that hold a share of its energy.

    Returns:
      The leaf rebuilt from these vectors, and the bytes to send it.
    """
    if update.ndim < 2:
        return update, num_bytes(update)
    matrix = update.reshape(-1, update.shape[-1])
    u, sigma, v = jnp.linalg.svd(matrix, full_matrices=False)
    squares = jnp.square(sigma)
    kept = jnp.cumsum(squares) - squares < energy * jnp.sum(squares)
    cut = ((u * jnp.where(kept, sigma, 0)) @ v).reshape(update.shape)
    rank = jnp.sum(kept, dtype=jnp.int32)
    entries = jnp.minimum(rank * (sum(matrix.shape) + 1), matrix.size)
    return cut, entries * update.dtype.itemsize
