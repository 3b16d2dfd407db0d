"""Measures how far the border of a predicted mask is from the true one, on the host.

The overlap of masks (Dice) hardly changes when a few distant pixels are wrong, but these distances
do. They are NaN where undefined.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from fedhelp_jax.metrics import NO_CLASS


def hd95(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns the 95 % Hausdorff distance of two masks, as MedPy defines it.

    The border of a mask consists of its pixels that have a neighbour across a face outside the
    mask; beyond the image is outside. The distances from every border pixel of either mask to the
    nearest border pixel of the other are pooled. The result is their 95th percentile, with linear
    interpolation.

    Args:
      predicted: Boolean mask of any rank.
      truth: Boolean mask of the same shape.

    Returns:
      A distance in pixels of the mask; NaN if both masks are empty. If only one is empty, there is
      no distance, but leaving the example out would reward it. It therefore counts as the diagonal
      of the image, which is more than the distance of any two of its pixels.

    Reference:
      D. P. Huttenlocher, G. A. Klanderman, W. J. Rucklidge, "Comparing images using the Hausdorff
      distance", IEEE TPAMI 15(9), 1993; the percentile and the pooling are those of
      ``medpy.metric.binary.hd95``.

    Example:
      >>> truth = np.zeros((8, 8), bool)
      >>> truth[2:5, 2:5] = True
      >>> hd95(np.roll(truth, 2, axis=1), truth)
      2.0
    """
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape}")
    empty = not predicted.any(), not truth.any()
    if all(empty):
        return np.nan
    if any(empty):
        return float(np.linalg.norm(truth.shape))
    # Only the box around both masks matters, and most of an image is outside it.
    inside = np.nonzero(predicted | truth)
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in inside)
    borders = [_border(mask[box]) for mask in (predicted, truth)]
    distances = [
        np.asarray(ndimage.distance_transform_edt(~there))[here]
        for here, there in (borders, reversed(borders))
    ]
    return float(np.percentile(np.concatenate(distances), 95))


def surface_metrics(
    predicted: np.ndarray, truth: np.ndarray, label_names: Sequence[str]
) -> dict[str, float]:
    """Returns the mean `hd95` of the examples for which it is defined, or NaN if there are none.

    Args:
      predicted: uint8 ``[n, *mask]``, the class of each pixel. Where a network gave no answer, all
        pixels are `metrics.NO_CLASS`, which counts as the diagonal of the image, as in `hd95`.
      truth: uint8 ``[n, *mask]``.
      label_names: One name for one foreground class, else those of all classes, background first.

    Returns:
      ``hd95``: the mean over an example's foreground classes. With two or more of them, also
      ``hd95_<name>`` of each, and ``hd95_foreground`` of all of them merged into one.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape}")
    pairs = list(zip(predicted, truth, strict=True))

    def distance(predicted: np.ndarray, truth: np.ndarray, classes: Sequence[int]) -> float:
        if (predicted == NO_CLASS).any():
            return float(np.linalg.norm(truth.shape))
        return hd95(np.isin(predicted, classes), np.isin(truth, classes))

    numbers = range(1, max(2, len(label_names)))
    foreground = [distance(p, t, numbers) for p, t in pairs]
    if len(label_names) <= 2:
        return {"hd95": _mean(foreground)}
    by_example = [[distance(p, t, [number]) for number in numbers] for p, t in pairs]
    return {
        "hd95": _mean(map(_mean, by_example)),
        **{
            f"hd95_{label_names[number]}": _mean(
                of_classes[number - 1] for of_classes in by_example
            )
            for number in numbers
        },
        "hd95_foreground": _mean(foreground),
    }


def _border(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else np.nan
