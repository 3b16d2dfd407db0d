"""FedHelp's ablations and the switches of the released code: each changes what it says, no more.

What one step trains is compared with the gradient of a loss written out here.
"""

import jax
import jax.numpy as jnp
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
    tiny_federation,
    tiny_public,
    tiny_setup,
)

from fedhelp_jax.algorithms.client import Batch, PublicBatch
from fedhelp_jax.algorithms.fedhelp import (
    init_large_carry,
    init_public_heads,
    init_small_carry,
    large_step,
    small_step,
)
from fedhelp_jax.algorithms.fedhelp_losses import RELEASED_CODE, FedHelpSettings, with_released_code
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.experiments.config import default_config, validate
from fedhelp_jax.models.model import apply_model
from fedhelp_jax.tasks import segmentation

RATE, T, K = 0.1, 2.0, 2
LAMBDA_FM, LAMBDA_F, LAMBDA_B = 0.7, 0.6, 0.3
VALID = 3  # of the private batch
pytestmark = pytest.mark.usefixtures("float64")


def settings(**changes):
    given = {"temperature": T, "k": K, "lambda_fm": LAMBDA_FM}
    given |= {"lambda_f": LAMBDA_F, "lambda_b": LAMBDA_B} | changes
    return FedHelpSettings(**given)


def given_setup():
    return tiny_setup(tx=optax.sgd(RATE), public=PUBLIC)


def networks(setup):
    keys = jax.random.split(jax.random.key(3))
    return {
        role: model.init(key, (SIZE, SIZE, 3))
        for key, (role, model) in zip(keys, setup.models.items(), strict=True)
    }


def private_batch():
    key = jax.random.key(5)
    images = jax.random.normal(key, (BATCH, SIZE, SIZE, 3))
    return Batch(images, jnp.arange(BATCH) % CLASSES, jnp.arange(BATCH) < VALID)


def public_batch():
    keys = jax.random.split(jax.random.key(6))
    images = jax.random.normal(keys[0], (PUBLIC_BATCH, SIZE, SIZE, 3))
    answers = 2 * jax.random.normal(keys[1], (PUBLIC_BATCH, ANSWERS))
    return PublicBatch(images, jnp.arange(PUBLIC_BATCH) % PUBLIC_CLASSES, answers)


def stepped(params, loss):
    return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params))


# --- the losses, written out ---


def cross_entropy(logits, labels):
    return jnp.mean(jnp.log(jnp.exp(logits).sum(-1)) - logits[jnp.arange(len(labels)), labels])


def divergence(teacher, student, temperature=T):
    """KL(teacher || student) of each example, without T^2."""
    p, q = jax.nn.softmax(teacher / temperature), jax.nn.softmax(student / temperature)
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)


def pairs(student, teacher, sign):
    """Sum over an example's pairs of max(0, sign (s_r - s_t)), t of the teacher's largest K."""
    total = []
    for s, v in zip(student, teacher, strict=True):
        order = jnp.argsort(-v)
        hinges = [jnp.maximum(0, sign * (s[r] - s[t])) for t in order[:K] for r in order[K:]]
        total.append(sum(hinges))
    return jnp.array(total)


def ranking(s, v):
    return LAMBDA_B * jnp.mean(pairs(s, v, 1)) / (K * (CLASSES - K))


def inverted(s, v):
    return LAMBDA_B * jnp.sum(pairs(s, v, -1)) / (2 * K)


LARGE_LOSSES = {
    "as it is": ({}, lambda s, v, y: cross_entropy(s, y) + ranking(s, v)),
    "backward as full KL": (
        {"backward": "kl"},
        lambda s, v, y: cross_entropy(s, y) + LAMBDA_B * T**2 * jnp.mean(divergence(v, s)),
    ),
    "inverted_ranking": (
        {"released_code": ("inverted_ranking",)},
        lambda s, v, y: cross_entropy(s, y) + inverted(s, v),
    ),
    "no_large_gradient": (
        {"released_code": ("no_large_gradient",)},
        lambda s, v, y: ranking(s, v),
    ),
    "undetached_teacher": (
        {"released_code": ("undetached_teacher",)},
        lambda s, v, y: (
            cross_entropy(s, y) + ranking(s, v) + LAMBDA_F * T**2 * jnp.mean(divergence(s, v))
        ),
    ),
    "all": (
        {"released_code": ("all",)},
        lambda s, v, y: inverted(s, v) + LAMBDA_F * jnp.mean(divergence(s, v)) / CLASSES,
    ),
}


def large_after(**changes):
    """``(networks before, carry after, setup)`` of a large client's two steps."""
    setup = given_setup()
    start = networks(setup)
    chosen = with_released_code(setup, settings(**changes))
    carry = init_large_carry(setup, start["small"], start["large"])
    carry, _ = large_step(setup, chosen, carry, private_batch())
    return start, carry, setup


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_LOSSES)
def test_what_a_large_model_learns(name):
    changes, loss = LARGE_LOSSES[name]
    start, after, setup = large_after(**changes)
    images, labels, mask = private_batch()
    proxy_logits, _ = apply_model(setup.models["small"], after.proxy, images)

    def by_hand(params):
        variables = {**start["large"], "params": params}
        logits, _ = apply_model(setup.models["large"], variables, images, train=True, mask=mask)
        return loss(logits[:VALID], proxy_logits[:VALID], labels[:VALID])

    assert_trees_close(after.large["params"], stepped(start["large"]["params"], by_hand))
    _, plain, _ = large_after()
    assert differs(after.large["params"], plain.large["params"]) == (name != "as it is")
    # The proxy took its step before, and the statistics are those of the same batch.
    assert_trees_equal(after.large["batch_stats"], plain.large["batch_stats"])
    if name != "all":
        assert_trees_equal(after.proxy, plain.proxy)


@pytest.mark.slow
@pytest.mark.parametrize("released", [(), ("mean_kl",)])
def test_what_a_proxy_learns(released):
    start, after, setup = large_after(released_code=released)
    images, labels, mask = private_batch()
    teacher, _ = apply_model(setup.models["large"], start["large"], images)
    scale = 1 / CLASSES if released else T**2

    def by_hand(params):
        variables = {**start["small"], "params": params}
        logits, _ = apply_model(setup.models["small"], variables, images, train=True, mask=mask)
        distilled = jnp.mean(divergence(teacher[:VALID], logits[:VALID]))
        return cross_entropy(logits[:VALID], labels[:VALID]) + LAMBDA_F * scale * distilled

    assert_trees_close(after.proxy["params"], stepped(start["small"]["params"], by_hand))


def raw(z, logits):
    """Sum over classes of z (log z - log q), log z left out where z is not positive."""
    log_z = jnp.where(z > 0, jnp.log(jnp.where(z > 0, z, 1)), 0)
    return jnp.mean(jnp.sum(z * (log_z - jnp.log(jax.nn.softmax(logits))), axis=-1))


def answered(z, q):
    return T**2 * jnp.mean(divergence(z, q))


SMALL_LOSSES = {
    "as it is": ({}, lambda ce, z, q: ce + LAMBDA_FM * answered(z, q)),
    "foundation logits only": (
        {"public_labels": False},
        lambda ce, z, q: LAMBDA_FM * answered(z, q),
    ),
    "mean_kl": (
        {"released_code": ("mean_kl",)},
        lambda ce, z, q: ce + LAMBDA_FM * jnp.mean(divergence(z, q)) / ANSWERS,
    ),
    "raw_answers": (
        {"released_code": ("raw_answers",)},
        lambda ce, z, q: ce + LAMBDA_FM * raw(z, q),
    ),
    "all": ({"released_code": ("all",)}, lambda ce, z, q: LAMBDA_FM * raw(z, q) / ANSWERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_LOSSES)
def test_what_a_small_client_learns_from_public_images(name):
    changes, loss = SMALL_LOSSES[name]
    setup = given_setup()
    start, heads = networks(setup)["small"], init_public_heads(setup, jax.random.key(8))
    chosen = with_released_code(setup, settings(**changes))
    carry = init_small_carry(setup, chosen, start, heads)
    private, _ = small_step(setup, chosen, carry, private_batch(), None)
    after, _ = small_step(setup, chosen, carry, private_batch(), public_batch())
    images, labels, answers = public_batch()

    def by_hand(trained):
        variables = {**private.surrogate, "params": {"features": trained["features"]}}
        features, _ = setup.models["small"].features(variables, images, train=True, mask=None)
        said = {n: features @ h["kernel"] + h["bias"] for n, h in trained["heads"].items()}
        return loss(cross_entropy(said["labels"], labels), answers, said["answers"])

    before = {"features": private.surrogate["params"]["features"], "heads": heads}
    expected = stepped(before, by_hand)
    assert_trees_close(after.public_heads, expected["heads"])
    assert_trees_close(after.surrogate["params"]["features"], expected["features"])
    assert_trees_equal(after.surrogate["params"]["head"], private.surrogate["params"]["head"])
    # "all" shares the statistics of the public images; nothing else touches them.
    assert differs(after.surrogate["batch_stats"], private.surrogate["batch_stats"]) == (
        name == "all"
    )


@pytest.mark.slow
@pytest.mark.parametrize("released", [(), ("fresh_heads",)])
def test_fresh_heads_are_made_anew_each_round(released):
    """Without training: the private head and the public ones change, the features do not."""
    setup = given_setup()._replace(tx=optax.sgd(0.0))
    method = build("fedhelp", setup, released_code=released)
    client = method.clients["small"]
    state = client.init(jax.random.key(0), jnp.int32(2))
    server = method.init(jax.random.key(0))
    download = method.download(server, "small")
    federation = tiny_federation(public=tiny_public())
    group = next(group for group in federation.groups if group.role == "small")
    train = jax.tree.map(lambda leaf: leaf[0], group.train)
    data = ClientData(federation.pool, federation.public, *train)
    uploads = {}
    for round in range(2):
        kept, uploads[round], _ = client.update(jax.random.key(round), download, state, data)
        assert differs(kept.public_heads, state.public_heads) == bool(released)
        sent, had = uploads[round]["params"], download.variables["params"]
        assert differs(sent["head"], had["head"]) == bool(released)
        assert_trees_equal(sent["features"], had["features"])
    heads = [upload["params"]["head"] for upload in uploads.values()]
    assert differs(*heads) == bool(released)


def test_all_is_every_oddity_and_the_three_that_are_settings():
    chosen = with_released_code(given_setup(), settings(released_code=("all",)))
    assert chosen == settings(
        released_code=RELEASED_CODE,
        public_labels=False,
        public_batch_stats="shared",
        kd_warmup_rounds=0,
    )


def test_released_code_is_of_classification():
    setup = given_setup()._replace(task=segmentation(("lesion",)), public=None, num_classes=1)
    with pytest.raises(UserError, match="algorithm.released_code: there is none of segmentation"):
        build("fedhelp", setup, released_code=("mean_kl",))


def test_a_public_set_must_leave_something_to_learn():
    setup = given_setup()._replace(public=PUBLIC._replace(num_answers=None))
    with pytest.raises(UserError, match="algorithm.public_labels"):
        build("fedhelp", setup, public_labels=False)


def test_what_is_no_ranking_cannot_be_inverted():
    with pytest.raises(UserError, match="algorithm.released_code: without a ranking"):
        build("fedhelp", given_setup(), backward="kl", released_code=("all",))


def test_names_of_oddities_are_checked():
    config = default_config()
    config.algorithm.released_code = ("mean_kl", "all")
    assert validate(config).algorithm.settings.released_code == ("mean_kl", "all")
    config.algorithm.released_code = ("mean-kl",)
    with pytest.raises(UserError, match="released_code.*some of all, inverted_ranking"):
        validate(config)
