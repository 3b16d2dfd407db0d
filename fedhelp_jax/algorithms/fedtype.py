"""FedType.

Wang et al., "Bridging Model Heterogeneity in Federated Learning via Uncertainty-based Asymmetrical
Reciprocity Learning", ICML 2024, arXiv:2407.03247. Every client has its own network W_i, of its
role's architecture, and a copy v_i of the shared small proxy. Before a round, both are calibrated
as conformal predictors on the client's training data. With the classes of an example sorted by
their probabilities p, the largest first, class number o has the score (RAPS, arXiv:2009.14193)

    s_o = p_1 + ... + p_o + penalty max(0, o - k_reg)

tau is the ceil((n + 1)(1 - miscoverage))-th smallest of the n scores of true labels. S(x) holds the
first class and all others with s_o <= tau. On a batch, one step after the other,

    A, on W_i:  CE(W_i) + q R(W_i; S_v)      q = mean over x of |S_v & S_W| / |S_v | S_W|
                                             (/ |S_v| where |S_W| > |S_v|)
                R = mean over t in S_v, r not, of max(0, s_r - s_t), s the logits of W_i
    B, on v_i:  CE(v_i) + KL(W_i || v_i),    W_i as A left it

Teachers are in evaluation mode. The server averages the proxies. A client deploys W_i; the proxy is
also reported (``global``).

Notes on the differences from the authors' code: in the code that runs, the ranking is computed on
the proxy's logits, which carry no gradient, so it trains nothing. Its sign is also inverted (as in
FedHelp's code, see ``fedhelp_jax.losses.reference_code``), and it is divided by the batch size
twice. Here it is computed on W_i's logits, as in the paper. Step B follows step A on each batch,
not after the whole epoch. Scores are not randomised, p is not rescaled by a fitted temperature, and
scores are counted in 2,048 bins. The penalty of the proxy is constant: the code adapts it, but no
training uses the result. For masks, each pixel is an example, of the class that covers most of it.
``miscoverage = 0`` puts all classes into S, which leaves W_i as in local training.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.aggregation import averaging
from fedhelp_jax.algorithms.base import ClientAlgorithm, FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.client import Batch, Info, Updated, gradient_step
from fedhelp_jax.algorithms.local_training import (
    local_epochs,
    one_pass,
    private_client,
    supervised_loss,
)
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.data.federation import ROLES, ClientData
from fedhelp_jax.losses import masked_mean, set_ranking_loss
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.settings import at_least, between, setting, whole
from fedhelp_jax.typing import Carry

BINS = 2048


@dataclasses.dataclass(frozen=True)
class FedTypeSettings:
    """Settings of FedType."""

    miscoverage: float = setting(
        0.1,
        "share of examples whose set may miss the true class (alpha); 0 turns the ranking off",
        between(0, 1),
    )
    k_reg: int = setting(5, "sets up to this size are not penalised", whole(0))
    penalty_proxy: float = setting(0.5, "penalty of larger sets of the proxy (lambda)", at_least(0))
    penalty_private: float = setting(1.0, "the same of the client's own network", at_least(0))


@method(FedTypeSettings)
def fedtype(setup: Setup, settings: FedTypeSettings) -> FederatedAlgorithm:
    """FedType: a proxy and a private model linked by conformal sets."""

    def client(role: str) -> ClientAlgorithm:
        def update(
            key: jax.Array, download: Variables, state: Variables, data: ClientData
        ) -> Updated:
            own, proxy = setup.models[role], setup.models["small"]
            w_tau = calibrate(setup, settings, own, state, data, settings.penalty_private)
            v_tau = calibrate(setup, settings, proxy, download, data, settings.penalty_proxy)
            step = functools.partial(reciprocal_step, setup, settings, own, (w_tau, v_tau))
            start = tuple((x, setup.tx.init(x["params"])) for x in (state, download))
            ((w, _), (v, _)), info = local_epochs(setup, key, step, start, data)
            return w, v, info

        return private_client(setup, role, update, broadcast=True)

    return averaging(setup, {role: client(role) for role in ROLES})


def reciprocal_step(
    setup: Setup,
    settings: FedTypeSettings,
    own: Model,
    taus: tuple[jax.Array, jax.Array],
    carry: Carry,
    batch: Batch,
    index: jax.Array,
) -> tuple[Carry, Info]:
    """Takes steps A and B on a batch; ``taus`` are those of the own network and of the proxy."""
    del index
    (w, w_opt), (v, v_opt) = carry
    task, small = setup.task, setup.models["small"]

    def sets(model: Model, variables: Variables, tau: jax.Array, penalty: float) -> jax.Array:
        logits, _ = apply_model(model, variables, batch.images)
        return conformal_sets(task.class_logits(logits), tau, penalty, settings.k_reg)

    w_sets = sets(own, w, taus[0], settings.penalty_private)
    v_sets = sets(small, v, taus[1], settings.penalty_proxy)
    agreed = consensus(v_sets, w_sets)
    agreed = masked_mean(jnp.mean(agreed.reshape(len(agreed), -1), axis=-1), batch.mask)
    supervised_w = supervised_loss(setup, own, w["batch_stats"], batch)
    supervised_v = supervised_loss(setup, small, v["batch_stats"], batch)

    def private_loss(params: Variables) -> tuple[jax.Array, Variables]:
        loss, (logits, stats) = supervised_w(params)
        ranking = set_ranking_loss(task.class_logits(logits), v_sets)
        ranking = jnp.mean(ranking.reshape(len(ranking), -1), axis=-1)
        return loss + agreed * masked_mean(ranking, batch.mask), stats

    params, w_opt, loss, stats = gradient_step(setup.tx, private_loss, w["params"], w_opt)
    w = {"params": params, "batch_stats": stats}
    teacher_logits, _ = apply_model(own, w, batch.images)

    def proxy_loss(params: Variables) -> tuple[jax.Array, Variables]:
        loss, (logits, stats) = supervised_v(params)
        forward = task.distill(logits, teacher_logits, temperature=1.0, where=batch.mask)
        return loss + masked_mean(forward, batch.mask), stats

    params, v_opt, proxy, stats = gradient_step(setup.tx, proxy_loss, v["params"], v_opt)
    v = {"params": params, "batch_stats": stats}
    return ((w, w_opt), (v, v_opt)), {"loss": loss, "proxy_loss": proxy, "consensus": agreed}


def consensus(proxy_sets: jax.Array, private_sets: jax.Array) -> jax.Array:
    """Returns how far two sets ``[..., C]`` agree: the size of their intersection as a share.

    The share is of the union, or of the proxy's set if that is smaller than the private one.
    """
    both = jnp.sum(proxy_sets & private_sets, axis=-1)
    either = jnp.sum(proxy_sets | private_sets, axis=-1)
    proxy, private = jnp.sum(proxy_sets, axis=-1), jnp.sum(private_sets, axis=-1)
    return both / jnp.where(private <= proxy, either, proxy)


def calibrate(
    setup: Setup,
    settings: FedTypeSettings,
    model: Model,
    variables: Variables,
    data: ClientData,
    penalty: float,
) -> jax.Array:
    """Returns a network's tau on a client's training data, as the number of its bin, int32."""
    num_classes = setup.task.num_ranked(setup.num_classes)

    def step(counts: jax.Array, batch: Batch, _: jax.Array) -> tuple[jax.Array, Info]:
        logits = setup.task.class_logits(apply_model(model, variables, batch.images)[0])
        members = setup.task.memberships(batch.targets, logits.shape[1:-1], num_classes)
        label = jnp.argmax(members, axis=-1)[..., None]
        bins = score_bins(logits, penalty, settings.k_reg)
        bins = jnp.take_along_axis(bins, label, axis=-1)[..., 0]
        valid = batch.mask.reshape(-1, *(1,) * (bins.ndim - 1))
        # Padding is counted past the end, which drops it.
        return counts.at[jnp.where(valid, bins, BINS)].add(1, mode="drop"), {}

    counts, _ = one_pass(setup, step, jnp.zeros(BINS, jnp.int32), data)
    total = jnp.sum(counts)
    rank = jnp.ceil((total + 1) * (1 - settings.miscoverage))
    # With too few examples, this is BINS, so that every score passes.
    return jnp.sum(jnp.cumsum(counts) < rank, dtype=jnp.int32)


def conformal_sets(logits: jax.Array, tau: jax.Array, penalty: float, k_reg: int) -> jax.Array:
    """Returns S as booleans ``[..., C]``, for logits ``[..., C]`` and the bin of tau."""
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return largest | (score_bins(logits, penalty, k_reg) <= tau)


def score_bins(logits: jax.Array, penalty: float, k_reg: int) -> jax.Array:
    """Returns the bin of every class's score, int32 ``[..., C]``.

    The bins have equal width and reach up to the largest possible score. Classes of equal
    probability are ranked by their index, the smaller first.
    """
    num_classes = logits.shape[-1]
    p = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-p, axis=-1, stable=True)
    size = jnp.arange(1, num_classes + 1)
    scores = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    scores += penalty * jnp.maximum(0, size - k_reg)
    scores = jnp.take_along_axis(scores, jnp.argsort(order, axis=-1), axis=-1)
    largest = 1 + penalty * max(0, num_classes - k_reg)
    return jnp.minimum(jnp.floor(scores * (BINS / largest)), BINS - 1).astype(jnp.int32)
