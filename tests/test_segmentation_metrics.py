"""Segmentation: sizes, losses at them, masks and metrics, by sets of pixels and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax import metrics, tasks
from fedhelp_jax.losses import segmentation as mask_losses

NAMES = {
    1: ("lung",),
    2: ("background", "lung"),
    3: ("background", "front", "back"),
    4: ("background", "front", "back", "middle"),
}
TASKS = {num_classes: tasks.segmentation(names) for num_classes, names in NAMES.items()}
METRICS = {num_classes: jax.jit(t.metrics) for num_classes, t in TASKS.items()}
PREDICT = {num_classes: jax.jit(t.predict) for num_classes, t in TASKS.items() if t.predict}
# Sizes of logits and of masks: larger, smaller, mixed, three axes.
SIZES = [((5, 6), (9, 11)), ((12, 9), (5, 4)), ((6, 10), (9, 7)), ((4, 3, 5), (8, 5, 10))]
# One foreground class everywhere; several ways to name classes where rank and direction differ.
CASES = [*((1, *s) for s in SIZES), (3, *SIZES[0]), (2, *SIZES[2]), (3, *SIZES[3])]
N = 5


# --- References ---


def ref_linear(values, shape):
    """Linear resizing of `values[*spatial, C]`, half-pixel centres, antialiased when smaller."""
    values = np.asarray(values, np.float64)
    for axis, new in enumerate(shape):
        old = values.shape[axis]
        stride = old / new
        centres = (np.arange(new) + 0.5) * stride - 0.5
        reach = np.abs(centres[:, None] - np.arange(old)) / max(1.0, stride)
        weights = np.maximum(0.0, 1.0 - reach)
        weights /= weights.sum(axis=1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return values


def ref_predict(logits, shape):
    maps = np.stack([ref_linear(x, shape) for x in logits])
    if maps.shape[-1] == 1:
        assert np.abs(maps).min() > 1e-6, "too near to call"
        return (maps[..., 0] > 0).astype(np.uint8)
    top = np.sort(maps, axis=-1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-6, "too near to call"
    return maps.argmax(axis=-1).astype(np.uint8)


def pixels(classes, wanted):
    return {tuple(place) for place in np.argwhere(np.isin(classes, wanted))}


def ref_metrics(predicted, truth, num_classes):
    """By sets of pixels, an example and a class at a time."""
    foreground = list(range(1, max(2, num_classes)))
    kinds = {} if num_classes < 3 else {NAMES[num_classes][c]: [c] for c in foreground}
    kinds |= {} if num_classes < 3 else {"foreground": foreground}
    found = {"dice": [], "iou": []} | {f"{m}_{k}": [] for m in ("dice", "iou") for k in kinds}
    for p, t in zip(predicted, truth, strict=True):

        def overlap(wanted, p=p, t=t):
            a, b = pixels(p, wanted), pixels(t, wanted)
            if a | b:
                return 2 * len(a & b) / (len(a) + len(b)), len(a & b) / len(a | b)
            return None

        classes = [values for c in foreground if (values := overlap([c]))]
        if classes:
            dice, iou = np.mean(classes, axis=0)
            found["dice"].append(dice)
            found["iou"].append(iou)
        for kind, wanted in kinds.items():
            if values := overlap(wanted):
                found[f"dice_{kind}"].append(values[0])
                found[f"iou_{kind}"].append(values[1])
    return {name: np.mean(values) if values else np.nan for name, values in found.items()}


def certain(masks, num_classes):
    """Logits of whoever predicts these masks, at their own size."""
    if num_classes == 1:
        return np.where(masks == 1, 4.0, -4.0).astype(np.float32)[..., None]
    return 8 * np.eye(num_classes, dtype=np.float32)[masks]


def example(seed, num_classes, size, own, n=N):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, *size, num_classes)).astype(np.float32)
    return logits, rng.integers(0, max(2, num_classes), size=(n, *own)).astype(np.uint8)


def compute(num_classes, logits, targets, mask=None):
    mask = np.ones(len(targets), bool) if mask is None else mask
    got = METRICS[num_classes](logits, targets, mask)
    assert all(value.shape == () and value.dtype == np.float32 for value in got.values())
    return {name: float(value) for name, value in got.items()}


def assert_metrics(got, expected, rtol=1e-6):
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, err_msg=name)


# --- Metrics ---


@pytest.mark.parametrize(("num_classes", "size", "own"), CASES)
def test_masks_and_metrics_at_the_masks_own_resolution(num_classes, size, own):
    logits, targets = example(1, num_classes, size, own)
    expected = ref_predict(logits, own)
    predicted = PREDICT[num_classes](logits, targets)
    assert predicted.dtype == jnp.uint8
    np.testing.assert_array_equal(predicted, expected)
    got = compute(num_classes, logits, targets)
    assert_metrics(got, ref_metrics(expected, targets, num_classes))


@pytest.mark.parametrize("num_classes", [1, 4])
def test_equals_scikit_learn(num_classes):
    sklearn = pytest.importorskip(
        "sklearn.metrics", reason="scikit-learn is not installed: nothing to compare with"
    )
    rng = np.random.default_rng(2)
    _, truth = example(2, num_classes, (), (8, 9))
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.permuted(truth, axis=2))
    got = compute(num_classes, certain(predicted, num_classes), truth)
    foreground = list(range(1, max(2, num_classes)))
    for name, score in (("dice", sklearn.f1_score), ("iou", sklearn.jaccard_score)):
        pairs = [(t.ravel(), p.ravel()) for t, p in zip(truth, predicted, strict=True)]
        classes = np.mean([score(t, p, labels=foreground, average=None) for t, p in pairs], axis=0)
        expected = {name: classes.mean()}
        if num_classes > 2:
            expected |= {f"{name}_{c}": classes[i] for i, c in enumerate(NAMES[num_classes][1:])}
            expected[f"{name}_foreground"] = np.mean([score(t > 0, p > 0) for t, p in pairs])
        assert_metrics({k: v for k, v in got.items() if k.startswith(name)}, expected)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_dice_is_2_iou_over_1_plus_iou_of_one_example(num_classes):
    # A mean over several classes is no such ratio.
    kinds = ["_front", "_back", "_foreground"] if num_classes > 1 else [""]
    logits, targets = example(3, num_classes, *SIZES[0])
    for i in range(N):
        got = compute(num_classes, logits, targets, np.arange(N) == i)
        for kind in kinds:
            iou = got[f"iou{kind}"]
            np.testing.assert_allclose(got[f"dice{kind}"], 2 * iou / (1 + iou), rtol=1e-6)


def test_hand_example():
    """Truth 1 1 2 0, predicted 1 2 2 0: Dice 2/3 of each class, of both as one 1; IoU 1/2 and 1.

    A second example misses class 1 (0) and has no class 2: its mean is over class 1 alone.
    """
    truth = np.asarray([[1, 1, 2, 0], [1, 0, 0, 0]], np.uint8)
    predicted = np.asarray([[1, 2, 2, 0], [0, 0, 0, 0]])
    dice = {"dice": 1 / 3, "dice_front": 1 / 3, "dice_back": 2 / 3, "dice_foreground": 1 / 2}
    iou = {"iou": 1 / 4, "iou_front": 1 / 4, "iou_back": 1 / 2, "iou_foreground": 1 / 2}
    assert_metrics(compute(3, certain(predicted, 3), truth), dice | iou)


def test_empty_masks():
    """Rightly predicted empty: no value. Wrongly not: 0. All empty: nothing to say."""
    empty, full, half = np.zeros((8, 9), int), np.ones((8, 9), int), np.eye(8, 9, dtype=int)
    truth = np.stack([empty, empty, empty, half, full]).astype(np.uint8)
    got = compute(1, certain(np.stack([empty, empty, half, half, empty]), 1), truth)
    assert_metrics(got, {"dice": 1 / 3, "iou": 1 / 3})
    assert_metrics(compute(1, certain(truth, 1), truth), {"dice": 1.0, "iou": 1.0})
    nothing = np.zeros_like(truth)
    for num_classes in (1, 4):
        got = compute(num_classes, certain(nothing, num_classes), nothing)
        assert all(np.isnan(value) for value in got.values())


def test_absent_classes():
    """Nobody's class has no value of its own and takes no part in a mean; one predicted is 0."""
    _, truth = example(3, 4, (), (8, 9))
    truth[truth == 3] = 0
    truth[1][truth[1] == 2] = 0
    predicted = np.roll(truth, 1, axis=2)
    got = compute(4, certain(predicted, 4), truth)
    assert np.isnan(got["dice_middle"]) and np.isnan(got["iou_middle"])
    assert_metrics(got, ref_metrics(predicted, truth, 4))
    predicted[0, 0, 0] = 3
    got = compute(4, certain(predicted, 4), truth)
    assert got["dice_middle"] == got["iou_middle"] == 0.0
    assert_metrics(got, ref_metrics(predicted, truth, 4))


@pytest.mark.slow
def test_pairs_of_many_classes_are_more_than_a_byte_can_count():
    names = tuple(f"c{i}" for i in range(20))
    truth = np.arange(20, dtype=np.uint8).reshape(1, 4, 5)
    got = jax.jit(tasks.segmentation(names).metrics)(certain(truth, 20), truth, np.ones(1, bool))
    assert len(got) == 2 * (1 + 19 + 1)
    assert all(value == 1.0 for value in got.values())


@pytest.mark.parametrize("num_classes", [1, 3])
def test_masked_rows_change_nothing(num_classes):
    logits, targets = example(4, num_classes, (5, 6), (9, 11))
    mask = np.asarray([True, False, True, True, False])
    expected = ref_metrics(ref_predict(logits, (9, 11))[mask], targets[mask], num_classes)
    for padding, target in ((0.0, 0), (100.0, 1), (np.nan, 255)):
        logits[~mask], targets[~mask] = padding, target
        assert_metrics(compute(num_classes, logits, targets, mask), expected)


@pytest.mark.parametrize("n", [0, N])
def test_an_empty_split_is_nan(n):
    logits, targets = example(5, 3, (5, 6), (9, 11), n)
    got = compute(3, logits, targets, np.zeros(n, bool))
    assert len(got) == 8
    assert all(np.isnan(value) for value in got.values())


def test_vmap_over_clients():
    logits, targets = example(6, 3, (5, 6), (9, 11), 2 * N)
    logits, targets = logits.reshape(2, N, 5, 6, 3), targets.reshape(2, N, 9, 11)
    mask = np.asarray([[True, True, False, True, True], [False] * N])
    got = jax.jit(jax.vmap(TASKS[3].metrics))(logits, targets, mask)
    first = {name: value[0] for name, value in got.items()}
    assert_metrics(first, compute(3, logits[0], targets[0], mask[0]))
    assert all(np.isnan(value[1]) for value in got.values())


def test_equal_logits_are_background():
    targets = np.zeros((1, 4, 4), np.uint8)
    for num_classes in (1, 3):
        predicted = PREDICT[num_classes](np.zeros((1, 2, 2, num_classes), np.float32), targets)
        np.testing.assert_array_equal(predicted, targets)
    one_map = jax.jit(functools.partial(metrics.predict_masks, shape=(4, 4)))
    logits = np.asarray([[1.0, -1.0]] * 2, np.float32)[..., None]
    # Between the two centres, the logit falls through 0: 1, 1/2, -1/2, -1.
    np.testing.assert_array_equal(one_map(logits), [[1, 1, 0, 0]] * 4)


# --- Losses at other sizes ---

NATIVE = [((12, 9), (6, 5)), ((30, 40), (12, 12)), ((150, 200), (64, 64)), ((5, 6), (10, 12))]
NATIVE += [((12, 16, 12), (6, 8, 6)), ((9, 7, 6), (4, 5, 8))]


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize(("own", "size"), NATIVE)
def test_the_loss_is_taken_at_the_masks_resolution(own, size, num_classes):
    logits, targets = example(8, num_classes, size, own)
    where = np.asarray([True, False, True, True, False])
    resized = np.stack([ref_linear(x, own) for x in logits]).astype(np.float32)
    expected = jax.jit(mask_losses.mask_loss)(resized, targets, where=where)
    got = jax.jit(TASKS[num_classes].loss)(logits, targets, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("own", "size"), NATIVE)
def test_the_loss_prefers_no_side(own, size):
    """Masks brought to half their size by nearest neighbour all shift the same way."""
    logits, targets = example(7, 1, size, own)
    loss = jax.jit(TASKS[1].loss)
    for axis in range(1, 1 + len(own)):
        mirrored = loss(np.flip(logits, axis), np.flip(targets, axis))
        np.testing.assert_allclose(mirrored, loss(logits, targets), rtol=1e-5)


@pytest.mark.parametrize(("num_classes", "teacher_size", "size"), CASES[:5])
def test_a_teacher_comes_to_the_size_of_the_student_linearly(num_classes, teacher_size, size):
    rng = np.random.default_rng(9)
    teacher = rng.normal(size=(N, *teacher_size, num_classes)).astype(np.float32)
    student = rng.normal(size=(N, *size, num_classes)).astype(np.float32)
    where = np.asarray([True, False, True, True, True])
    resized = np.stack([ref_linear(x, size) for x in teacher]).astype(np.float32)
    expected = jax.jit(mask_losses.mask_distillation_loss)(
        student, resized, temperature=2.0, where=where
    )
    teacher[1] = np.nan  # of an example that is not there
    distill = jax.jit(TASKS[num_classes].distill)
    got = distill(student, teacher, temperature=2.0, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    if teacher_size == SIZES[0][0]:
        gradient = jax.grad(lambda t: jnp.sum(distill(student, t, where=where)))(teacher)
        np.testing.assert_array_equal(gradient, np.zeros_like(teacher))


def test_what_the_task_says_of_itself():
    for num_classes, ranked in ((1, 2), (2, 2), (3, 3)):
        segmentation = TASKS[num_classes]
        assert (segmentation.name, segmentation.headline) == ("segmentation", "dice")
        assert segmentation.num_ranked(num_classes) == ranked
        assert 1 <= segmentation.default_k(num_classes) < ranked
    assert segmentation.rank is mask_losses.mask_ranking_loss


# --- Refusals ---

MAPS = np.zeros((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "other"),
    [
        (TASKS[3].loss, np.zeros((2, 8), np.uint8)),
        (TASKS[3].loss, np.zeros((2, 8, 8, 8), np.uint8)),
        (TASKS[3].distill, np.zeros((2, 8, 8, 1), np.float32)),
        (TASKS[3].distill, np.zeros((2, 8, 3), np.float32)),
        (TASKS[3].distill, np.zeros((2, 8, 8, 8, 3), np.float32)),
        (TASKS[3].rank, np.zeros((2, 8, 8, 3), np.float32)),
        (functools.partial(TASKS[3].metrics, mask=np.ones(2, bool)), np.zeros((3, 4, 4), np.uint8)),
    ],
)
def test_other_shapes_are_refused(call, other):
    with pytest.raises(ValueError):
        call(MAPS, other)


@pytest.mark.parametrize(("call", "shape"), [("loss", (3, 8, 8)), ("distill", (3, 8, 8, 3))])
def test_another_number_of_examples_is_refused(call, shape):
    with pytest.raises(ValueError, match="must have shape"):
        getattr(TASKS[3], call)(MAPS, np.zeros(shape, np.float32))


def test_half_precision_is_resized_in_float32():
    logits, targets = example(10, 1, (12, 9), (31, 33))
    teacher = jnp.asarray(10 * logits, jnp.bfloat16)
    student, full = np.zeros((N, 8, 8, 1), np.float32), np.asarray(teacher, np.float32)
    distill = jax.jit(TASKS[1].distill)
    np.testing.assert_allclose(distill(student, teacher), distill(student, full), rtol=1e-5)
    np.testing.assert_array_equal(PREDICT[1](teacher, targets), PREDICT[1](full, targets))


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_map_that_is_not_finite_is_no_background_that_was_found(num_classes):
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[1, :2] = 1
    logits = np.array(certain(truth, num_classes if num_classes > 1 else 1))
    finite = METRICS[num_classes](logits, truth, np.ones(2, bool))
    assert float(finite["dice"]) == 1.0  # the first has no foreground, so counts for nothing
    logits[0, 1, 1] = np.nan
    got = METRICS[num_classes](logits, truth, np.ones(2, bool))
    assert float(got["dice"]) == float(got["iou"]) == 0.5
    assert (np.asarray(PREDICT[num_classes](logits, truth))[0] == metrics.NO_CLASS).all()
