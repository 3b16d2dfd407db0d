"""Metrics of test examples, with the influence of each example on them.

The influence of an example is by how much the metric would be off if that example were typical of
fewer or more patients than it is: ``estimate - truth`` is about the sum of the influences of
independent examples. Sums of their products are therefore variances and covariances, also between
two models, or two seeds, that are tested on the same examples. For the area under the curve they
are those of DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More Correlated
Receiver Operating Characteristic Curves", Biometrics 44, 1988.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

# A class is rare if its share of the examples is below this.
RARE = 0.2


class Estimate(NamedTuple):
    """A metric on test examples.

    Attributes:
      value: The metric; NaN if the examples do not define it.
      examples: ``[n]`` what identifies each example, int64.
      strata: ``[n]`` the class of each example; the numbers in each class are taken as given.
      influence: ``[n]`` influence of each example, which sum to 0 within each class.
      reach: ``[n]`` the influence of an example if two models disagree on it, while they agree on
        all others: one is right and the other wrong, one ranks it among the middle and the other at
        the end, or its two scores are as different as those of two images.
    """

    value: float
    examples: np.ndarray
    strata: np.ndarray
    influence: np.ndarray
    reach: np.ndarray

    def has_examples_of(self, other: "Estimate") -> bool:
        """Returns whether another estimate is of the same examples with the same classes."""
        return all(
            np.array_equal(getattr(self, name)[self._order], getattr(other, name)[other._order])
            for name in ("examples", "strata")
        )

    @property
    def fewest(self) -> int:
        """Returns the number of examples in the smallest class."""
        return int(np.unique(self.strata, return_counts=True)[1].min())

    @property
    def _order(self) -> np.ndarray:
        return np.argsort(self.examples)

    def minus(self, other: "Estimate") -> "Estimate":
        """Returns the difference of two models' metrics on the same examples.

        Raises:
          ValueError: If the examples or their classes differ.
        """
        if not self.has_examples_of(other):
            raise ValueError("the two models were not tested on the same examples")
        ours, theirs = self._order, other._order
        return Estimate(
            self.value - other.value,
            self.examples[ours],
            self.strata[ours],
            self.influence[ours] - other.influence[theirs],
            np.maximum(self.reach[ours], other.reach[theirs]),
        )


def balanced_accuracy(examples: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Estimate:
    """Returns the mean recall over the classes that occur, given ``[n, C]`` logits.

    An example with a logit that is not finite is answered wrongly.
    """
    finite = np.isfinite(logits).all(axis=-1)
    return of_answers(examples, labels, np.where(finite, np.argmax(logits, axis=-1), -1))


def of_answers(examples: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> Estimate:
    """Returns the mean recall over the classes that occur, given ``[n]`` predicted classes."""
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    right = (answers == labels).astype(float)
    recall = np.bincount(index, right) / counts
    weight = 1 / (len(classes) * counts[index])
    value = float(np.mean(recall))
    return Estimate(value, examples, labels, _centred(right * weight, labels), weight)


def auroc(examples: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Estimate:
    """Returns the area under the ROC curve, one class against the rest.

    As in `fedhelp_jax.metrics.classification_metrics`, it is the mean over the classes that have
    both positives and negatives, and undefined if a logit is not finite.
    """
    n, num_classes = logits.shape
    present = [c for c in range(num_classes) if 0 < np.sum(labels == c) < n]
    return _mean_over_classes(examples, labels, logits, present, _area)


def average_precision(examples: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Estimate:
    """Returns the average precision of rare classes, one class against the rest.

    With prec(s) the share of positives among the examples that score at least s, it is the mean of
    prec over the positives, as in scikit-learn; then the mean over the classes that have less than
    `RARE` of the examples. It is undefined if there are none, or if a logit is not finite.
    """
    n, num_classes = logits.shape
    rare = [c for c in range(num_classes) if 0 < np.sum(labels == c) < RARE * n]
    return _mean_over_classes(examples, labels, logits, rare, _precision)


def _mean_over_classes(
    examples: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[int],
    of_class: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]],
) -> Estimate:
    """Returns the mean of a metric of scores and positives over classes, each against the rest."""
    n = len(labels)
    influence, reach, values = np.zeros(n), np.zeros(n), []
    if not classes or not np.isfinite(logits).all():
        return Estimate(math.nan, examples, labels, influence, reach)
    for c in classes:
        others = np.delete(logits, c, axis=1)
        scores = logits[:, c] - special.logsumexp(others, axis=1)
        positive = labels == c
        value, own = of_class(scores, positive)
        values.append(value)
        influence += own / len(classes)
        for side in (positive, ~positive):
            reach[side] += 0.5 / (side.sum() * len(classes))
    return Estimate(float(np.mean(values)), examples, labels, _centred(influence, labels), reach)


def _area(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the area under the ROC curve, and the influence of each example on it."""
    own = _placements(scores, positive)
    return float(np.mean(own[positive])), own / np.where(
        positive, positive.sum(), (~positive).sum()
    )


def _precision(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the average precision, and its derivatives by the weights of the examples."""
    order = np.argsort(-scores, kind="stable")
    ranked, hit = scores[order], positive[order].astype(float)
    # Examples with equal scores are above a threshold together.
    last = np.searchsorted(-ranked, -ranked, "right") - 1
    first = np.searchsorted(-ranked, -ranked, "left")
    above = last + 1.0
    precision = np.cumsum(hit)[last] / above
    value = float(np.sum(hit * precision) / hit.sum())
    # Example k counts at the thresholds of all positives that score no more than it.
    total, weighted = (_from_here(hit * x)[first] for x in (1 / above, precision / above))
    found = np.empty(len(scores))
    found[order] = (hit * (precision + total - value) - weighted) / hit.sum()
    return value, found


def _from_here(values: np.ndarray) -> np.ndarray:
    """Returns the sum of each value and all that follow."""
    return np.cumsum(values[::-1])[::-1]


def _placements(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Returns, for each example, the share of the other side that it is ranked rightly against."""
    found = np.zeros(len(scores))
    found[positive] = _share_below(scores[positive], scores[~positive])
    found[~positive] = 1 - _share_below(scores[~positive], scores[positive])
    return found


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the share of others that are below each score; equal ones count half."""
    others = np.sort(others)
    below = np.searchsorted(others, scores, "left")
    return (below + np.searchsorted(others, scores, "right")) / (2 * len(others))


def _centred(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns values less the mean of their class."""
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return values - (np.bincount(index, values) / counts)[index]


def mean_of_examples(examples: np.ndarray, values: np.ndarray) -> Estimate:
    """Returns the mean of a score in [0, 1] that each example has, such as an image's Dice.

    Two models that disagree on an image hardly ever differ by 1 there, so `reach` has the standard
    deviation of the difference of two images' scores. If these scores do not vary, it has 1.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    spread = float(np.std(values, ddof=1)) if n > 1 else 0.0
    reach = math.sqrt(2) * spread if spread > 0 else 1.0
    return Estimate(
        mean,
        examples,
        np.zeros(n, np.int64),
        (values - mean) / max(n, 1),
        np.full(n, reach / max(n, 1)),
    )
