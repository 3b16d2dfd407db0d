"""The release's losses against float64 NumPy references and, where installed, PyTorch itself."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedhelp_jax import losses
from fedhelp_jax.losses import reference_code

B, C, K, T = 6, 8, 5, 2.0
FLOAT32_RTOL = 2e-5


# --- References ---


def ref_log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def ref_ranking(student, teacher, k):
    values = []
    for s, v in zip(np.asarray(student, np.float64), teacher, strict=True):
        order = sorted(range(len(v)), key=lambda c: (-v[c], c))
        pairs = [(t, r) for t in order[:k] for r in order[k:]]
        values.append(sum(max(0.0, s[t] - s[r]) for t, r in pairs) / (2 * k))
    return np.array(values)


def ref_distillation(student, teacher, temperature):
    log_q = ref_log_softmax(np.asarray(student, np.float64) / temperature)
    log_p = ref_log_softmax(np.asarray(teacher, np.float64) / temperature)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1) / student.shape[-1]


def ref_stored(student, stored):
    z = np.asarray(stored, np.float64)
    entropy = np.where(z > 0, z * np.log(np.where(z > 0, z, 1)), 0)
    return np.sum(entropy - z * ref_log_softmax(student), axis=-1) / z.shape[-1]


LOSSES = {
    "ranking": (
        lambda s, t, where=None: reference_code.released_ranking_loss(s, t, k=K, where=where),
        lambda s, t: ref_ranking(s, t, K),
    ),
    "distillation": (
        lambda s, t, where=None: reference_code.released_distillation_loss(
            s, t, temperature=T, where=where
        ),
        lambda s, t: ref_distillation(s, t, T),
    ),
    "stored_logits": (
        lambda s, t, where=None: reference_code.released_stored_logits_loss(s, t, where=where),
        ref_stored,
    ),
}
LOSSES = {name: (jax.jit(loss), reference) for name, (loss, reference) in LOSSES.items()}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def example(seed=0, dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(B, C)) * 3 for _ in range(2))
    return student.astype(dtype), teacher.astype(dtype)


# --- All of them ---


@every_loss
def test_equals_the_formula(name):
    loss, reference = LOSSES[name]
    got = loss(*example(1))
    assert got.shape == (B,)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(*example(1)), rtol=FLOAT32_RTOL, atol=1e-6)
    with jax.enable_x64(True):
        got = np.asarray(loss(*example(1, np.float64)))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference(*example(1, np.float64)), rtol=1e-12)


@every_loss
def test_gradients(name):
    loss, _ = LOSSES[name]
    with jax.enable_x64(True):
        student, teacher = example(2, np.float64)
        weights = jnp.linspace(0.5, 1.5, B)
        check_grads(
            jax.jit(lambda s: jnp.sum(weights * loss(s, teacher))),
            (student,),
            order=1,
            modes=("rev",),
            atol=1e-6,
            rtol=1e-6,
        )


@every_loss
def test_bfloat16_is_computed_in_float32(name):
    loss, _ = LOSSES[name]
    student, teacher = example(3, jnp.bfloat16)
    got = loss(student, teacher)
    assert got.dtype == jnp.float32
    expected = loss(np.asarray(student, np.float32), np.asarray(teacher, np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_loss
@pytest.mark.parametrize("padding", [1e30, np.inf, np.nan])
def test_mask_gives_zero_and_leaves_the_others_alone(name, padding):
    loss, _ = LOSSES[name]
    student, teacher = example(4)
    where = np.array([True, False, True, True, False, True])
    padded = [np.where(where[:, None], x, padding) for x in (student, teacher)]
    np.testing.assert_allclose(
        loss(*padded, where), np.where(where, loss(student, teacher), 0), rtol=1e-6
    )
    total = jax.jit(jax.grad(lambda s, t, w: jnp.sum(loss(s, t, w)), argnums=(0, 1)))
    for got, expected in zip(total(*padded, where), total(student, teacher, where), strict=True):
        np.testing.assert_array_equal(got[~where], 0)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["ranking", "distillation"])
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_extreme_logits(name, magnitude):
    loss, _ = LOSSES[name]
    rng = np.random.default_rng(5)
    choices = [-magnitude, 0.0, magnitude]
    student, teacher = (rng.choice(choices, size=(32, C)).astype(np.float32) for _ in range(2))
    total = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(loss(s, t)), argnums=(0, 1)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(total(student, teacher)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: reference_code.released_ranking_loss(x, x, k=0), "k must be"),
        (lambda x: reference_code.released_ranking_loss(x, x, k=C), "k must be"),
        (lambda x: reference_code.released_distillation_loss(x, x, temperature=0), "temperature"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((B, C)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: reference_code.released_ranking_loss(x, y, k=2),
        reference_code.released_distillation_loss,
        reference_code.released_stored_logits_loss,
        lambda x, y: reference_code.released_large_loss(x, x, y, jnp.zeros(B, int), k=2),
    ],
)
def test_shapes_that_do_not_match_are_refused(call):
    with pytest.raises(ValueError, match="must have shape"):
        call(jnp.zeros((B, C)), jnp.zeros((B, C + 1)))


# --- What is odd about each ---


def test_ranking_punishes_agreement():
    teacher = jnp.array([3.0, 1.0, 2.0, 0.0])
    agreeing, opposing = teacher, -teacher
    ours = [losses.ranking_distillation_loss(s, teacher, k=2) for s in (agreeing, opposing)]
    theirs = [reference_code.released_ranking_loss(s, teacher, k=2) for s in (agreeing, opposing)]
    # Pairs (0, 1), (0, 3), (2, 1), (2, 3) differ by 2, 3, 1, 2: 8 in all. k (C-k) = 2 k = 4.
    np.testing.assert_allclose(ours, [0.0, 2.0])
    np.testing.assert_allclose(theirs, [2.0, 0.0])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_weaker_by_classes_and_temperature(temperature):
    student, teacher = example(6)
    ours = losses.distillation_loss(student, teacher, temperature=temperature)
    theirs = reference_code.released_distillation_loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(theirs, ours / (C * temperature**2), rtol=FLOAT32_RTOL)


def test_stored_probabilities_need_no_softmax_only_where_they_are_probabilities():
    student, teacher = example(7)
    probabilities = jax.nn.softmax(teacher)
    got = reference_code.released_stored_logits_loss(student, probabilities)
    expected = reference_code.released_distillation_loss(student, teacher)
    np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL, atol=1e-6)


def test_only_the_distillation_teaches_its_teacher():
    student, teacher = example(8)
    for name, (loss, _) in LOSSES.items():
        gradient = jax.jit(jax.grad(lambda t, loss=loss: jnp.sum(loss(student, t))))(teacher)
        assert np.any(gradient) == (name == "distillation"), name


def test_no_part_of_the_large_loss_asks_for_the_label():
    large, proxy = example(9)

    @jax.jit
    @jax.grad
    def gradient(logits, labels):
        return sum(
            map(jnp.sum, reference_code.released_large_loss(logits, logits, proxy, labels, k=K))
        )

    got = gradient(large, jnp.zeros(B, int))
    assert np.any(got)
    np.testing.assert_array_equal(got, gradient(large, jnp.full(B, 3)))


# --- PyTorch, where it is installed ---


@pytest.fixture(scope="module")
def kl_div_loss(torch):
    """The release's criterion, ``nn.KLDivLoss()``; it warns of the very mean that it takes."""

    def call(log_q, p):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.nn.KLDivLoss()(log_q, p)

    return call


def torch_ranking(torch, ranked, by, k):
    """The release's pairs, written anew: hinges of ``ranked`` over the ``k`` largest of ``by``."""
    order = torch.argsort(by, dim=1, descending=True)
    top, rest = ranked.gather(1, order[:, :k]), ranked.gather(1, order[:, k:])
    return torch.relu(top[:, :, None] - rest[:, None, :]).sum() / (2 * k)


def assert_same(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_kl_div_loss(torch, kl_div_loss, temperature):
    student, teacher = example(10, np.float64)
    inputs = [torch.tensor(x, requires_grad=True) for x in (student, teacher)]
    expected = kl_div_loss(
        torch.log_softmax(inputs[0] / temperature, 1), torch.softmax(inputs[1] / temperature, 1)
    )
    expected.backward()

    def loss(s, t):
        return jnp.mean(reference_code.released_distillation_loss(s, t, temperature=temperature))

    with jax.enable_x64(True):
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, teacher)
        assert_same(value, expected)
        for got, leaf in zip(grads, inputs, strict=True):
            assert_same(got, leaf.grad)


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_stored_logits_are_kl_div_loss(torch, kl_div_loss, sign):
    student, stored = example(11, np.float64)
    stored = np.abs(stored) if sign == "positive" else stored
    leaf = torch.tensor(student, requires_grad=True)
    expected = kl_div_loss(torch.log_softmax(leaf, 1), torch.tensor(stored))
    expected.backward()
    with jax.enable_x64(True):
        value, grad = jax.jit(
            jax.value_and_grad(
                lambda s: jnp.mean(reference_code.released_stored_logits_loss(s, stored))
            )
        )(student)
        assert_same(grad, leaf.grad)
        if sign == "positive":
            assert_same(value, expected)
        else:  # PyTorch has a gradient there, but no value
            assert np.isfinite(value) and torch.isnan(expected)


def test_large_loss_is_the_release_s(torch, kl_div_loss):
    large_eval, large_train = example(12, np.float64)
    proxy, _ = example(13, np.float64)
    labels = np.random.default_rng(14).integers(0, C, B)
    leaf = torch.tensor(large_train, requires_grad=True)
    expected = (
        torch.nn.CrossEntropyLoss()(torch.tensor(large_eval), torch.tensor(labels))
        + kl_div_loss(torch.log_softmax(torch.tensor(proxy) / T, 1), torch.softmax(leaf / T, 1))
        + 0.2 * torch_ranking(torch, leaf, torch.tensor(proxy), K)
    )
    expected.backward()

    def loss(logits):
        parts = reference_code.released_large_loss(
            large_eval, logits, proxy, labels, k=K, temperature=T
        )
        return (
            jnp.mean(parts.cross_entropy)
            + jnp.mean(parts.distillation)
            + 0.2 * jnp.sum(parts.ranking)
        )

    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(loss))(large_train)
        assert_same(value, expected)
        assert_same(grad, leaf.grad)
