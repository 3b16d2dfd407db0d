"""Losses of masks against float64 NumPy references written here from the formulas alone.

The headline is the first test: distillation of a mask with one channel has a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedhelp_jax import losses
from fedhelp_jax.losses import segmentation as mask_losses

B = 4
MAPS = [(7,), (4, 5), (3, 2, 4)]
PLANE = MAPS[1]
FLOAT32_RTOL = 2e-5
MARGIN, TEMPERATURE = 0.1, 2.0
distill, rank = mask_losses.mask_distillation_loss, mask_losses.mask_ranking_loss


# --- References: plain float64 NumPy; one channel by its own formulas, not as two classes. ---


def ref_log_softmax(logits):
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def ref_log_sigmoid(s):
    return -np.logaddexp(0.0, -s)


def ref_dice(p, y):
    return 1 - (2 * np.sum(p * y) + 1) / (np.sum(p) + np.sum(y) + 1)


def over_examples(one):
    """A loss of one example's valid pixels [P, C] for a batch; 0 where there are none."""

    def reference(student, teacher, targets, where=None, **settings):
        student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
        where = np.ones(len(student), bool) if where is None else where
        values = []
        for s, t, y, w in zip(student, teacher, np.asarray(targets), where, strict=True):
            w = np.broadcast_to(w, y.shape)
            values.append(one(s[w], t[w], y[w], **settings) if w.any() else 0.0)
        return np.asarray(values)

    return reference


@over_examples
def ref_mask(s, t, y):
    """Mean cross-entropy over pixels plus soft Dice."""
    if s.shape[-1] == 1:
        s = s[:, 0]
        crossed = -(y * ref_log_sigmoid(s) + (1 - y) * ref_log_sigmoid(-s))
        return crossed.mean() + ref_dice(np.exp(ref_log_sigmoid(s)), y)
    log_q = ref_log_softmax(s)
    dice = [ref_dice(np.exp(log_q[:, c]), (y == c) * 1.0) for c in range(1, s.shape[-1])]
    return -np.mean(log_q[np.arange(len(y)), y]) + np.mean(dice)


@over_examples
def ref_distillation(s, t, y, temperature=TEMPERATURE):
    """Mean over pixels of T^2 KL(teacher || student), with 0 log 0 = 0."""
    s, t = s / temperature, t / temperature
    if s.shape[-1] == 1:
        log_p, log_q = (ref_log_sigmoid(np.concatenate([x, -x], axis=-1)) for x in (t, s))
    else:
        log_p, log_q = ref_log_softmax(t), ref_log_softmax(s)
    p = np.exp(log_p)
    return temperature**2 * np.sum(np.where(p > 0, p * (log_p - log_q), 0.0)) / len(s)


@over_examples
def ref_ranking(s, t, y, k=None, margin=MARGIN):
    """Mean over pixels of the mean hinge over pairs of a top and another class."""
    if s.shape[-1] == 1:
        return np.mean(np.maximum(0.0, margin - np.where(t > 0, s, -s)))
    num_classes = s.shape[-1]
    k = num_classes - 1 if k is None else k
    total = 0.0
    for student, teacher in zip(s, t, strict=True):
        order = sorted(range(num_classes), key=lambda c: (-teacher[c], c))
        top, rest = order[:k], order[k:]
        total += sum(max(0.0, margin + (student[r] - student[c])) for c in top for r in rest)
    return total / (k * (num_classes - k)) / len(s)


# --- Every loss as f(student, teacher, targets, where): what holds for all is stated once. ---


def _mask(student, teacher, targets, where=None):
    return mask_losses.mask_loss(student, targets, where=where)


def _distillation(student, teacher, targets, where=None):
    return distill(student, teacher, temperature=TEMPERATURE, where=where)


def _ranking(student, teacher, targets, where=None):
    return rank(student, teacher, k=max(1, student.shape[-1] - 1), margin=MARGIN, where=where)


PLAIN = {"mask": _mask, "distillation": _distillation, "ranking": _ranking}
LOSSES = {name: jax.jit(loss) for name, loss in PLAIN.items()}
REFERENCES = {"mask": ref_mask, "distillation": ref_distillation, "ranking": ref_ranking}
# Gradients of the sum by the student's logits, compiled once for all tests.
GRADIENTS = {
    name: jax.jit(jax.grad(lambda *inputs, loss=loss: jnp.sum(loss(*inputs))))
    for name, loss in PLAIN.items()
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))
channels = pytest.mark.parametrize("num_classes", [1, 2, 3])
one_or_more = pytest.mark.parametrize("num_classes", [1, 3])  # the two ways through the code
both_wheres = pytest.mark.parametrize("pixels", [False, True], ids=["examples", "pixels"])


def example(
    seed, num_classes, spatial=PLANE, scale=3.0, dtype: Any = np.float32, batch=(B,)
) -> Any:
    rng = np.random.default_rng(seed)
    shape = (*batch, *spatial)
    student, teacher = (rng.normal(size=(*shape, num_classes)) * scale for _ in range(2))
    targets = rng.integers(0, max(2, num_classes), size=shape).astype(np.uint8)
    return student.astype(dtype), teacher.astype(dtype), targets


def some_valid(seed, pixels):
    """Of examples or of pixels; nothing of the second example."""
    where = np.random.default_rng(seed).random((B, *PLANE) if pixels else B) < 0.6
    where[0], where[1] = True, False
    return where


def as_two_classes(s):
    return jnp.concatenate([jnp.zeros_like(s), s], axis=-1)


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_distillation_of_a_one_channel_mask_has_the_gradient_of_two_classes_and_not_zero(T):
    """A softmax over one channel is 1 whatever the logit: nothing would be learned from it."""
    with jax.enable_x64(True):
        student, teacher, targets = example(0, 1, dtype=np.float64)
        one_channel = jax.jit(lambda s: distill(s, teacher, temperature=T))

        def two_classes(s):
            pair = (as_two_classes(s), as_two_classes(teacher))
            return jnp.mean(losses.distillation_loss(*pair, temperature=T), axis=(1, 2))

        def softmax_of_one(s):
            return losses.distillation_loss(s, teacher, temperature=T)

        def gradient(loss):
            return np.asarray(jax.jit(jax.grad(lambda s: jnp.sum(loss(s))))(student))

        got = gradient(one_channel)
        assert np.all(got != 0) and np.abs(got).max() > 0.01
        np.testing.assert_array_equal(gradient(softmax_of_one), np.zeros_like(student))
        np.testing.assert_allclose(got, gradient(two_classes), rtol=1e-11)
        # The formula: T (sigmoid(s / T) - sigmoid(t / T)), of a mean over pixels.
        q, p = (np.exp(ref_log_sigmoid(x / T)) for x in (student, teacher))
        np.testing.assert_allclose(got, T * (q - p) / np.prod(PLANE), rtol=1e-11)
        # Central differences at every pixel, of the function and of its reference.
        for i in np.ndindex(PLANE):
            moved = np.zeros_like(student)
            moved[(slice(None), *i)] = 1e-5
            for f in (one_channel, lambda s: ref_distillation(s, teacher, targets, temperature=T)):
                slope = (f(student + moved) - f(student - moved)) / 2e-5
                np.testing.assert_allclose(slope, got[(slice(None), *i, 0)], rtol=1e-5, atol=1e-9)


@every_loss
def test_one_channel_is_two_classes_with_logits_0_and_s(name):
    student, teacher, targets = example(1, 1)
    teacher[:, 0, 0] = 0.0  # equal logits: the background comes first
    where = some_valid(1, pixels=True)

    def two_classes(s):
        return PLAIN[name](as_two_classes(s), as_two_classes(teacher), targets, where)

    got = LOSSES[name](student, teacher, targets, where)
    np.testing.assert_allclose(got, jax.jit(two_classes)(student), rtol=FLOAT32_RTOL)
    gradient = GRADIENTS[name](student, teacher, targets, where)
    expected = jax.jit(jax.grad(lambda s: jnp.sum(two_classes(s))))(student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@every_loss
@channels
@pytest.mark.parametrize("spatial", MAPS, ids=["1D", "2D", "3D"])
def test_equals_the_formula(name, num_classes, spatial):
    inputs = example(2, num_classes, spatial)
    got = LOSSES[name](*inputs)
    assert got.shape == (B,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, REFERENCES[name](*inputs), rtol=FLOAT32_RTOL)


@every_loss
@one_or_more
def test_float64_stays_float64_and_gradients_are_right(name, num_classes):
    with jax.enable_x64(True):
        student, teacher, targets = example(3, num_classes, dtype=np.float64, scale=1.0)
        where = some_valid(3, pixels=True)

        def loss(s):
            return PLAIN[name](s, teacher, targets, where)

        got, expected = jax.jit(loss)(student), REFERENCES[name](student, teacher, targets, where)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        total = jax.jit(lambda s: jnp.sum(jnp.linspace(0.5, 1.5, B) * loss(s)))
        check_grads(total, (student,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


@every_loss
@channels
@pytest.mark.parametrize(("largest", "spatial"), [(1e4, PLANE), (3e38, (1,))])
def test_extreme_logits(name, num_classes, largest, spatial):
    if largest == 3e38:  # as large as leaves the loss, T^2 times a divergence, within float32
        largest /= max(1, num_classes - 1) * (TEMPERATURE if name == "distillation" else 1)
    rng = np.random.default_rng(5)
    *pair, targets = example(5, num_classes, spatial, batch=(16,))
    choices = [-largest, 0.0, largest] if num_classes == 1 else [0.0, largest]
    inputs = (*(rng.choice(choices, size=x.shape).astype(x.dtype) for x in pair), targets)
    expected = REFERENCES[name](*inputs)
    assert expected.max() > largest / 100
    np.testing.assert_allclose(LOSSES[name](*inputs), expected, rtol=FLOAT32_RTOL, atol=1e-6)
    gradient = np.asarray(GRADIENTS[name](*inputs))
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


@every_loss
def test_extreme_logits_of_several_pixels(name):
    student, targets = np.full((B, *PLANE, 1), 8e37, np.float32), np.zeros((B, *PLANE), np.uint8)
    expected = REFERENCES[name](student, -student, targets)
    np.testing.assert_allclose(LOSSES[name](student, -student, targets), expected, rtol=1e-5)


@every_loss
@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(1, jnp.bfloat16), (1, jnp.float16), (3, jnp.bfloat16)]
)
def test_half_precision_is_computed_in_float32(name, num_classes, dtype):
    student, teacher, targets = example(6, num_classes, dtype=dtype)
    got = LOSSES[name](student, teacher, targets)
    assert got.dtype == jnp.float32
    full = (np.asarray(student, np.float32), np.asarray(teacher, np.float32), targets)
    np.testing.assert_allclose(got, REFERENCES[name](*full), rtol=FLOAT32_RTOL)
    assert jax.eval_shape(GRADIENTS[name], student, teacher, targets).dtype == dtype


@every_loss
@one_or_more
@both_wheres
def test_mask_hides_whatever_is_behind_it(name, num_classes, pixels):
    student, teacher, targets = example(7, num_classes)
    where = some_valid(7, pixels)
    valid = where if pixels else np.broadcast_to(where[:, None, None], (B, *PLANE))
    clean_gradient = GRADIENTS[name](student, teacher, targets, valid)
    expected = REFERENCES[name](student, teacher, targets, where)
    for padding in (0.0, 3e38, np.inf, np.nan):
        hidden = [np.where(valid[..., None], x, np.float32(padding)) for x in (student, teacher)]
        # Nor need a masked target be a class.
        padded = (*hidden, np.where(valid, targets, 255), where)
        got = LOSSES[name](*padded)
        assert got[1] == 0.0
        np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL)
        gradient = np.asarray(GRADIENTS[name](*padded))
        np.testing.assert_array_equal(gradient[~valid], 0.0)
        np.testing.assert_allclose(gradient, clean_gradient, rtol=1e-6, atol=1e-8)


@every_loss
@one_or_more
@both_wheres
def test_all_masked_is_zero_with_zero_gradient(name, num_classes, pixels):
    student, teacher, targets = example(8, num_classes)
    where = np.zeros((B, *PLANE) if pixels else B, bool)
    inputs = (np.full_like(student, np.nan), teacher, targets, where)
    np.testing.assert_array_equal(LOSSES[name](*inputs), np.zeros(B))
    np.testing.assert_array_equal(GRADIENTS[name](*inputs), np.zeros_like(student))


@every_loss
@one_or_more
def test_vmap_equals_a_loop(name, num_classes):
    inputs = example(9, num_classes, batch=(3, B))
    inputs = (*inputs, np.stack([some_valid(i, pixels=True) for i in range(3)]))
    got = jax.jit(jax.vmap(PLAIN[name]))(*inputs)
    expected = [LOSSES[name](*(x[i] for x in inputs)) for i in range(3)]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5)


@every_loss
def test_jit_changes_nothing(name):
    # Compiled, log(exp(x)) becomes x and hides the 0 * log 0 of a careless formula.
    inputs = example(10, 1, scale=1e4)
    np.testing.assert_allclose(PLAIN[name](*inputs), LOSSES[name](*inputs), rtol=1e-5)


@one_or_more
@pytest.mark.parametrize("name", ["distillation", "ranking"])
def test_no_gradient_reaches_the_teacher(name, num_classes):
    student, teacher, targets = example(11, num_classes)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(PLAIN[name](student, t, targets))))(teacher)
    np.testing.assert_array_equal(gradient, np.zeros_like(teacher))


def test_soft_dice_by_hand():
    """Probabilities 3/4 and 1/4 of a mask 1, 0: cross-entropy -ln 3/4, Dice (2 3/4 + 1) / 3."""
    logits = np.log([[[3.0], [1 / 3]]]).astype(np.float32)
    got = LOSSES["mask"](logits, logits, np.asarray([[1, 0]]))
    np.testing.assert_allclose(got, [-np.log(3 / 4) + 1 - 2.5 / 3], rtol=1e-6)
    # Certain: right, right of an empty mask, all missed, all of it wrong.
    certain = np.asarray([[60, -60], [-60, -60], [-60, -60], [60, 60]], np.float32)[..., None]
    got = LOSSES["mask"](certain, certain, np.asarray([[1, 0], [0, 0], [1, 1], [0, 0]]))
    np.testing.assert_allclose(got, [0.0, 0.0, 60 + 2 / 3, 60 + 2 / 3], rtol=1e-6, atol=1e-6)


@one_or_more
def test_distillation_temperatures(num_classes):
    student, teacher, targets = example(12, num_classes)
    traced = jax.jit(distill)
    for temperature in (0.5, 1.0, 4.0):
        expected = ref_distillation(student, teacher, targets, temperature=temperature)
        got = traced(student, teacher, temperature=temperature)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        if temperature == 1.0:  # the default
            np.testing.assert_allclose(traced(student, teacher), expected, rtol=1e-4)
    np.testing.assert_allclose(traced(student, student), np.zeros(B), atol=1e-6)


@pytest.mark.parametrize(("num_classes", "k"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_ranking_margins_and_ties_of_the_teacher(num_classes, k):
    student, teacher, targets = example(12, num_classes)
    teacher = np.round(teacher / 3)  # few values, so ties, and negative zeros among them
    assert np.any(np.signbit(teacher) & (teacher == 0))
    loss = jax.jit(rank, static_argnames="k")
    for margin in (0.0, 0.5):
        expected = ref_ranking(student, teacher, targets, k=k, margin=margin)
        got = loss(student, teacher, k=k, margin=margin)
        np.testing.assert_allclose(got, expected, rtol=FLOAT32_RTOL)


def test_ranking_has_no_gradient_at_the_hinge():
    one, two = jnp.asarray([[[0.5], [-0.5]]]), jnp.asarray([[[0.5, 0.0], [0.0, 0.5]]])
    loss = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(rank(s, t, margin=0.5))))
    for student in (one, two):  # of the teacher's order, and ahead by the margin
        value, gradient = loss(student, student)
        assert value == 0.0
        np.testing.assert_array_equal(gradient, np.zeros_like(student))


# --- Refusals ---

ONE, THREE = (np.zeros((B, *PLANE, c), np.float32) for c in (1, 3))
TARGETS = np.zeros((B, *PLANE), np.uint8)
SHAPES = [np.ones(shape, bool) for shape in [(B - 1,), (B, 4), (B, 5, 4), (B, *PLANE, 1), ()]]
OTHERS = [ONE, THREE[:-1], THREE[:, :-1], THREE[..., 0]]
REFUSED: list[tuple[Any, tuple, dict, str]] = [
    *((mask_losses.mask_loss, (THREE, TARGETS), {"where": w}, "where") for w in SHAPES),
    *((loss, (ONE, ONE), {"where": w}, "where") for loss in (distill, rank) for w in SHAPES),
    *((loss, (THREE, t), {}, "teacher_logits") for loss in (distill, rank) for t in OTHERS),
    *(
        (mask_losses.mask_loss, (THREE, y), {}, "targets")
        for y in (TARGETS[:-1], TARGETS[..., None])
    ),
    *((distill, (x, x), {"temperature": 0}, "temperature") for x in (ONE, THREE)),
    (distill, (ONE, ONE), {"temperature": -1.0}, "temperature"),
    *((rank, (ONE, ONE), {"k": k}, r"\bk\b") for k in (0, 2)),
    *((rank, (THREE, THREE), {"k": k}, r"\bk\b") for k in (-1, 0, 3)),
]


@pytest.mark.parametrize(("loss", "inputs", "settings", "message"), REFUSED)
def test_bad_input_is_refused(loss, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        loss(*inputs, **settings)
