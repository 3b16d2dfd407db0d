"""Distances between borders, against all pairwise distances written out."""

import itertools
import math

import numpy as np
import pytest

from fedhelp_jax.metrics import NO_CLASS
from fedhelp_jax.metrics.surface_distance import hd95, surface_metrics


def border_of(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Pixels of the mask next to one outside it, across a face; the world beyond is outside."""
    inside = set(map(tuple, np.argwhere(mask).tolist()))
    border = []
    for pixel in sorted(inside):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            beside = tuple(x + step * (i == axis) for i, x in enumerate(pixel))
            if beside not in inside:
                border.append(pixel)
                break
    return border


def reference(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The definition, with every distance; both masks have pixels."""
    p, t = np.array(border_of(predicted), float), np.array(border_of(truth), float)
    apart = np.sqrt(((p[:, None] - t[None]) ** 2).sum(-1))
    pooled = np.sort(np.concatenate([apart.min(1), apart.min(0)]))
    position = 0.95 * (len(pooled) - 1)
    low = int(position)
    high = min(low + 1, len(pooled) - 1)
    return float(pooled[low] + (position - low) * (pooled[high] - pooled[low]))


def blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A few balls, which may overlap, hang over the edge, or hold a hole."""
    grid = np.stack(np.indices(shape), axis=-1)
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(1, 4)):
        centre, radius = rng.uniform(0, shape), rng.uniform(0.7, max(shape) / 3)
        away = np.linalg.norm(grid - centre, axis=-1)
        mask |= (away <= radius) & (away >= rng.choice([0, radius / 2]))
    mask[tuple(rng.integers(0, shape))] = True
    return mask


@pytest.mark.parametrize(
    "shape", [(40,), (1, 30), (23, 17), (16, 31), (9, 12, 7), (1, 8, 9)], ids=str
)
def test_equals_all_pairwise_distances(shape):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(30):
        predicted, truth = blobs(rng, shape), blobs(rng, shape)
        expected = reference(predicted, truth)
        assert hd95(predicted, truth) == pytest.approx(expected, abs=1e-12)
        assert hd95(truth, predicted) == hd95(predicted, truth)
        found.append(expected)
    assert len(set(found)) > 10


def test_noise_whose_borders_are_everywhere():
    rng = np.random.default_rng(1)
    for share in (0.02, 0.5, 0.98):
        predicted, truth = rng.random((2, 14, 15)) < share
        assert hd95(predicted, truth) == pytest.approx(reference(predicted, truth), abs=1e-12)


def test_lines_of_one_dimension():
    predicted, truth = np.zeros((2, 50), bool)
    predicted[10:20], truth[14:31] = True, True
    # Borders 10, 19 and 14, 30: distances 4, 5 and 4, 11. The 95th percentile of four values
    # lies 0.85 of the way from the third to the fourth.
    assert hd95(predicted, truth) == pytest.approx(5 + 0.85 * 6)


def test_the_interior_counts_for_nothing():
    truth = np.zeros((20, 20), bool)
    truth[2:18, 2:18] = True
    hollow = truth.copy()
    hollow[3:17, 3:17] = False
    assert hd95(hollow, truth) == 0


def test_equal_masks_are_0_apart():
    rng = np.random.default_rng(2)
    for shape in [(12,), (12, 9), (6, 7, 8)]:
        mask = blobs(rng, shape)
        assert hd95(mask, mask) == 0
        full = np.ones(shape, bool)
        assert hd95(full, full) == 0


def test_single_pixels_are_their_distance_apart():
    predicted, truth = np.zeros((2, 10, 12), bool)
    predicted[1, 2], truth[4, 6] = True, True
    assert hd95(predicted, truth) == 5
    predicted, truth = np.zeros((2, 5, 6, 7), bool)
    predicted[0, 0, 0], truth[4, 5, 6] = True, True
    assert hd95(predicted, truth) == pytest.approx(math.sqrt(77))


def test_few_far_pixels_are_forgiven_and_many_are_not():
    truth = np.zeros((60, 60), bool)
    truth[5:25, 5:25] = True
    few = truth.copy()
    few[55, 55] = True
    assert hd95(few, truth) == 0
    many = truth.copy()
    many[55, 30:50] = True
    assert hd95(many, truth) > 25


def test_empty_masks():
    full, none = np.ones((30, 40), bool), np.zeros((30, 40), bool)
    assert math.isnan(hd95(none, none))
    assert hd95(full, none) == hd95(none, full) == 50
    corners = np.zeros((2, 30, 40), bool)
    corners[0, 0, 0] = corners[1, -1, -1] = True
    assert hd95(*corners) < 50
    assert hd95(np.ones((3, 4, 12)), np.zeros((3, 4, 12))) == 13


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        hd95(np.ones((3, 4)), np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(2, 4\)"):
        surface_metrics(np.ones((1, 4), np.uint8), np.ones((2, 4), np.uint8), ("a",))


# --- many examples ------------------------------------------------------------------------------


def class_masks(rng, number, shape, classes):
    masks = np.zeros((number, *shape), np.uint8)
    for mask in masks:
        for label in range(1, classes):
            mask[blobs(rng, shape)] = label
    return masks


@pytest.mark.parametrize("names", [("lung",), ("background", "lung")], ids=str)
def test_one_foreground_class(names):
    rng = np.random.default_rng(3)
    predicted, truth = class_masks(rng, 5, (15, 18), 2), class_masks(rng, 5, (15, 18), 2)
    got = surface_metrics(predicted, truth, names)
    expected = np.mean([reference(p > 0, t > 0) for p, t in zip(predicted, truth, strict=True)])
    assert got == {"hd95": pytest.approx(expected, abs=1e-12)}


def test_several_classes():
    rng = np.random.default_rng(4)
    predicted, truth = class_masks(rng, 4, (10, 11, 9), 3), class_masks(rng, 4, (10, 11, 9), 3)
    got = surface_metrics(predicted, truth, ("background", "anterior", "posterior"))

    def mean(choose):
        pairs = zip(predicted, truth, strict=True)
        return np.mean([reference(choose(p), choose(t)) for p, t in pairs])

    front, back = mean(lambda mask: mask == 1), mean(lambda mask: mask == 2)
    expected = {
        "hd95": (front + back) / 2,
        "hd95_anterior": front,
        "hd95_posterior": back,
        "hd95_foreground": mean(lambda mask: mask > 0),
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-12), key
    assert got["hd95_foreground"] != pytest.approx(got["hd95"])


def test_what_is_undefined_is_left_out_of_the_means():
    names = ("background", "a", "b", "c")
    truth = np.zeros((3, 30, 40), np.uint8)
    truth[0, 5:10, 5:10] = truth[1, 5:10, 5:10] = 1
    predicted = truth.copy()
    predicted[1] = 0  # a is missed here: the diagonal
    predicted[2, 0, 0] = 2  # b is seen where there is none: the diagonal
    got = surface_metrics(predicted, truth, names)
    assert got["hd95_a"] == pytest.approx((0 + 50) / 2)  # not the third example
    assert got["hd95_b"] == 50
    assert math.isnan(got["hd95_c"])
    assert got["hd95"] == pytest.approx((0 + 50 + 50) / 3)  # each example has one class
    assert got["hd95_foreground"] == pytest.approx((0 + 50 + 50) / 3)


def test_an_example_of_many_classes_weighs_no_more_than_one_of_few():
    truth = np.zeros((2, 30, 40), np.uint8)
    truth[0, 5, 5], truth[0, 9, 9], truth[1, 5, 5] = 1, 2, 1
    predicted = np.zeros_like(truth)
    predicted[1, 5, 8] = 1
    got = surface_metrics(predicted, truth, ("background", "a", "b"))
    assert got["hd95"] == pytest.approx((50 + 3) / 2)
    assert got["hd95_a"] == pytest.approx((50 + 3) / 2)
    assert got["hd95_b"] == 50


def test_nothing_anywhere_is_nan_without_a_warning():
    nothing = np.zeros((2, 6, 6), np.uint8)
    assert all(math.isnan(v) for v in surface_metrics(nothing, nothing, ("bg", "a", "b")).values())
    assert math.isnan(surface_metrics(nothing, nothing, ("a",))["hd95"])
    none = nothing[:0]
    assert math.isnan(surface_metrics(none, none, ("a",))["hd95"])


def test_a_map_without_an_answer_is_as_far_as_can_be():
    truth = np.zeros((2, 30, 40), np.uint8)
    truth[:, 5:10, 5:10] = 1
    predicted = truth.copy()
    predicted[1] = NO_CLASS
    assert surface_metrics(predicted, truth, ("a",))["hd95"] == pytest.approx((0 + 50) / 2)
