"""FedHelp: asymmetrical reciprocity between large clients, small clients and a foundation model.

Wang et al., "Asymmetrical Reciprocity-based Federated Learning for Resolving Disparities in Medical
Diagnosis", KDD 2025, arXiv:2412.19654. On each private batch, every client takes two optimizer
steps, each with its own optimizer state:

    small client (sec. 3.3): surrogate (theta, phi), public heads psi
      A on (theta, phi):  CE(h_phi(f_theta(x)), y)
      B on (theta, psi):  CE(h_psi(f_theta(x_p)), y_p)
                          + lambda_fm T^2 KL(sigma(z_p / T) || sigma(h_psi(f_theta(x_p)) / T))

    large client (sec. 3.4): proxy v, large model W
      A on v:  CE(v(x), y) + lambda_f T^2 KL(sigma(W(x) / T) || sigma(v(x) / T))
      B on W:  CE(W(x), y) + lambda_b R_k(W(x); v(x)), v as A left it
      (teachers are in evaluation mode)

    server (sec. 3.5):  w <- mean of all surrogates (theta, phi) and proxies v

``z_p`` are the foundation model's answers, computed once before the first round. Surrogates and
proxies share one architecture and start each round from ``w``; ``psi`` and ``W`` never leave their
client.

Notes, on points where this departs from the authors' released code or the paper is silent:

* Step B of a small client normalises by its public batch and discards the resulting running
  statistics, because they are not those of the private images. The released code keeps them, as
  does ``public_batch_stats="shared"``.
* There is no distillation in the first ``kd_warmup_rounds``. A fresh deep network in evaluation
  mode, with initial running statistics, emits logits of order 1e8 and would teach garbage.
* The backward ranking punishes disagreement and is averaged over pairs. In the released code, its
  sign is inverted (see ``fedhelp_jax.losses.reference_code``).
* Optimizer states start anew each round.
* ``local_priors`` is ours: ``class_priors`` describes it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedhelp_jax.algorithms.aggregation import Averaged, average, init_averaged
from fedhelp_jax.algorithms.base import (
    ClientAlgorithm,
    FederatedAlgorithm,
    ServerData,
    Setup,
    client_init_key,
    feature_width,
    init_own,
    init_shared,
)
from fedhelp_jax.algorithms.class_priors import with_local_priors
from fedhelp_jax.algorithms.client import (
    Batch,
    Info,
    PublicBatch,
    Updated,
    gradient_step,
    public_batches,
)
from fedhelp_jax.algorithms.fedhelp_losses import (
    FedHelpSettings,
    answers_loss,
    backward_loss,
    forward_loss,
    with_released_code,
)
from fedhelp_jax.algorithms.local_training import local_epochs, supervised_loss
from fedhelp_jax.algorithms.method import method
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.losses import masked_mean
from fedhelp_jax.models.model import Variables, apply_model
from fedhelp_jax.typing import OptState, PyTree, Upload


class Server(NamedTuple):
    """The server's state: ``w`` and the number of rounds done."""

    averaged: Averaged
    round: jax.Array


class Broadcast(NamedTuple):
    """What clients receive: ``w`` and the number of rounds done."""

    variables: Variables
    round: jax.Array

    def with_network(self, change: Callable[[Variables], Variables]) -> "Broadcast":
        """Returns the same with a changed network."""
        return self._replace(variables=change(self.variables))


class SmallState(NamedTuple):
    """A small client's state between rounds: the surrogate it trained and its public heads psi."""

    surrogate: Variables
    public_heads: Variables


class SmallCarry(NamedTuple):
    """A small client's state within a round."""

    surrogate: Variables
    public_heads: Variables
    opt_private: OptState
    opt_public: OptState


class LargeCarry(NamedTuple):
    """A large client's state within a round."""

    proxy: Variables
    large: Variables
    opt_proxy: OptState
    opt_large: OptState


@method(FedHelpSettings, uses_public=True, uses_teacher=True)
def fedhelp(setup: Setup, settings: FedHelpSettings) -> FederatedAlgorithm:
    """FedHelp: a foundation model and large clients teach small ones.

    Raises:
      UserError: If ``k`` does not fit the number of classes, if the public set offers nothing to
        learn, or if released code is requested where it does not apply.
    """
    settings = with_released_code(setup, settings)
    public = setup.public
    if public is not None and public.num_answers is None and not settings.public_labels:
        raise UserError(
            "algorithm.public_labels: without them and without a teacher nothing public is learned"
        )
    if settings.backward == "kl" and "inverted_ranking" in settings.released_code:
        raise UserError(
            "algorithm.released_code: without a ranking (backward = kl) none is inverted"
        )
    if settings.local_priors and "fresh_heads" in settings.released_code:
        raise UserError("algorithm.local_priors: fresh heads (released_code) have no bias to keep")
    ranked = setup.task.num_ranked(setup.num_classes)
    if settings.k is not None and settings.k >= ranked:
        raise UserError(
            f"algorithm.k: {settings.k} must be less than the {ranked} classes there are"
        )

    def aggregate(
        state: Server,
        uploads: Mapping[str, Upload],
        weights: Mapping[str, jax.Array],
        data: ServerData,
    ) -> Server:
        del data
        return Server(average(setup, state.averaged, uploads, weights), state.round + 1)

    def init(run_key: jax.Array) -> Server:
        return Server(init_averaged(setup, init_shared(setup, run_key)), jnp.int32(0))

    clients = {"small": small_client(setup, settings), "large": large_client(setup, settings)}
    if settings.local_priors:
        clients = {
            role: with_local_priors(setup, client, Broadcast.with_network)
            for role, client in clients.items()
        }
    return FederatedAlgorithm(
        init=init,
        download=lambda state, role: Broadcast(state.averaged.variables, state.round),
        clients=clients,
        aggregate=aggregate,
        mean_only=True,
    )


def small_client(setup: Setup, settings: FedHelpSettings) -> ClientAlgorithm:
    """Returns the small clients: knowledge-guided surrogate training (sec. 3.3)."""
    model = setup.models["small"]

    def init(run_key: jax.Array, client_id: jax.Array) -> SmallState:
        heads = init_public_heads(setup, client_init_key(run_key, client_id))
        return SmallState(init_shared(setup, run_key), heads)

    def update(key: jax.Array, download: Broadcast, state: SmallState, data: ClientData) -> Updated:
        surrogate, public_heads = download.variables, state.public_heads
        if "fresh_heads" in settings.released_code:
            fresh = for_purpose(key, Purpose.CLIENT_INIT)
            head = setup.models["small"].init(fresh, setup.sample_shape)["params"]["head"]
            surrogate = {**surrogate, "params": {**surrogate["params"], "head": head}}
            public_heads = init_public_heads(setup, fresh)
        carry = init_small_carry(setup, settings, surrogate, public_heads)
        next_public = None
        if data.public is not None:
            next_public = public_batches(
                for_purpose(key, Purpose.PUBLIC_BATCHES), data.public, setup.public_batch_size
            )

        def step(carry: SmallCarry, batch: Batch, index: jax.Array) -> tuple[SmallCarry, Info]:
            public = None if next_public is None else next_public(index)
            return small_step(setup, settings, carry, batch, public)

        carry, info = local_epochs(setup, key, step, carry, data)
        return SmallState(carry.surrogate, carry.public_heads), carry.surrogate, info

    def deploy(download: Broadcast, state: SmallState, data: ClientData) -> dict[str, Variables]:
        del data
        return {"personal": state.surrogate, "global": download.variables}

    return ClientAlgorithm({"personal": model, "global": model}, init, update, deploy)


def init_public_heads(setup: Setup, key: jax.Array) -> Variables:
    """Returns psi: heads for the public labels and the answers' classes, or one for both."""
    if setup.public is None:
        return {}
    features = feature_width(setup)
    labels, answers = setup.public.num_labels, setup.public.num_answers
    widths = {"labels": labels, "answers": None if setup.public.shared else answers}
    return {
        name: setup.task.init_head(jax.random.fold_in(key, i), features, width)
        for i, (name, width) in enumerate(widths.items())
        if width is not None
    }


def init_small_carry(
    setup: Setup, settings: FedHelpSettings, surrogate: Variables, public_heads: Variables
) -> SmallCarry:
    """Returns a small client at the start of a round, with an optimizer state for each step."""
    params = surrogate["params"]
    if settings.joint:
        together = setup.tx.init({**params, "public_heads": public_heads})
        return SmallCarry(surrogate, public_heads, together, None)
    public = {"features": params["features"], "public_heads": public_heads}
    return SmallCarry(surrogate, public_heads, setup.tx.init(params), setup.tx.init(public))


def small_step(
    setup: Setup,
    settings: FedHelpSettings,
    carry: SmallCarry,
    batch: Batch,
    public: PublicBatch | None,
) -> tuple[SmallCarry, Info]:
    """Takes a small client's steps A and B on a private and a public batch; A alone without one."""
    stats = carry.surrogate["batch_stats"]
    private_loss = supervised_loss(setup, setup.models["small"], stats, batch)
    if settings.joint and public is not None:
        return _joint_step(setup, settings, carry, private_loss, public)

    params, opt_private, loss, (_, stats) = gradient_step(
        setup.tx, private_loss, carry.surrogate["params"], carry.opt_private
    )
    if public is None:
        surrogate = {"params": params, "batch_stats": stats}
        return carry._replace(surrogate=surrogate, opt_private=opt_private), {"loss": loss}

    trained = {"features": params["features"], "public_heads": carry.public_heads}
    trained, opt_public, auxiliary, stats = gradient_step(
        setup.tx,
        lambda trained: public_loss(setup, settings, trained, stats, public),
        trained,
        carry.opt_public,
    )
    params = {"features": trained["features"], "head": params["head"]}
    surrogate = {"params": params, "batch_stats": stats}
    carry = SmallCarry(surrogate, trained["public_heads"], opt_private, opt_public)
    return carry, {"loss": loss, "public_loss": auxiliary}


def _joint_step(
    setup: Setup,
    settings: FedHelpSettings,
    carry: SmallCarry,
    private_loss: Callable[[Variables], PyTree],
    public: PublicBatch,
) -> tuple[SmallCarry, Info]:
    """Takes one step on L_private + L_public instead of two."""

    def both(params: Variables) -> tuple[jax.Array, PyTree]:
        loss, (_, stats) = private_loss({name: params[name] for name in ("features", "head")})
        auxiliary, stats = public_loss(setup, settings, params, stats, public)
        return loss + auxiliary, (loss, auxiliary, stats)

    params = {**carry.surrogate["params"], "public_heads": carry.public_heads}
    params, opt_state, _, (loss, auxiliary, stats) = gradient_step(
        setup.tx, both, params, carry.opt_private
    )
    public_heads = params.pop("public_heads")
    carry = SmallCarry({"params": params, "batch_stats": stats}, public_heads, opt_state, None)
    return carry, {"loss": loss, "public_loss": auxiliary}


def public_loss(
    setup: Setup,
    settings: FedHelpSettings,
    params: Variables,
    batch_stats: Variables,
    public: PublicBatch,
) -> tuple[jax.Array, Variables]:
    """Returns the mean L_public over a public batch, and the batch statistics to continue with.

    The loss includes the public labels and the foundation model's answers, where there are any.
    """
    task, heads = setup.task, params["public_heads"]
    variables = {"params": {"features": params["features"]}, "batch_stats": batch_stats}
    features, stats = setup.models["small"].features(
        variables, public.images, train=True, mask=None
    )
    loss = jnp.zeros(features.shape[0])
    if public.labels is not None and settings.public_labels:
        loss += task.loss(task.head(heads["labels"], features), public.labels, where=None)
    if public.answers is not None:
        logits = task.head(heads["answers" if "answers" in heads else "labels"], features)
        loss += settings.lambda_fm * answers_loss(setup, settings, logits, public.answers)
    return jnp.mean(loss), batch_stats if settings.public_batch_stats == "discard" else stats


def large_client(setup: Setup, settings: FedHelpSettings) -> ClientAlgorithm:
    """Returns the large clients: asymmetric dual knowledge distillation (sec. 3.4)."""
    model = setup.models["large"]

    def update(key: jax.Array, download: Broadcast, state: Variables, data: ClientData) -> Updated:
        warm = download.round >= settings.kd_warmup_rounds

        def step(carry: LargeCarry, batch: Batch, _: jax.Array) -> tuple[LargeCarry, Info]:
            return large_step(setup, settings, carry, batch, warm)

        carry, info = local_epochs(
            setup, key, step, init_large_carry(setup, download.variables, state), data
        )
        return carry.large, carry.proxy, info

    def deploy(download: Broadcast, state: Variables, data: ClientData) -> dict[str, Variables]:
        del data
        return {"large": state, "global": download.variables}

    return ClientAlgorithm(
        models={"large": model, "global": setup.models["small"]},
        init=lambda run_key, client_id: init_own(setup, model, run_key, client_id),
        update=update,
        deploy=deploy,
    )


def init_large_carry(setup: Setup, proxy: Variables, large: Variables) -> LargeCarry:
    """Returns a large client at the start of a round, with fresh optimizer states."""
    return LargeCarry(proxy, large, setup.tx.init(proxy["params"]), setup.tx.init(large["params"]))


def large_step(
    setup: Setup,
    settings: FedHelpSettings,
    carry: LargeCarry,
    batch: Batch,
    warm: jax.Array | bool = True,
) -> tuple[LargeCarry, Info]:
    """Takes a large client's steps A and B on a private batch; distils only if ``warm``."""
    task, small, large = setup.task, setup.models["small"], setup.models["large"]

    # A mask instead of a factor: 0 times an untrained teacher's overflow would be NaN.
    taught = batch.mask & warm
    teacher_logits, _ = apply_model(large, carry.large, batch.images)
    teacher_loss = masked_mean(
        task.loss(teacher_logits, batch.targets, where=batch.mask), batch.mask
    )
    supervised_proxy = supervised_loss(setup, small, carry.proxy["batch_stats"], batch)

    def proxy_loss(params: Variables) -> tuple[jax.Array, Variables]:
        loss, (logits, stats) = supervised_proxy(params)
        forward = forward_loss(setup, settings, logits, teacher_logits, taught)
        return loss + settings.lambda_f * masked_mean(forward, batch.mask), stats

    params, opt_proxy, proxy_value, stats = gradient_step(
        setup.tx, proxy_loss, carry.proxy["params"], carry.opt_proxy
    )
    proxy = {"params": params, "batch_stats": stats}

    ranking_logits, _ = apply_model(small, proxy, batch.images)
    supervised_large = supervised_loss(setup, large, carry.large["batch_stats"], batch)

    def large_loss(params: Variables) -> tuple[jax.Array, Variables]:
        loss, (logits, stats) = supervised_large(params)
        if "no_large_gradient" in settings.released_code:
            loss = teacher_loss
        backward = backward_loss(setup, settings, logits, ranking_logits, taught)
        return loss + masked_mean(backward, batch.mask), stats

    params, opt_large, large_value, stats = gradient_step(
        setup.tx, large_loss, carry.large["params"], carry.opt_large
    )
    info = {"loss": large_value, "proxy_loss": proxy_value, "teacher_loss": teacher_loss}
    large_variables = {"params": params, "batch_stats": stats}
    return LargeCarry(proxy, large_variables, opt_proxy, opt_large), info
