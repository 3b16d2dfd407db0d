import hashlib

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fedhelp_jax.teachers.heads import class_vector_logits, linear_probe_logits

COUNT, WIDTH, CLASSES, FOLDS, L2 = 120, 4, 3, 5, 0.01
# L-BFGS stops where no entry of the gradient is above 1e-5, or where the objective hardly falls.
# The objective is 0.01-strongly convex, so that weights are then off by 1e-3 an entry at the most.
# A penalty of 0.011 in place of 0.01 moves these logits by 1e-2.
TOLERANCE = 1e-3


def hashes(embeddings):
    return tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in embeddings)


def folds_of(sha256):
    return np.array([int(sha[:8], 16) % FOLDS for sha in sha256])


@pytest.fixture(scope="module")
def examples():
    """Features of unlike scales and means, one of them constant, and labels that are unbalanced."""
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, COUNT, p=[0.6, 0.3, 0.1]).astype(np.int32)
    features = rng.normal(size=(COUNT, WIDTH)) + 0.7 * np.eye(CLASSES, WIDTH)[labels]
    features = features * [1.0, 50.0, 0.02, 1.0] + [0.0, 30.0, 0.0, -2.0]
    embeddings = np.hstack([features, np.full((COUNT, 1), 7.3)]).astype(np.float32)
    return embeddings, labels, hashes(embeddings)


@pytest.fixture(scope="module")
def answered(examples):
    embeddings, labels, sha256 = examples
    return linear_probe_logits(embeddings, labels, CLASSES, sha256)


def centred(logits):
    """Logits without the constant a row that no softmax sees."""
    return logits - logits.mean(axis=1, keepdims=True)


def cross_fitted(examples, fit):
    """What ``fit(features, labels)`` says of each fold, fitted on the others, standardised."""
    embeddings, labels, sha256 = examples
    folds, logits = folds_of(sha256), np.empty((COUNT, CLASSES))
    for fold in range(FOLDS):
        fitted, asked = folds != fold, folds == fold
        scaler = StandardScaler().fit(embeddings[fitted].astype(np.float64))
        one = fit(scaler.transform(embeddings[fitted].astype(np.float64)), labels[fitted])
        logits[asked] = one(scaler.transform(embeddings[asked].astype(np.float64)))
    return logits


def newton(features, labels):
    """``mean CE + 0.01/2 |W|^2`` minimised by Newton's method in float64."""
    count, width = features.shape
    with_one = np.hstack([features, np.ones((count, 1))])
    targets, penalty = np.eye(CLASSES)[labels], np.append(np.full(width, L2), 0.0)
    weights = np.zeros((width + 1, CLASSES))
    for _ in range(30):
        probs = softmax(with_one @ weights, axis=1)
        gradient = with_one.T @ (probs - targets) / count + penalty[:, None] * weights
        hessian = np.zeros((CLASSES, width + 1, CLASSES, width + 1))
        for i in range(CLASSES):
            for j in range(CLASSES):
                share = probs[:, i] * ((i == j) - probs[:, j]) / count
                hessian[i, :, j] = (with_one * share[:, None]).T @ with_one
            hessian[i, :, i] += np.diag(penalty)
        # Of least norm: a constant for all intercepts changes nothing.
        size = weights.size
        step = np.linalg.lstsq(hessian.reshape(size, size), gradient.T.ravel(), rcond=None)[0]
        weights -= step.reshape(CLASSES, width + 1).T
    assert np.abs(gradient).max() < 1e-12
    return lambda asked: np.hstack([asked, np.ones((len(asked), 1))]) @ weights


def sklearn(features, labels):
    """Its objective is ``C sum CE + |W|^2 / 2``, the intercept free."""
    model = LogisticRegression(C=1 / (L2 * len(labels)), tol=1e-10, max_iter=1000)
    return model.fit(features, labels).decision_function


# --- the linear probe ---


def test_the_probe_is_that_of_newtons_method(examples, answered):
    assert answered.dtype == np.float32 and answered.shape == (COUNT, CLASSES)
    expected = cross_fitted(examples, newton)
    np.testing.assert_allclose(centred(answered), centred(expected), rtol=0, atol=TOLERANCE)


def test_the_probe_is_that_of_scikit_learn(examples, answered):
    expected = cross_fitted(examples, sklearn)
    np.testing.assert_allclose(centred(answered), centred(expected), rtol=0, atol=TOLERANCE)


def test_the_references_could_tell_a_probe_fitted_on_all(examples, answered):
    embeddings, labels, _ = examples
    features = StandardScaler().fit_transform(embeddings.astype(np.float64))
    on_all = newton(features, labels)(features)
    assert np.abs(centred(on_all) - centred(answered)).max() > 50 * TOLERANCE


def test_no_image_is_answered_with_its_own_label(examples, answered):
    """Another label changes the answers about all other folds, and of none in its own."""
    embeddings, labels, sha256 = examples
    folds = folds_of(sha256)
    for place in (0, 17, COUNT - 1):
        flipped = labels.copy()
        flipped[place] = (labels[place] + 1) % CLASSES
        after = linear_probe_logits(embeddings, flipped, CLASSES, sha256)
        same = folds == folds[place]
        np.testing.assert_array_equal(after[same], answered[same])
        assert (after[~same] != answered[~same]).any(axis=1).all()


def test_no_twin_of_an_image_tells_its_label(examples):
    """Identical images fall into one fold, wherever they stand: both labels of one are unseen."""
    embeddings, labels, sha256 = examples
    twice, more = [*range(COUNT), 5, 5], (*sha256, sha256[5], sha256[5])
    answers = linear_probe_logits(embeddings[twice], labels[twice], CLASSES, more)
    np.testing.assert_array_equal(answers[COUNT:], answers[[5, 5]])
    flipped = labels[twice]
    flipped[-1] = (flipped[-1] + 1) % CLASSES
    after = linear_probe_logits(embeddings[twice], flipped, CLASSES, more)
    np.testing.assert_array_equal(after[[5, COUNT, COUNT + 1]], answers[[5, 5, 5]])


def test_the_order_does_not_matter(examples, answered):
    """But for rounding, as sums are taken in another order."""
    embeddings, labels, sha256 = examples
    order = np.random.default_rng(1).permutation(COUNT)
    shuffled = tuple(sha256[i] for i in order)
    after = linear_probe_logits(embeddings[order], labels[order], CLASSES, shuffled)
    np.testing.assert_allclose(after, answered[order], rtol=0, atol=TOLERANCE)


def test_a_class_without_examples_is_possible(examples):
    embeddings, labels, sha256 = examples
    answers = linear_probe_logits(embeddings, labels, CLASSES + 1, sha256, max_iterations=30)
    assert np.isfinite(answers).all()
    assert (answers.argmax(axis=1) < CLASSES).all()


def test_scale_and_offset_of_a_feature_do_not_matter(examples, answered):
    """It is standardised by those that the probe is fitted on; powers of two keep all digits."""
    embeddings, labels, sha256 = examples
    scaled = embeddings * np.array([1, 4, 0.125, 1024, 2], np.float32)
    after = linear_probe_logits(scaled, labels, CLASSES, sha256)
    np.testing.assert_allclose(after, answered, rtol=0, atol=1e-5)


def test_fewer_iterations_fit_more_roughly(examples, answered):
    embeddings, labels, sha256 = examples
    rough = linear_probe_logits(embeddings, labels, CLASSES, sha256, max_iterations=2)
    assert np.abs(rough - answered).max() > 10 * TOLERANCE


def test_one_fold_alone_leaves_nothing_to_fit_on(examples):
    embeddings, labels, sha256 = examples
    first = np.flatnonzero(folds_of(sha256) == 0)[:4]
    hashed = tuple(sha256[i] for i in (*first, first[0]))
    rows = [*first, first[0]]
    with pytest.raises(ValueError, match="^4 distinct images are too few for a linear probe$"):
        linear_probe_logits(embeddings[rows], labels[rows], CLASSES, hashed)
    other = np.flatnonzero(folds_of(sha256) == 3)[:1]
    rows, hashed = [*first, *other], (*hashed[:4], sha256[other[0]])
    answers = linear_probe_logits(embeddings[rows], labels[rows], CLASSES, hashed)
    assert np.isfinite(answers).all()


# --- class vectors ---


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(2).normal(size=(CLASSES, WIDTH + 1)).astype(np.float32)


def test_class_vectors_give_the_scaled_cosine(examples, vectors):
    embeddings = examples[0]
    x, v = embeddings.astype(np.float64), vectors.astype(np.float64)
    expected = np.empty((COUNT, CLASSES))
    for i in range(COUNT):
        for j in range(CLASSES):
            cosine = np.dot(x[i], v[j]) / np.sqrt(np.dot(x[i], x[i]) * np.dot(v[j], v[j]))
            expected[i, j] = 30 * cosine
    logits = class_vector_logits(embeddings, vectors, 30.0)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_lengths_do_not_matter(examples, vectors):
    embeddings = examples[0]
    logits = class_vector_logits(embeddings, vectors, 100.0)
    longer = np.exp(np.linspace(-3, 3, COUNT))[:, None] * embeddings.astype(np.float64)
    np.testing.assert_allclose(class_vector_logits(longer, vectors, 100.0), logits, atol=1e-4)
    longer = vectors.astype(np.float64) * [[0.01], [1.0], [1000.0]]
    np.testing.assert_allclose(class_vector_logits(embeddings, longer, 100.0), logits, atol=1e-4)


def test_half_precision_loses_nothing_on_the_way(examples, vectors):
    """Squares of 300 are beyond float16."""
    half = (300 * np.sign(examples[0])).astype(np.float16)
    logits = class_vector_logits(half, vectors, 100.0)
    np.testing.assert_array_equal(
        logits, class_vector_logits(half.astype(np.float64), vectors, 100.0)
    )
    assert np.isfinite(logits).all()


def test_zero_vectors_stay_finite(vectors):
    embeddings = np.zeros((2, WIDTH + 1), np.float32)
    np.testing.assert_array_equal(class_vector_logits(embeddings, vectors, 100.0), 0.0)
    zeros = np.zeros_like(vectors)
    np.testing.assert_array_equal(class_vector_logits(embeddings + 1, zeros, 100.0), 0.0)


def test_further_axes_are_kept(examples, vectors):
    embeddings = examples[0][:24].reshape(2, 3, 4, -1)
    logits = class_vector_logits(embeddings, vectors, 100.0)
    assert logits.shape == (2, 3, 4, CLASSES)
    flat = class_vector_logits(examples[0][:24], vectors, 100.0)
    np.testing.assert_allclose(logits.reshape(24, CLASSES), flat, rtol=0, atol=1e-5)
