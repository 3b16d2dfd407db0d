"""Heads that turn a foundation model's embeddings into logits: class vectors or a linear probe."""

import numpy as np
from scipy import optimize, special

_FOLDS = 5
_L2 = 1e-2


def class_vector_logits(
    embeddings: np.ndarray, class_vectors: np.ndarray, scale: float
) -> np.ndarray:
    """Returns ``scale * cos(embedding, class vector)``, like CLIP's zero-shot classifier.

    Args:
      embeddings: float ``[..., D]``; they need not be normalised.
      class_vectors: float ``[P, D]``, such as embeddings of class names; they need not be
        normalised.
      scale: Factor that multiplies the cosine; CLIP uses 100.

    Returns:
      float32 ``[..., P]`` logits.

    References:
      Radford et al., CLIP, ICML 2021, arXiv:2103.00020, sec. 3.1.
    """
    unit, vectors = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        for x in (embeddings.astype(np.float64), class_vectors.astype(np.float64))
    )
    return (scale * unit @ vectors.T).astype(np.float32)


def linear_probe_logits(
    embeddings: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    sha256: tuple[str, ...],
    *,
    max_iterations: int = 200,
) -> np.ndarray:
    """Returns the logits of cross-fitted linear probes.

    A probe is a multinomial logistic regression on standardised features in float64. It minimises
    ``mean CE + 0.01/2 |W|^2`` by L-BFGS. The hash of an example's image determines its fold, one of
    five, so identical images share a fold. A probe fitted on the other four folds answers each
    fold. On its own training examples, a probe would repeat their labels with more confidence than
    it can have on any new image.

    Args:
      embeddings: float ``[M, D]``.
      labels: int ``[M]`` in ``0..num_classes-1``.
      num_classes: ``P``.
      sha256: ``[M]`` hex hash of each example's image.
      max_iterations: Maximum number of L-BFGS iterations; fewer are faster but fit less closely.

    Returns:
      float32 ``[M, P]`` logits.

    Raises:
      ValueError: If all examples fall into one fold, so that there is nothing to fit on.
    """
    folds = np.array([int(sha[:8], 16) % _FOLDS for sha in sha256])
    if len(set(folds.tolist())) < 2:
        raise ValueError(f"{len(set(sha256))} distinct images are too few for a linear probe")
    features = embeddings.astype(np.float64)
    logits = np.zeros((len(labels), num_classes), np.float32)
    for fold in range(_FOLDS):
        fitted, asked = folds != fold, folds == fold
        if asked.any():
            mean, deviation = features[fitted].mean(axis=0), features[fitted].std(axis=0)
            deviation = np.where(deviation > 0, deviation, 1.0)
            weights = _fit(
                (features[fitted] - mean) / deviation, labels[fitted], num_classes, max_iterations
            )
            logits[asked] = _affine((features[asked] - mean) / deviation, weights)
    return logits


def _fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, max_iterations: int
) -> np.ndarray:
    """Returns weights ``[D + 1, P]``; the intercept is the last row and is not regularised."""
    count, width = features.shape
    targets = np.eye(num_classes)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(width + 1, num_classes)
        log_probs = special.log_softmax(_affine(features, weights), axis=1)
        value = -np.sum(targets * log_probs) / count + 0.5 * _L2 * np.sum(weights[:-1] ** 2)
        error = (np.exp(log_probs) - targets) / count
        gradient = np.vstack([features.T @ error + _L2 * weights[:-1], error.sum(axis=0)])
        return float(value), gradient.ravel()

    start = np.zeros((width + 1) * num_classes)
    options = {"maxiter": max_iterations}
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(width + 1, num_classes)


def _affine(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return features @ weights[:-1] + weights[-1]
