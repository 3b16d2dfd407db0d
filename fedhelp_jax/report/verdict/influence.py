"""Metrics of test examples, with the influence of each example on them.

The influence of an example is by how much the metric would be off if that example were typical of
fewer or more patients than it is: ``estimate - truth`` is about the sum of the influences of
independent examples. Sums of their products are therefore variances and covariances, also between
two models, or two seeds, that are tested on the same examples. For the area under the curve they
are those of DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More Correlated
Receiver Operating Characteristic Curves", Biometrics 44, 1988.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import special


class Estimate(NamedTuple):
    """A metric on test examples.

    Attributes:
      value: The metric; NaN if the examples do not define it.
      examples: ``[n]`` what identifies each example, int64.
      strata: ``[n]`` the class of each example; the numbers in each class are taken as given.
      influence: ``[n]`` influence of each example, which sum to 0 within each class.
      reach: ``[n]`` the influence of an example if two models disagree on it, while they agree on
        all others: one is right and the other wrong, or one ranks it among the middle and the other
        at the end.
    """

    value: float
    examples: np.ndarray
    strata: np.ndarray
    influence: np.ndarray
    reach: np.ndarray

    def minus(self, other: "Estimate") -> "Estimate":
        """Returns the difference of two models' metrics on the same examples.

        Raises:
          ValueError: If the examples or their classes differ.
        """
        ours, theirs = np.argsort(self.examples), np.argsort(other.examples)
        same = len(ours) == len(theirs)
        same = same and np.array_equal(self.examples[ours], other.examples[theirs])
        if not same or not np.array_equal(self.strata[ours], other.strata[theirs]):
            raise ValueError("the two models were not tested on the same examples")
        return Estimate(
            self.value - other.value,
            self.examples[ours],
            self.strata[ours],
            self.influence[ours] - other.influence[theirs],
            self.reach[ours],
        )


def balanced_accuracy(examples: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Estimate:
    """Returns the mean recall over the classes that occur, given ``[n, C]`` logits."""
    return of_answers(examples, labels, np.argmax(logits, axis=-1))


def of_answers(examples: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> Estimate:
    """Returns the mean recall over the classes that occur, given ``[n]`` predicted classes."""
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    right = (answers == labels).astype(float)
    recall = np.bincount(index, right) / counts
    weight = 1 / (len(classes) * counts[index])
    return Estimate(
        float(np.mean(recall)), examples, labels, (right - recall[index]) * weight, weight
    )


def auroc(examples: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Estimate:
    """Returns the area under the ROC curve, one class against the rest.

    As in `fedhelp_jax.metrics.classification_metrics`, it is the mean over the classes that have
    both positives and negatives.
    """
    n, num_classes = logits.shape
    present = [c for c in range(num_classes) if 0 < np.sum(labels == c) < n]
    influence, reach, areas = np.zeros(n), np.zeros(n), []
    for c in present:
        others = np.delete(logits, c, axis=1)
        scores = logits[:, c] - special.logsumexp(others, axis=1)
        positive = labels == c
        own = _placements(scores, positive)
        areas.append(float(np.mean(own[positive])))
        for side in (positive, ~positive):
            influence[side] += own[side] / (side.sum() * len(present))
            reach[side] += 0.5 / (side.sum() * len(present))
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    del classes
    influence -= (np.bincount(index, influence) / counts)[index]
    value = float(np.mean(areas)) if areas else float("nan")
    return Estimate(value, examples, labels, influence, reach)


def _placements(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Returns, for each example, the share of the other side that it is ranked rightly against."""
    found = np.zeros(len(scores))
    for side, sign in ((positive, 1), (~positive, -1)):
        others = np.sort(scores[~side])
        below = np.searchsorted(others, scores[side], "left")
        not_above = np.searchsorted(others, scores[side], "right")
        share = (below + not_above) / (2 * len(others))
        found[side] = share if sign > 0 else 1 - share
    return found


def mean_of_examples(examples: np.ndarray, values: np.ndarray) -> Estimate:
    """Returns the mean of a score in [0, 1] that each example has, such as an image's Dice."""
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    return Estimate(
        mean,
        examples,
        np.zeros(n, np.int64),
        (values - mean) / max(n, 1),
        np.full(n, 1 / max(n, 1)),
    )


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Estimate]] = {
    "auroc": auroc,
    "balanced_accuracy": balanced_accuracy,
}
