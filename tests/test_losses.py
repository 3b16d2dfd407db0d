"""Losses against float64 NumPy references that are written here from the formulas alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedhelp_jax import losses

# Compiled as a user would, and much faster to test than one operation at a time.
distillation_loss = jax.jit(losses.distillation_loss, static_argnames="temperature")
ranking_distillation_loss = jax.jit(losses.ranking_distillation_loss, static_argnames="k")
auxiliary_loss = jax.jit(losses.auxiliary_loss, static_argnames="temperature")
asymmetric_dual_distillation = jax.jit(
    losses.asymmetric_dual_distillation, static_argnames=("k", "temperature")
)

B, C, K = 6, 8, 5
FLOAT32_RTOL = 2e-5


# --- References: plain float64 NumPy, one example at a time where that is the clearest. ---


def ref_log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def ref_cross_entropy(logits, labels):
    log_q = ref_log_softmax(logits)
    return -np.take_along_axis(log_q, np.asarray(labels)[..., None], axis=-1)[..., 0]


def ref_distillation(student, teacher, temperature=1.0):
    """T^2 KL( sigma(t/T) || sigma(s/T) ), with 0 log 0 = 0."""
    log_p = ref_log_softmax(np.asarray(teacher, np.float64) / temperature)
    log_q = ref_log_softmax(np.asarray(student, np.float64) / temperature)
    p = np.exp(log_p)
    return temperature**2 * np.sum(np.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def ref_ranking_one(student, teacher, k, margin=0.0):
    """Sum over t in top_k(teacher), r in the rest, of max(0, margin + s_r - s_t), / (k (C-k))."""
    num_classes = len(student)
    order = sorted(range(num_classes), key=lambda c: (-teacher[c], c))
    top, rest = order[:k], order[k:]
    total = sum(max(0.0, margin + (student[r] - student[t])) for t in top for r in rest)
    return total / (k * (num_classes - k))


def ref_ranking(student, teacher, k, margin=0.0):
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    flat = np.vectorize(ref_ranking_one, excluded={2, 3}, signature="(c),(c)->()")
    return flat(student, teacher, k, margin)


# --- Every loss as f(student, teacher, labels, where): what holds for all is stated once. ---


def _cross_entropy(student, teacher, labels, where=None):
    return losses.cross_entropy_loss(student, labels, where=where)


def _distillation(student, teacher, labels, where=None):
    return losses.distillation_loss(student, teacher, temperature=2.0, where=where)


def _ranking(student, teacher, labels, where=None):
    return losses.ranking_distillation_loss(student, teacher, k=K, margin=0.1, where=where)


def _auxiliary(student, teacher, labels, where=None):
    # One shared public head: the same logits answer the labels and the foundation model.
    return losses.auxiliary_loss(
        student, labels, student, teacher, lambda_fm=0.7, temperature=2.0, where=where
    )


def _auxiliary_unlabelled(student, teacher, labels, where=None):
    return losses.auxiliary_loss(
        student, None, student, teacher, lambda_fm=0.7, temperature=2.0, where=where
    )


DUAL = {"lambda_f": 0.7, "lambda_b": 0.3, "k": K, "margin": 0.1, "temperature": 2.0}


def _dual_proxy(student, teacher, labels, where=None):
    return losses.asymmetric_dual_distillation(
        student, teacher, teacher, student, labels, **DUAL, where=where
    ).proxy_loss


def _dual_large(student, teacher, labels, where=None):
    return losses.asymmetric_dual_distillation(
        teacher, student, student, teacher, labels, **DUAL, where=where
    ).large_loss


LOSSES = {
    "cross_entropy": (_cross_entropy, lambda s, t, y: ref_cross_entropy(s, y)),
    "distillation": (_distillation, lambda s, t, y: ref_distillation(s, t, 2.0)),
    "ranking": (_ranking, lambda s, t, y: ref_ranking(s, t, K, 0.1)),
    "auxiliary": (
        _auxiliary,
        lambda s, t, y: ref_cross_entropy(s, y) + 0.7 * ref_distillation(s, t, 2.0),
    ),
    "auxiliary_unlabelled": (
        _auxiliary_unlabelled,
        lambda s, t, y: 0.7 * ref_distillation(s, t, 2.0),
    ),
    "dual_proxy": (
        _dual_proxy,
        lambda s, t, y: ref_cross_entropy(s, y) + 0.7 * ref_distillation(s, t, 2.0),
    ),
    "dual_large": (
        _dual_large,
        lambda s, t, y: ref_cross_entropy(s, y) + 0.3 * ref_ranking(s, t, K, 0.1),
    ),
}
LOSSES = {name: (jax.jit(loss), reference) for name, (loss, reference) in LOSSES.items()}
# Gradients of the sum by the student's logits, compiled once for all tests.
GRADIENTS = {
    name: jax.jit(jax.grad(lambda *inputs, loss=loss: jnp.sum(loss(*inputs))))
    for name, (loss, _) in LOSSES.items()
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def example(seed=0, shape=(B,), scale=3.0, dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(*shape, C)) * scale for _ in range(2))
    labels = rng.integers(0, C, size=shape).astype(np.int32)
    return student.astype(dtype), teacher.astype(dtype), labels


@every_loss
@pytest.mark.parametrize("shape", [(), (B,), (2, 3)])
def test_equals_the_formula(name, shape):
    loss, reference = LOSSES[name]
    inputs = example(1, shape)
    got = loss(*inputs)
    assert got.shape == shape
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(*map(np.asarray, inputs)), rtol=FLOAT32_RTOL)


@every_loss
def test_float64_stays_float64(name):
    loss, reference = LOSSES[name]
    with jax.enable_x64(True):
        inputs = example(2, dtype=np.float64)
        got = np.asarray(loss(*inputs))
        expected = reference(*map(np.asarray, inputs))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@every_loss
def test_gradients(name):
    loss, _ = LOSSES[name]
    with jax.enable_x64(True):
        student, teacher, labels = example(3, dtype=np.float64, scale=1.0)
        weights = jnp.linspace(0.5, 1.5, B)
        check_grads(
            jax.jit(lambda s: jnp.sum(weights * loss(s, teacher, labels))),
            (student,),
            order=1,
            modes=("rev",),
            atol=1e-6,
            rtol=1e-6,
        )


@every_loss
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_extreme_logits(name, magnitude):
    loss, reference = LOSSES[name]
    rng = np.random.default_rng(4)
    student, teacher = (
        rng.choice([-magnitude, 0.0, magnitude], size=(32, C)).astype(np.float32) for _ in range(2)
    )
    labels = rng.integers(0, C, size=32).astype(np.int32)
    got = loss(student, teacher, labels)
    assert np.all(np.isfinite(got))
    expected = reference(*map(np.asarray, (student, teacher, labels)))
    np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL, atol=1e-6)
    assert np.all(np.isfinite(GRADIENTS[name](student, teacher, labels)))


@every_loss
def test_bfloat16_is_computed_in_float32(name):
    loss, _ = LOSSES[name]
    student, teacher, labels = example(5, dtype=jnp.bfloat16)
    got = loss(student, teacher, labels)
    assert got.dtype == jnp.float32
    expected = loss(np.asarray(student, np.float32), np.asarray(teacher, np.float32), labels)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert GRADIENTS[name](student, teacher, labels).dtype == jnp.bfloat16


@every_loss
@pytest.mark.parametrize("padding", [0.0, 1e30, np.inf, np.nan])
def test_mask_gives_zero_and_leaves_the_others_alone(name, padding):
    loss, _ = LOSSES[name]
    student, teacher, labels = example(6)
    where = np.asarray([True, False, True, True, False, True])
    # Padding may hold anything, and a label that is no class.
    valid = where[:, None]
    padded = (np.where(valid, student, padding), np.where(valid, teacher, -padding))
    padded = (*padded, np.where(where, labels, -1), where)
    got, expected = np.asarray(loss(*padded)), np.asarray(loss(student, teacher, labels))
    np.testing.assert_array_equal(got[~where], 0.0)
    np.testing.assert_allclose(got[where], expected[where], rtol=1e-6)
    gradient, expected = GRADIENTS[name](*padded), GRADIENTS[name](student, teacher, labels)
    gradient, expected = np.asarray(gradient), np.asarray(expected)
    np.testing.assert_array_equal(gradient[~where], 0.0)
    np.testing.assert_allclose(gradient[where], expected[where], rtol=1e-6, atol=1e-8)


@every_loss
def test_all_masked_batch_is_zero_with_zero_gradient(name):
    loss, _ = LOSSES[name]
    student, teacher, labels = example(7)
    where = np.zeros(B, bool)

    def mean(s):
        return losses.masked_mean(loss(s, teacher, labels, where), where)

    value, gradient = jax.jit(jax.value_and_grad(mean))(student)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((B, C)))


@every_loss
def test_vmap_equals_a_loop(name):
    loss, _ = LOSSES[name]
    inputs = example(8, (3, B))
    where = np.random.default_rng(8).random((3, B)) < 0.5
    got = jax.vmap(loss)(*inputs, where)
    expected = [loss(*(x[i] for x in inputs), where[i]) for i in range(3)]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-6)


@every_loss
def test_shift_invariance(name):
    # Halves and quarters: the shift is exact in float32, so a float64 tolerance is not needed.
    loss, _ = LOSSES[name]
    student, teacher, labels = example(9)
    student, teacher = np.round(student * 4) / 4, np.round(teacher * 4) / 4
    got = loss(student + 64.0, teacher - 32.0, labels)
    np.testing.assert_allclose(got, loss(student, teacher, labels), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["distillation", "ranking", "auxiliary", "auxiliary_unlabelled", "dual_large"]
)
def test_no_gradient_reaches_the_teacher(name):
    loss, _ = LOSSES[name]
    student, teacher, labels = example(10)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(loss(student, t, labels))))(teacher)
    np.testing.assert_array_equal(gradient, np.zeros((B, C)))


# --- Distillation ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_temperatures(temperature):
    student, teacher, _ = example(11)
    got = distillation_loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(got, ref_distillation(student, teacher, temperature), rtol=1e-4)
    default = distillation_loss(student, teacher)
    np.testing.assert_allclose(default, ref_distillation(student, teacher, 1.0), rtol=1e-4)


def test_distillation_is_finite_without_jit_too():
    # Compiled, log(exp(x)) becomes x and hides the 0 * log 0 of a careless formula.
    student = jnp.asarray([[1e30, -1e30, 0.0]])
    teacher = -student
    loss, gradient = jax.value_and_grad(lambda s: jnp.sum(losses.distillation_loss(s, teacher)))(
        student
    )
    np.testing.assert_allclose(loss, 2e30, rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]])


def test_distillation_of_equal_logits_is_zero():
    student, _, _ = example(12)
    np.testing.assert_allclose(distillation_loss(student, student), 0.0, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(distillation_loss(s, student))))(student)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_distillation_hand_example():
    # Teacher (1/2, 1/2), student (1/4, 3/4): KL = 1/2 log 2 + 1/2 log(2/3) nats.
    student, teacher = np.log([[1.0, 3.0]]), np.zeros((1, 2))
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(distillation_loss(student, teacher), [expected], rtol=1e-6)


# --- Ranking ---


def test_ranking_hand_example():
    """Four classes, k = 2. The teacher's top two are {0, 2}, the rest {1, 3}.

    With s = (1, 2, 0, -1) the terms s_r - s_t are, for (t, r) = (0, 1), (0, 3), (2, 1), (2, 3):
    1, -2, 2, -1. Of these 1 and 2 count: (1 + 2) / (2 * 2) = 0.75. Class 1 is pushed down twice, 0
    and 2 up once each. With margin 1 they are 2, -1, 3, 0: 5 / 4, and the tie at 0 has no gradient.
    """
    teacher = jnp.asarray([3.0, 1.0, 2.0, 0.0])
    student = jnp.asarray([1.0, 2.0, 0.0, -1.0])

    @jax.jit
    def loss(s, margin):
        return ranking_distillation_loss(s, teacher, k=2, margin=margin)

    for margin, expected in [(0.0, 0.75), (1.0, 1.25)]:
        value, gradient = jax.value_and_grad(loss)(student, margin)
        np.testing.assert_allclose(value, expected)
        np.testing.assert_allclose(gradient, [-0.25, 0.5, -0.25, 0.0])


@pytest.mark.parametrize("k", range(1, C))
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_ranking_for_every_k(k, margin):
    student, teacher, _ = example(13)
    got = ranking_distillation_loss(student, teacher, k=k, margin=margin)
    expected = ref_ranking(student, teacher, k, margin)
    np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL, atol=1e-7)


def test_ranking_of_two_classes():
    student = jnp.asarray([[2.0, 0.5], [0.5, 2.0]])
    teacher = jnp.asarray([[1.0, 0.0], [1.0, 0.0]])
    got = ranking_distillation_loss(student, teacher, k=1)
    np.testing.assert_allclose(got, [0.0, 1.5])


def test_ranking_ties_in_top_k_break_by_class_index():
    # Few distinct values, so that nearly every row has a tie across the k-th place.
    rng = np.random.default_rng(14)
    teacher = rng.integers(0, 3, size=(64, C)).astype(np.float32)
    student = rng.normal(size=(64, C)).astype(np.float32)
    for k in (1, 3, 5, 7):
        got = ranking_distillation_loss(student, teacher, k=k)
        expected = ref_ranking(student, teacher, k)
        np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL, atol=1e-7)
    # All equal: the first k classes outrank the others.
    student = jnp.asarray([0.0, 0.0, 1.0, 0.0])
    got = ranking_distillation_loss(student, jnp.zeros(4), k=2)
    np.testing.assert_allclose(got, 0.5)
    # Negative zero is not less than zero.
    got = ranking_distillation_loss(student, jnp.asarray([-0.0, 0.0, 0.0, 0.0]), k=2)
    np.testing.assert_allclose(got, 0.5)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_ranking_has_no_gradient_at_ties(margin):
    # s_t - s_r = margin for every pair: each term stands at its kink.
    teacher = jnp.asarray([[1.0, 1.0, 0.0, 0.0, 0.0]])
    student = jnp.asarray([[margin, margin, 0.0, 0.0, 0.0]])

    def loss(s):
        return jnp.sum(ranking_distillation_loss(s, teacher, k=2, margin=margin))

    value, gradient = jax.value_and_grad(loss)(student)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((1, 5)))


def test_ranking_knows_only_the_order_of_the_teacher():
    student, teacher, _ = example(15)
    expected = ranking_distillation_loss(student, teacher, k=K)
    for monotone in (lambda v: 100 * v, lambda v: v**3, np.tanh):
        got = ranking_distillation_loss(student, monotone(teacher / 8), k=K)
        np.testing.assert_array_equal(got, expected)


# --- Auxiliary and dual ---


def test_auxiliary_has_two_heads_over_two_label_spaces():
    rng = np.random.default_rng(16)
    public = rng.normal(size=(B, 9)).astype(np.float32)
    student, teacher = (rng.normal(size=(B, 17)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 9, size=B).astype(np.int32)
    kl = ref_distillation(student, teacher)
    got = auxiliary_loss(public, labels, student, teacher)
    np.testing.assert_allclose(got, ref_cross_entropy(public, labels) + kl, rtol=FLOAT32_RTOL)
    got = auxiliary_loss(public, None, student, teacher, lambda_fm=0.5)
    np.testing.assert_allclose(got, 0.5 * kl, rtol=FLOAT32_RTOL)
    got = auxiliary_loss(public, labels, student, teacher, lambda_fm=0.0)
    np.testing.assert_allclose(got, ref_cross_entropy(public, labels), rtol=FLOAT32_RTOL)


def four_logits(seed=17):
    rng = np.random.default_rng(seed)
    arrays = [(2 * rng.normal(size=(B, C))).astype(np.float32) for _ in range(4)]
    return arrays, rng.integers(0, C, size=B).astype(np.int32)


def test_dual_distillation_of_four_different_logits():
    (proxy_train, large_eval, large_train, proxy_eval), labels = four_logits()
    inputs = (proxy_train, large_eval, large_train, proxy_eval, labels)
    got = asymmetric_dual_distillation(*inputs, **DUAL)
    proxy_loss = ref_cross_entropy(proxy_train, labels)
    proxy_loss += 0.7 * ref_distillation(proxy_train, large_eval, 2.0)
    large_loss = ref_cross_entropy(large_train, labels)
    large_loss += 0.3 * ref_ranking(large_train, proxy_eval, K, 0.1)
    np.testing.assert_allclose(got.proxy_loss, proxy_loss, rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(got.large_loss, large_loss, rtol=FLOAT32_RTOL)
    # Defaults: lambda_f = 1, lambda_b = 0.2, margin = 0, T = 1.
    got = asymmetric_dual_distillation(*inputs, k=K)
    proxy_loss = ref_cross_entropy(proxy_train, labels) + ref_distillation(proxy_train, large_eval)
    large_loss = ref_cross_entropy(large_train, labels) + 0.2 * ref_ranking(
        large_train, proxy_eval, K
    )
    np.testing.assert_allclose(got.proxy_loss, proxy_loss, rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(got.large_loss, large_loss, rtol=FLOAT32_RTOL)


def test_dual_distillation_stops_the_right_gradients():
    logits, labels = four_logits(18)

    def totals(*four):
        dual = asymmetric_dual_distillation(*four, labels, **DUAL)
        return jnp.sum(dual.proxy_loss), jnp.sum(dual.large_loss)

    proxy_gradients, large_gradients = jax.jit(jax.jacrev(totals, (0, 1, 2, 3)))(*logits)
    for number, gradient in enumerate(proxy_gradients):
        assert np.any(np.asarray(gradient)) == (number == 0), f"proxy loss, logits {number}"
    for number, gradient in enumerate(large_gradients):
        assert np.any(np.asarray(gradient)) == (number == 2), f"large loss, logits {number}"


def test_dual_distillation_with_zero_weights_is_cross_entropy_even_of_garbage_teachers():
    # Warm-up: the weights may be traced, and a fresh large model's logits must not reach the proxy.
    (proxy_train, _, large_train, _), labels = four_logits(19)
    garbage = np.random.default_rng(20).choice([-1e30, 1e30], size=(B, C)).astype(np.float32)

    @jax.jit
    def dual(weight, proxy_train):
        out = asymmetric_dual_distillation(
            *(proxy_train, garbage, large_train, garbage, labels),
            lambda_f=weight,
            lambda_b=weight,
            k=K,
        )
        return out.proxy_loss, out.large_loss

    (proxy_loss, large_loss), pullback = jax.vjp(lambda p: dual(jnp.float32(0), p), proxy_train)
    np.testing.assert_allclose(
        proxy_loss, ref_cross_entropy(proxy_train, labels), rtol=FLOAT32_RTOL
    )
    np.testing.assert_allclose(
        large_loss, ref_cross_entropy(large_train, labels), rtol=FLOAT32_RTOL
    )
    (gradient,) = pullback((jnp.ones(B), jnp.zeros(B)))
    expected = jax.grad(lambda p: jnp.sum(losses.cross_entropy_loss(p, labels)))(proxy_train)
    np.testing.assert_allclose(gradient, expected, rtol=FLOAT32_RTOL, atol=1e-7)


# --- masked_mean ---


def test_masked_mean():
    values = jnp.asarray([1.0, 2.0, 4.0, 100.0])
    where = jnp.asarray([True, True, True, False])
    np.testing.assert_allclose(losses.masked_mean(values, where), 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.masked_mean(values, None), 107 / 4, rtol=1e-6)
    gradient = jax.grad(losses.masked_mean)(values, where)
    np.testing.assert_allclose(gradient, [1 / 3, 1 / 3, 1 / 3, 0.0], rtol=1e-6)
    several = losses.masked_mean(values.reshape(2, 2), where.reshape(2, 2))
    np.testing.assert_allclose(several, 7 / 3, rtol=1e-6)


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    values, where = jnp.asarray([1.0, 2.0]), jnp.zeros(2, bool)
    value, gradient = jax.value_and_grad(losses.masked_mean)(values, where)
    assert value.shape == ()
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(2))


# --- Refusals ---

LOGITS, LABELS = np.zeros((B, C), np.float32), np.zeros(B, np.int32)
OTHER, ONE = np.zeros((B, C + 1), np.float32), np.zeros((B, 1), np.float32)
PAIR, FOUR, SHORT = (LOGITS, LOGITS), (LOGITS,) * 4, np.zeros(B - 1, bool)


@pytest.mark.parametrize(
    ("loss", "inputs", "settings", "message"),
    [
        (losses.cross_entropy_loss, (LOGITS, LABELS[:-1]), {}, "labels"),
        (losses.cross_entropy_loss, (LOGITS, np.int32(0)), {}, "labels"),
        (losses.cross_entropy_loss, (LOGITS, LABELS), {"where": SHORT}, "where"),
        (losses.distillation_loss, (LOGITS, OTHER), {}, "teacher|shape"),
        (losses.distillation_loss, (LOGITS, LOGITS[:-1]), {}, "teacher|shape"),
        (losses.distillation_loss, PAIR, {"where": SHORT}, "where"),
        (losses.distillation_loss, PAIR, {"temperature": 0.0}, "temperature"),
        (losses.distillation_loss, PAIR, {"temperature": -1}, "temperature"),
        (losses.ranking_distillation_loss, (LOGITS, OTHER), {"k": 2}, "teacher|shape"),
        (losses.ranking_distillation_loss, PAIR, {"k": 2, "where": SHORT}, "where"),
        (losses.ranking_distillation_loss, PAIR, {"k": 0}, r"\bk\b"),
        (losses.ranking_distillation_loss, PAIR, {"k": -1}, r"\bk\b"),
        (losses.ranking_distillation_loss, PAIR, {"k": C}, r"\bk\b"),
        (losses.ranking_distillation_loss, PAIR, {"k": C + 1}, r"\bk\b"),
        (losses.ranking_distillation_loss, (ONE, ONE), {"k": 1}, r"\bk\b"),
        (losses.auxiliary_loss, (LOGITS, LABELS[:-1], *PAIR), {}, "labels"),
        (losses.auxiliary_loss, (LOGITS, LABELS, LOGITS, OTHER), {}, "teacher|shape"),
        (losses.auxiliary_loss, (LOGITS, LABELS, *PAIR), {"temperature": 0.0}, "temperature"),
        (losses.asymmetric_dual_distillation, (*FOUR, LABELS), {"k": C}, r"\bk\b"),
        (
            losses.asymmetric_dual_distillation,
            (LOGITS, OTHER, LOGITS, LOGITS, LABELS),
            {"k": 2},
            "teacher|shape",
        ),
        (
            losses.asymmetric_dual_distillation,
            (*FOUR, LABELS),
            {"k": 2, "temperature": -2.0},
            "temperature",
        ),
        (losses.masked_mean, (np.zeros(B), SHORT), {}, "where|shape"),
    ],
)
def test_bad_input_is_refused(loss, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        loss(*inputs, **settings)


# --- PyTorch, where it is installed ---


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pytorch_parity(torch, temperature):
    student, teacher, labels = example(21, (16,))
    torch_student = torch.tensor(np.asarray(student), requires_grad=True)
    torch_teacher = torch.tensor(np.asarray(teacher))
    torch_labels = torch.tensor(np.asarray(labels, np.int64))
    cross_entropy = torch.nn.functional.cross_entropy(torch_student, torch_labels, reduction="none")
    kl = torch.nn.KLDivLoss(reduction="none")(
        torch.log_softmax(torch_student / temperature, -1),
        torch.softmax(torch_teacher / temperature, -1),
    )
    distillation = kl.sum(-1) * temperature**2
    pairs = [
        (cross_entropy, lambda s: losses.cross_entropy_loss(s, labels)),
        (distillation, lambda s: losses.distillation_loss(s, teacher, temperature=temperature)),
    ]
    for expected, loss in pairs:
        (gradient,) = torch.autograd.grad(expected.mean(), torch_student)
        np.testing.assert_allclose(
            loss(student), expected.detach().numpy(), rtol=FLOAT32_RTOL, atol=1e-6
        )
        got = jax.grad(lambda s, loss=loss: losses.masked_mean(loss(s), None))(student)
        np.testing.assert_allclose(got, gradient.numpy(), rtol=1e-4, atol=1e-7)
