"""Metrics against scikit-learn, and against NumPy where scikit-learn has none."""

import warnings

import jax
import numpy as np
import pytest
import scipy.special
from sklearn import metrics as sklearn_metrics

from fedhelp_jax import metrics

NAMES = {"balanced_accuracy", "accuracy", "macro_f1", "auroc", "ece", "loss"}
classification_metrics = jax.jit(metrics.classification_metrics)


def compute(logits, labels, mask=None):
    mask = np.ones(len(labels), bool) if mask is None else mask
    got = classification_metrics(logits, labels, mask)
    assert set(got) == NAMES
    for name, value in got.items():
        assert value.shape == (), name
        assert value.dtype == np.float32, name
    return {name: float(value) for name, value in got.items()}


# --- References ---


def ref_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)


def ref_ece(confidence, correct):
    """Bins (i/15, (i+1)/15]; the mean over examples of |accuracy - confidence| of their bin."""
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            total += inside.sum() * abs(gap)
    return total / len(confidence)


def reference(logits, labels):
    """Scikit-learn's answers, asked so that it has nothing to warn of."""
    sklearn = pytest.importorskip(
        "sklearn.metrics", reason="scikit-learn is not installed: nothing to compare with"
    )
    probs = ref_softmax(logits)
    predicted = logits.argmax(axis=-1)
    present, union = np.unique(labels), np.union1d(labels, predicted)
    areas = [
        sklearn.roc_auc_score(labels == c, probs[:, c])
        for c in range(logits.shape[-1])
        if 0 < np.sum(labels == c) < len(labels)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = {
            # balanced_accuracy_score, which would warn of classes that are only predicted.
            "balanced_accuracy": sklearn.recall_score(
                labels, predicted, labels=present, average="macro"
            ),
            "accuracy": sklearn.accuracy_score(labels, predicted),
            "macro_f1": sklearn.f1_score(
                labels, predicted, labels=union, average="macro", zero_division=0.0
            ),
            "auroc": np.mean(areas) if areas else np.nan,
            "ece": ref_ece(probs.max(axis=-1), (predicted == labels).astype(np.float64)),
            "loss": sklearn.log_loss(labels, probs, labels=np.arange(logits.shape[-1])),
        }
        if len(present) > 1 and len(union) == len(present):
            balanced = sklearn.balanced_accuracy_score(labels, predicted)
            np.testing.assert_allclose(out["balanced_accuracy"], balanced)
        if len(present) == logits.shape[-1] > 2:
            area = sklearn.roc_auc_score(labels, probs, multi_class="ovr", average="macro")
            np.testing.assert_allclose(out["auroc"], area)
    return out


def assert_metrics(got, expected, rtol=1e-5):
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=1e-6, err_msg=name)


def example(seed, n, num_classes, scale=1.5):
    """Logits that know a little of the labels; far from the edges of bins."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, size=n).astype(np.int32)
    logits = rng.normal(size=(n, num_classes)) * scale + 2 * np.eye(num_classes)[labels]
    return logits.astype(np.float32), labels


# --- Tests ---


@pytest.mark.parametrize(("n", "num_classes"), [(200, 8), (200, 2), (60, 5), (5, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed, n, num_classes):
    logits, labels = example(seed, n, num_classes)
    assert_metrics(compute(logits, labels), reference(logits, labels))


def test_many_examples():
    logits, labels = example(5, 5000, 8)
    assert_metrics(compute(logits, labels), reference(logits, labels))


def test_binary_auroc_is_that_of_either_class():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    logits, labels = example(6, 200, 2)
    expected = sklearn.roc_auc_score(labels, ref_softmax(logits)[:, 1])
    np.testing.assert_allclose(compute(logits, labels)["auroc"], expected, rtol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 8])
def test_tied_scores(num_classes):
    # A few distinct rows, each many times: ties within and across classes.
    rng = np.random.default_rng(7)
    rows = (3 * rng.normal(size=(6, num_classes))).astype(np.float32)
    logits = rows[rng.integers(0, 6, size=200)]
    labels = rng.integers(0, num_classes, size=200).astype(np.int32)
    assert_metrics(compute(logits, labels), reference(logits, labels))


@pytest.mark.parametrize("padding", [0.0, 100.0, np.nan])
def test_masked_rows_change_nothing(padding):
    logits, labels = example(8, 60, 5)
    rng = np.random.default_rng(8)
    mask = np.zeros(100, bool)
    mask[rng.choice(100, size=60, replace=False)] = True
    padded = np.full((100, 5), padding, np.float32)
    padded[~mask, 3] += 50.0
    padded[mask] = logits
    # Padding holds labels of every class, and some that are no class.
    padded_labels = rng.integers(-1, 6, size=100).astype(np.int32)
    padded_labels[mask] = labels
    got = compute(padded, padded_labels, mask)
    assert_metrics(got, compute(logits, labels), rtol=1e-6)
    assert_metrics(got, reference(logits, labels))


def test_order_changes_nothing():
    logits, labels = example(9, 60, 5)
    order = np.random.default_rng(9).permutation(60)
    got = compute(logits[order], labels[order])
    assert_metrics(got, compute(logits, labels), rtol=1e-6)


def test_absent_classes():
    # Classes 2 and 5 are nobody's; 5 is predicted now and then, 2 never.
    logits, labels = example(10, 120, 6)
    logits[:, 2] = -30.0
    logits[::7, 5] = 9.0
    keep = (labels != 2) & (labels != 5)
    logits, labels = logits[keep], labels[keep]
    predicted = logits.argmax(axis=-1)
    assert 5 in predicted
    assert 2 not in predicted
    got = compute(logits, labels)
    assert_metrics(got, reference(logits, labels))
    recalls = [np.mean(predicted[labels == c] == c) for c in (0, 1, 3, 4)]
    np.testing.assert_allclose(got["balanced_accuracy"], np.mean(recalls), rtol=1e-5)


def test_hand_example():
    """Labels 0, 0, 1, 1; predictions 0, 2, 1, 1 of three classes, each with confidence p.

    Recalls 1/2 and 1, class 2 absent: balanced accuracy 3/4. F1 of 0, 1, 2: 2/3, 1, 0. All
    confidences share a bin: ECE |3/4 - p|.
    """
    logits = np.float32(4.0) * np.eye(3, dtype=np.float32)[[0, 2, 1, 1]]
    got = compute(logits, np.asarray([0, 0, 1, 1], np.int32))
    np.testing.assert_allclose(got["balanced_accuracy"], 0.75)
    np.testing.assert_allclose(got["accuracy"], 0.75)
    np.testing.assert_allclose(got["macro_f1"], 5 / 9, rtol=1e-6)
    p = np.exp(4) / (np.exp(4) + 2)
    np.testing.assert_allclose(got["ece"], abs(0.75 - p), rtol=1e-5)
    # Class 0: one positive above both negatives, one level with them: 3/4. Class 1: both above: 1.
    np.testing.assert_allclose(got["auroc"], 0.875, rtol=1e-6)
    np.testing.assert_allclose(got["loss"], (-3 * np.log(p) - np.log((1 - p) / 2)) / 4, rtol=1e-5)


@pytest.mark.parametrize("odds", [2, 4])
def test_a_confidence_on_the_edge_belongs_to_the_bin_it_closes(odds):
    """Odds of 2 and 4 are confidences of 10/15 and 12/15, which are also exact in float32.

    Rows on the edge are all right, and those just above it all wrong. If both were in one bin,
    their gaps would nearly cancel.
    """
    edge, above = np.log([[odds, 1]]), np.log([[1.05 * odds, 1]])
    logits = np.concatenate([edge] * 10 + [above] * 10).astype(np.float32)
    labels = np.asarray([0] * 10 + [1] * 10, np.int32)
    expected = (1 / (odds + 1) + 1.05 * odds / (1.05 * odds + 1)) / 2
    np.testing.assert_allclose(compute(logits, labels)["ece"], expected, rtol=1e-5)


def test_perfect_and_certain():
    labels = np.asarray([0, 1, 2, 3, 3], np.int32)
    logits = (1e4 * np.eye(4)[labels]).astype(np.float32)
    got = compute(logits, labels)
    expected = dict.fromkeys(NAMES, 1.0) | {"ece": 0.0, "loss": 0.0}
    assert_metrics(got, expected)


def test_wrong_and_certain_is_finite():
    labels = np.asarray([0, 1, 2, 3, 0], np.int32)
    logits = (1e4 * np.eye(4)[(labels + 1) % 4]).astype(np.float32)
    got = compute(logits, labels)
    expected = {"balanced_accuracy": 0.0, "accuracy": 0.0, "macro_f1": 0.0, "ece": 1.0}
    assert_metrics(got, expected | {"auroc": 1 / 3, "loss": 1e4})


def test_a_constant_model():
    labels = np.asarray([0, 0, 0, 1, 2], np.int32)
    got = compute(np.zeros((5, 4), np.float32), labels)
    # Equal logits predict the first class.
    expected = {"accuracy": 0.6, "balanced_accuracy": 1 / 3, "auroc": 0.5, "ece": 0.35}
    assert_metrics(got, expected | {"macro_f1": 0.25, "loss": np.log(4)})


def test_a_split_of_one_class_has_no_auroc():
    logits, _ = example(11, 60, 5)
    labels = np.full(60, 2, np.int32)
    got = compute(logits, labels)
    assert np.isnan(got["auroc"])
    assert_metrics(got, reference(logits, labels))


@pytest.mark.parametrize("n", [0, 20])
def test_an_empty_split_is_nan(n):
    logits, labels = np.ones((n, 3), np.float32), np.zeros(n, np.int32)
    got = compute(logits, labels, np.zeros(n, bool))
    assert all(np.isnan(value) for value in got.values())


def test_vmap_over_clients():
    logits, labels = example(12, 3 * 40, 4)
    mask = np.random.default_rng(12).random((3, 40)) < 0.7
    mask[2] = False
    logits, labels = logits.reshape(3, 40, 4), labels.reshape(3, 40)
    got = jax.jit(jax.vmap(metrics.classification_metrics))(logits, labels, mask)
    for i in range(2):
        client = {name: value[i] for name, value in got.items()}
        assert_metrics(client, reference(logits[i][mask[i]], labels[i][mask[i]]))
    assert all(np.isnan(value[2]) for value in got.values())


# --- what is not finite, and scores that saturate ---


def test_auroc_ranks_where_probabilities_saturate():
    """Logits 20 to 35 above the rest are all probability 1 in float32, but perfectly ranked."""
    margins = np.linspace(20, 35, 16, dtype=np.float32)
    labels = (np.arange(16) >= 8).astype(np.int32)
    logits = np.stack([np.zeros_like(margins), margins], axis=1)
    for scores in (logits, np.pad(logits, ((0, 0), (0, 2)), constant_values=-5.0)):
        got = classification_metrics(scores, labels, np.ones(16, bool))
        assert float(got["auroc"]) == 1.0


@pytest.mark.parametrize("num_classes", [2, 5])
def test_auroc_is_that_of_log_odds_in_float64(num_classes):
    rng = np.random.default_rng(3)
    logits = (12 * rng.normal(size=(60, num_classes))).astype(np.float32)
    labels = rng.integers(0, num_classes, 60)
    got = classification_metrics(logits, labels, np.ones(60, bool))["auroc"]
    areas = []
    for c in range(num_classes):
        others = np.delete(logits.astype(float), c, axis=1)
        log_odds = logits[:, c] - scipy.special.logsumexp(others, axis=1)
        areas.append(sklearn_metrics.roc_auc_score(labels == c, log_odds))
    assert float(got) == pytest.approx(np.mean(areas), abs=1e-6)
    if num_classes == 2:
        assert areas[0] == pytest.approx(areas[1], abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_a_wrong_answer(bad):
    labels = np.array([0, 0, 1, 1], np.int32)
    logits = np.array([[3, 0], [3, 0], [0, 3], [0, 3]], np.float32)
    logits[1, 0] = bad
    got = classification_metrics(logits, labels, np.ones(4, bool))
    assert float(got["accuracy"]) == 0.75
    assert float(got["balanced_accuracy"]) == 0.75
    # Of class 0 one of two is found, and nothing else is called so; class 1 is perfect.
    assert float(got["macro_f1"]) == pytest.approx((2 / 3 + 1) / 2)
    assert all(np.isnan(float(got[name])) for name in ("auroc", "ece", "loss"))
    masked = classification_metrics(logits, labels, np.array([True, False, True, True]))
    assert float(masked["accuracy"]) == float(masked["auroc"]) == 1.0
