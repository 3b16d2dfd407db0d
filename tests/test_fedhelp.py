"""FedHelp with parts of it turned off is another method; and what each part does to one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ANSWERS,
    BATCH,
    CLASSES,
    PUBLIC,
    PUBLIC_BATCH,
    PUBLIC_CLASSES,
    SIZE,
    assert_trees_close,
    assert_trees_equal,
    build,
    differs,
    on_host,
    row,
    simulate,
    tiny_federation,
    tiny_public,
    tiny_setup,
)

from fedhelp_jax.algorithms.base import PublicSpec
from fedhelp_jax.algorithms.client import Batch, PublicBatch, adam_l2
from fedhelp_jax.algorithms.fedhelp import (
    init_large_carry,
    init_public_heads,
    init_small_carry,
    large_step,
    small_step,
)
from fedhelp_jax.algorithms.fedhelp_losses import FedHelpSettings
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.models.model import apply_model
from fedhelp_jax.tasks import segmentation

ROUNDS = 3
ADAM = adam_l2(1e-2, 1e-3)


# In float32 Adam amplifies rounding, and methods drift apart that compute the same.
pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def history(name, top_n=2, **settings):
    """The states after each of some rounds of Adam, without public images."""
    method = build(name, tiny_setup(tx=ADAM), **settings)
    simulation = simulate(method, tiny_federation(top_n=top_n))
    state, states = simulation.init(), []
    for round in range(ROUNDS):
        state, _ = simulation.round(state, round)
        states.append(on_host(state))
    return states


# --- reductions ---


@pytest.mark.slow
@pytest.mark.parametrize("priors", [False, True])
def test_without_large_clients_and_public_images_it_is_fedavg(priors):
    ours, fedavg = (
        history(name, top_n=0, local_priors=priors)[-1] for name in ("fedhelp", "fedavg")
    )
    assert_trees_close(ours.server.averaged, fedavg.server)
    # What FedAvg's clients keep is what they sent, but for their priors.
    assert_trees_close(ours.clients["small"].surrogate, fedavg.clients["small"])


@pytest.mark.slow
@pytest.mark.parametrize("priors", [False, True])
def test_without_distillation_proxies_are_fedavg_and_large_models_train_alone(priors):
    ours = history("fedhelp", lambda_f=0.0, lambda_b=0.0, local_priors=priors)[-1]
    fedavg = history("fedavg", local_priors=priors)[-1]
    assert_trees_close(ours.server.averaged, fedavg.server)
    assert_trees_close(ours.clients["large"], history("local")[-1].clients["large"])


def test_only_the_ranking_reaches_a_large_model():
    """With it off, W trains alone, while the proxy learns from it."""
    ours = history("fedhelp", lambda_b=0.0)[-1]
    assert_trees_close(ours.clients["large"], history("local")[-1].clients["large"])
    assert differs(ours.server.averaged, history("fedavg")[-1].server)


def test_warm_up_ends_after_its_rounds():
    """Until then lambda_f = lambda_b = 0."""
    assert FedHelpSettings().kd_warmup_rounds == 1
    ours = history("fedhelp", kd_warmup_rounds=2)
    without = history("fedhelp", lambda_f=0.0, lambda_b=0.0)
    for round, (mine, theirs) in enumerate(zip(ours, without, strict=True)):
        if round < 2:
            assert_trees_close(mine, theirs)
        else:
            assert differs(mine.clients["large"], theirs.clients["large"])
            assert differs(mine.server.averaged, theirs.server.averaged)


@pytest.mark.parametrize("k", [CLASSES, CLASSES + 3])
def test_k_must_leave_a_class_to_outrank(k):
    build("fedhelp", tiny_setup(), k=CLASSES - 1)
    with pytest.raises(
        UserError, match=f"algorithm.k: {k} must be less than the {CLASSES} classes"
    ):
        build("fedhelp", tiny_setup(), k=k)


def test_hospitals_deploy_the_broadcast_network_with_their_own_priors():
    algorithm = build("fedhelp", tiny_setup(), local_priors=True)
    federation = tiny_federation()
    download = algorithm.download(algorithm.init(jax.random.key(0)), "small")
    for group in federation.groups:
        client = algorithm.clients[group.role]
        index, size = row(group.train, 0)
        own = ClientData(federation.pool, None, index, size)
        deployed = client.deploy(download, client.init(jax.random.key(0), 0), own)["global"]
        labels = np.asarray(federation.pool.targets)[np.asarray(index)[: int(size)]]
        shares = (np.bincount(labels, minlength=CLASSES) + 1) / (int(size) + CLASSES)
        before = download.variables["params"]["head"]
        after = deployed["params"]["head"]
        np.testing.assert_allclose(after["bias"], before["bias"] + np.log(shares), atol=1e-12)
        np.testing.assert_array_equal(after["kernel"], before["kernel"])


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({}, {"released_code": ("fresh_heads",)}, "fresh heads"),
        ({"task": segmentation(("lesion",)), "num_classes": 1}, {}, "one label each"),
    ],
)
def test_local_priors_are_refused_where_no_head_keeps_them(given, settings, message):
    with pytest.raises(UserError, match=f"algorithm.local_priors: .*{message}"):
        build("fedhelp", tiny_setup(**given), local_priors=True, **settings)


# --- one step of a small client ---


def private_batch(valid=BATCH):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, size=(BATCH, SIZE, SIZE, 3))
    targets = rng.integers(0, CLASSES, size=BATCH)
    return Batch(jnp.asarray(images), jnp.asarray(targets), jnp.arange(BATCH) < valid)


def public_batch():
    rng = np.random.default_rng(1)
    images = rng.uniform(-3, 1, size=(PUBLIC_BATCH, SIZE, SIZE, 3))
    labels = rng.integers(0, PUBLIC_CLASSES, size=PUBLIC_BATCH)
    answers = 2 * rng.normal(size=(PUBLIC_BATCH, ANSWERS))
    return PublicBatch(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(answers))


def small_start(setup, settings):
    key = jax.random.key(0)
    surrogate = setup.models["small"].init(key, setup.sample_shape)
    return init_small_carry(setup, settings, surrogate, init_public_heads(setup, key))


def small_after(public, setup=None, **changes):
    setup = tiny_setup(tx=ADAM, public=PUBLIC) if setup is None else setup
    settings = FedHelpSettings(**changes)
    return small_step(setup, settings, small_start(setup, settings), private_batch(3), public)


@pytest.mark.slow
def test_the_public_step_leaves_the_private_head_and_discards_its_statistics():
    alone, _ = small_after(None)
    both, info = small_after(public_batch())
    assert_trees_equal(both.surrogate["params"]["head"], alone.surrogate["params"]["head"])
    assert_trees_equal(both.opt_private, alone.opt_private)
    assert_trees_equal(both.surrogate["batch_stats"], alone.surrogate["batch_stats"])
    assert differs(both.surrogate["params"]["features"], alone.surrogate["params"]["features"])
    assert differs(both.public_heads, alone.public_heads)
    assert set(info) == {"loss", "public_loss"}


@pytest.mark.slow
def test_shared_statistics_are_moved_by_public_images():
    discard, _ = small_after(public_batch())
    shared, _ = small_after(public_batch(), public_batch_stats="shared")
    assert differs(shared.surrogate["batch_stats"], discard.surrogate["batch_stats"])
    assert_trees_equal(shared.surrogate["params"], discard.surrogate["params"])


def test_the_public_loss_is_the_sum_of_labels_and_answers():
    """CE + lambda_fm T^2 KL from the features as step A left them, in NumPy; each part alone."""
    setup, temperature = tiny_setup(tx=ADAM, public=PUBLIC), 2.0
    public, start = public_batch(), small_start(setup, FedHelpSettings())
    after_a, _ = small_after(None)
    variables = after_a.surrogate
    features, _ = setup.models["small"].features(variables, public.images, train=True)

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    labels, answers = (
        np.asarray(features @ head["kernel"] + head["bias"])
        for head in (start.public_heads["labels"], start.public_heads["answers"])
    )
    ce = -log_softmax(labels)[np.arange(PUBLIC_BATCH), np.asarray(public.labels)].mean()
    teacher = log_softmax(np.asarray(public.answers) / temperature)
    student = log_softmax(answers / temperature)
    kl = temperature**2 * (np.exp(teacher) * (teacher - student)).sum(axis=-1).mean()

    weights = {"temperature": temperature, "lambda_fm": 0.3}
    for batch, expected in (
        (public, ce + 0.3 * kl),
        (public._replace(answers=None), ce),
        (public._replace(labels=None), 0.3 * kl),
    ):
        _, info = small_after(batch, **weights)
        assert info["public_loss"] == pytest.approx(expected, rel=1e-10)


def test_one_head_serves_both_where_the_label_spaces_are_one():
    spec = PublicSpec(num_images=10, num_labels=ANSWERS, num_answers=ANSWERS, shared=True)
    setup = tiny_setup(tx=ADAM, public=spec)
    carry, info = small_after(public_batch(), setup)
    assert list(carry.public_heads) == ["labels"]
    _, of_labels = small_after(public_batch()._replace(answers=None), setup)
    _, of_answers = small_after(public_batch()._replace(labels=None), setup)
    expected = of_labels["public_loss"] + of_answers["public_loss"]
    assert info["public_loss"] == pytest.approx(float(expected), rel=1e-12)


def test_joint_is_one_step_on_the_sum():
    """Against a step written here, with SGD: the update is the gradient of both losses at once."""
    setup = tiny_setup(tx=optax.sgd(0.5), public=PUBLIC)
    batch, public = private_batch(3), public_batch()
    assert public.labels is not None and public.answers is not None
    public_labels, teacher = public.labels, jax.nn.softmax(public.answers)
    carry, info = small_after(public, setup, joint=True)
    start = small_start(setup, FedHelpSettings(joint=True))
    model, stats = setup.models["small"], start.surrogate["batch_stats"]

    def both(params):
        own = {"params": {n: params[n] for n in ("features", "head")}, "batch_stats": stats}
        logits, _ = apply_model(model, own, batch.images[:3], train=True)
        ce = optax.softmax_cross_entropy_with_integer_labels
        private = ce(logits, batch.targets[:3]).mean()
        features, _ = model.features(own, public.images, train=True)
        heads = params["public_heads"]
        labels, answers = (
            features @ heads[n]["kernel"] + heads[n]["bias"] for n in ("labels", "answers")
        )
        kl = optax.losses.kl_divergence(jax.nn.log_softmax(answers), teacher)
        return private + (ce(labels, public_labels) + kl).mean()

    params = {**start.surrogate["params"], "public_heads": start.public_heads}
    total, grads = jax.value_and_grad(both)(params)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    heads = params.pop("public_heads")
    assert_trees_close((carry.surrogate["params"], carry.public_heads), (params, heads))
    assert info["loss"] + info["public_loss"] == pytest.approx(float(total), rel=1e-12)
    alone, _ = small_after(None, setup)
    assert_trees_close(carry.surrogate["batch_stats"], alone.surrogate["batch_stats"])


@pytest.mark.slow
def test_joint_trains():
    """Both losses of a client that fits its few examples fall."""
    setup = tiny_setup(tx=ADAM, public=PUBLIC)
    data = tiny_federation((("only", 8, 0, 1),), top_n=0, public=tiny_public())
    simulation = simulate(build("fedhelp", setup, joint=True), data)
    state, losses = simulation.init(), []
    for round in range(60):
        state, info = simulation.round(state, round)
        losses.append([info.info["small"][name][0] for name in ("loss", "public_loss")])
    losses = np.array(losses)
    assert np.isfinite(losses).all()
    assert (losses[-5:].mean(axis=0) < 0.8 * losses[:5].mean(axis=0)).all(), losses


# --- one step of a large client ---


def large_after(warm=True, teacher_scale=1.0, **changes):
    setup = tiny_setup(tx=ADAM)
    proxy, large = (setup.models[r].init(jax.random.key(1), (SIZE, SIZE, 3)) for r in setup.models)
    head = jax.tree.map(lambda leaf: leaf * teacher_scale, large["params"]["head"])
    large = {**large, "params": {**large["params"], "head": head}}
    carry = init_large_carry(setup, proxy, large)
    return large_step(setup, FedHelpSettings(**changes), carry, private_batch(3), warm)


@pytest.mark.slow
def test_without_warmth_a_large_client_steps_on_cross_entropy_alone():
    cold, cold_info = large_after(warm=False)
    plain, plain_info = large_after(lambda_f=0.0, lambda_b=0.0)
    assert_trees_close((cold, cold_info), (plain, plain_info))
    warm, _ = large_after()
    assert differs(warm.proxy, cold.proxy) and differs(warm.large, cold.large)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_an_untrained_teacher_of_huge_logits_breaks_nothing(warm):
    carry, info = large_after(warm=warm, teacher_scale=1e30)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((carry, info)))
    assert info["teacher_loss"] > 1e20  # and is seen
