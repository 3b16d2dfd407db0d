"""Transforms against float64 NumPy and SciPy references that are written here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_faster import AS_FOR_USERS
from scipy import ndimage

from fedhelp_jax import transforms
from fedhelp_jax.core.compilation import compile_totals

PLANES, VOLUMES = (5, 12, 10, 3), (3, 6, 9, 8, 1)
AUGMENTATIONS = transforms.AUGMENTATIONS
# Compiled as a training step is. Its draws are compared with draws that are not fused.
augment = jax.jit(transforms.augment, static_argnames="names", compiler_options=AS_FOR_USERS)


def pixels(shape, seed=0):
    """uint8, each image of another brightness and each channel of another colour."""
    rng = np.random.default_rng(seed)
    top = rng.uniform(60, 255, (shape[0], *(1 for _ in shape[2:]), shape[-1]))
    return (rng.beta(1, 2, shape) * top).astype(np.uint8)


def floats(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(3, 2, shape), jnp.float32)


def smooth(shape, seed=0):
    """Float images whose neighbouring pixels are alike, so that warps are well defined."""
    noise = np.random.default_rng(seed).normal(size=shape)
    sigmas = (0, *(max(2.0, side / 10) for side in shape[1:-1]), 0)
    return ndimage.gaussian_filter(noise, sigmas, mode="nearest") * 10


def assert_rounded(found, exact):
    """`found` are the pixels next to `exact`; ties may fall to either side."""
    assert found.dtype == np.uint8
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=0.5 + 1e-3)


# --- References: plain float64, one image at a time. ---


def ref_constancy(image, power=6):
    x = image.astype(np.float64)
    light = np.mean(x**power, axis=(0, 1)) ** (1 / power)
    return np.clip(x / (np.sqrt(3) * light / np.linalg.norm(light)), 0, 255)


def ref_percentiles(image, low=0.5, high=99.5):
    """In 0..1."""
    x = image.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    bottom, top = np.percentile(x, low, axis=axes), np.percentile(x, high, axis=axes)
    return (np.clip(x, bottom, top) - bottom) / (top - bottom)


def ref_z_score(image):
    x = image.astype(np.float64)
    return (x - x.mean()) / x.std()


def ref_resize_axis(x, axis, new):
    """Triangles about the new pixels' centres, as wide as the larger of both steps."""
    old = x.shape[axis]
    weights = np.zeros((new, old))
    for i in range(new):
        for j in range(old):
            away = abs((i + 0.5) / new - (j + 0.5) / old) * min(old, new)
            weights[i, j] = max(0, 1 - away)
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)


def ref_sources(grid, sides, angles, scale, shift):
    """Where each place of a grid comes from, in its own pixels, one place at a time."""

    def one(place):
        step = np.array(sides) / grid  # a pixel of the grid, in pixels of the image
        centre = (np.array(sides) - 1) / 2
        v = (np.array(place) + 0.5) * step - 0.5 - centre - shift * np.array(sides)
        v = v / scale
        # The inverse of turning in each plane, the last turn first: turns back in their order.
        turns = [(0, 1)] if len(sides) == 2 else [(0, 1), (0, 2), (1, 2)]
        for angle, (a, b) in zip(angles, turns, strict=True):
            along, across = v[a], v[b]
            v[a] = np.cos(angle) * along + np.sin(angle) * across
            v[b] = -np.sin(angle) * along + np.cos(angle) * across
        return (v + centre + 0.5) / step - 0.5

    return np.stack([one(place) for place in np.ndindex(*grid)], 1).reshape(len(sides), *grid)


def draws_of(key, position, dimensions):
    """The affine draws of an example, float64."""
    own = jax.random.fold_in(jax.random.fold_in(key, position), AUGMENTATIONS.index("affine"))
    return [np.asarray(x, np.float64) for x in transforms._draw_affine(own, dimensions)]


# --- Harmonisation ---


@pytest.mark.parametrize("size", [(5, 15), (12, 4)])
def test_resizing_matches_triangles(size):
    images = pixels(PLANES)
    exact = images.astype(np.float64)
    for axis, side in enumerate(size, start=1):
        exact = ref_resize_axis(exact, axis, side)
    assert_rounded(transforms.resize(jnp.asarray(images), size), exact)
    found = transforms.resize(jnp.asarray(images, jnp.float32), size)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-3)


def test_resizing_volumes():
    images = pixels(VOLUMES)
    exact = images.astype(np.float64)
    for axis, side in enumerate((3, 9, 11), start=1):
        exact = ref_resize_axis(exact, axis, side)
    assert_rounded(transforms.resize(jnp.asarray(images), (3, 9, 11)), exact)


def test_resizing_to_the_same_size_changes_nothing():
    images = floats(PLANES)
    assert transforms.resize(images, PLANES[1:-1]) is images
    with pytest.raises(ValueError, match=r"2 sides, got \(4, 4, 4\)"):
        transforms.resize(images, (4, 4, 4))


def test_colour_constancy():
    images = pixels(PLANES)
    found = jax.jit(transforms.colour_constancy)(images)
    assert_rounded(found, np.stack([ref_constancy(x) for x in images]))
    found = transforms.colour_constancy(jnp.asarray(images), power=1)
    assert_rounded(found, np.stack([ref_constancy(x, power=1) for x in images]))


@pytest.mark.slow
def test_colour_constancy_undoes_a_coloured_light():
    greys = np.repeat(pixels((1, 20, 20, 1)), 3, axis=-1)
    tinted = np.rint(greys * np.array([1.0, 0.5, 0.8])).astype(np.uint8)
    found = np.asarray(transforms.colour_constancy(jnp.asarray(tinted)), int)
    assert np.abs(tinted.astype(int) - tinted[..., :1]).max() > 50
    assert np.abs(found - found[..., :1]).max() <= 2


def test_colour_constancy_clips_where_values_pass_255():
    image = np.zeros((1, 20, 20, 3), np.uint8)
    image[..., 0], image[..., 1:] = 200, 20
    image[0, 0, 0] = 0, 0, 250  # a blue spot under red light
    exact = ref_constancy(image[0])
    assert exact[0, 0, 2] == 255  # the reference clips here
    assert_rounded(transforms.colour_constancy(jnp.asarray(image)), exact[None])


@pytest.mark.slow
def test_black_stays_black():
    image = np.zeros((2, 4, 4, 3), np.uint8)
    image[1, ..., 0] = 100  # of the second image only two channels are black
    found = np.asarray(transforms.colour_constancy(jnp.asarray(image)))
    assert not found[0].any() and not found[1, ..., 1:].any()
    np.testing.assert_array_equal(found[1, ..., 0], round(100 / np.sqrt(3)))


@pytest.mark.slow
def test_colour_constancy_keeps_the_colours_of_dark_images():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, 0, 0] = 2, 1, 1
    found = transforms.colour_constancy(jnp.asarray(image), power=40)
    with np.errstate(all="ignore"):
        assert_rounded(found, np.nan_to_num(ref_constancy(image[0], power=40))[None])
    assert found[0, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 4, 1), np.uint8), "3 colours, got C = 1"),
        (np.zeros((1, 4, 4, 3), np.float32), "uint8 pixels, got float32"),
    ],
)
def test_colour_constancy_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        transforms.colour_constancy(images)
    with pytest.raises(ValueError, match=message):
        transforms.harmonize(images, ["colour_constancy"])


@pytest.mark.parametrize("shape", [PLANES, VOLUMES])
@pytest.mark.parametrize("limits", [(0.5, 99.5), (0, 100), (30, 61.7)])
def test_percentile_clip(shape, limits):
    images = pixels(shape)
    clip = jax.jit(functools.partial(transforms.percentile_clip, low=limits[0], high=limits[1]))
    assert_rounded(clip(images), 255 * np.stack([ref_percentiles(x, *limits) for x in images]))
    images = np.asarray(floats(shape))
    found = clip(images)
    assert found.dtype == jnp.float32
    exact = np.stack([ref_percentiles(x, *limits) for x in images])
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("low", "high"), [(50, 50), (-1, 99), (1, 101)])
def test_percentile_clip_refuses_percentiles_out_of_order(low, high):
    with pytest.raises(ValueError, match="0 <= low < high <= 100"):
        transforms.percentile_clip(floats(PLANES), low, high)


@pytest.mark.parametrize("shape", [PLANES, VOLUMES])
@pytest.mark.parametrize("make", [pixels, floats])
def test_z_score(shape, make):
    images = make(shape)
    found = jax.jit(transforms.z_score)(images)
    assert found.dtype == jnp.float32
    exact = np.stack([ref_z_score(np.asarray(x)) for x in images])
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_z_score_far_from_zero():
    images = np.float32(1e4) + np.asarray(floats(VOLUMES))
    exact = np.stack([ref_z_score(x) for x in images])
    np.testing.assert_allclose(transforms.z_score(jnp.asarray(images)), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["percentile_clip", "z_score"])
@pytest.mark.parametrize("value", [0, 7, 0.1])  # the mean of many 0.1 is another number
def test_constant_images_become_zero(name, value):
    dtype = np.float32 if value == 0.1 else np.uint8
    images = np.full((2, 30, 31, 3), value, dtype)
    images[1] = pixels((1, 30, 31, 3))[0]
    found = transforms.harmonize(images, [name])
    np.testing.assert_array_equal(found[0], 0)
    assert found[1].std() > 0.2


@pytest.mark.slow
def test_harmonizing_a_pool_applies_methods_in_order():
    images = pixels(PLANES)
    names = ["colour_constancy", "percentile_clip", "z_score"]
    one = transforms.colour_constancy(jnp.asarray(images))
    two = transforms.percentile_clip(one)
    np.testing.assert_array_equal(transforms.harmonize(images, names[:2]), two)
    found = transforms.harmonize(images, names)
    np.testing.assert_allclose(found, transforms.z_score(two), rtol=1e-5, atol=1e-6)
    other = transforms.harmonize(images, ["percentile_clip", "colour_constancy"])
    assert (other != two).any()


@pytest.mark.parametrize("make", [pixels, lambda shape: np.asarray(floats(shape))])
@pytest.mark.parametrize("names", [["percentile_clip"], ["percentile_clip", "z_score"]])
def test_dtypes_of_harmonized_pools(make, names):
    images = make(PLANES)
    before = images.copy()
    found = transforms.harmonize(images, names)
    assert found.shape == images.shape
    assert found.dtype == (np.uint8 if images.dtype == np.uint8 and len(names) == 1 else np.float32)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("names", [["colour_constancy", "percentile_clip"], ["z_score"]])
def test_blocks_do_not_matter(monkeypatch, names):
    images = pixels((7, 11, 9, 3))  # of a shape of its own: programs are counted
    whole = transforms.harmonize(images, names)
    programs = compile_totals().programs
    for in_a_block in (1, 3, 5):
        monkeypatch.setattr(transforms, "_BLOCK_VALUES", in_a_block * images[0].size + 1)
        found = transforms.harmonize(images, names)
        np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6 * (found.dtype != np.uint8))
    assert compile_totals().programs == programs + 3  # one for each size of block
    shuffled = np.array([4, 2, 6, 0, 1, 5, 3])
    found = transforms.harmonize(images[shuffled], names)
    np.testing.assert_array_equal(found, transforms.harmonize(images, names)[shuffled])


def test_pools_without_names_or_images_come_back():
    images = pixels(PLANES)
    assert transforms.harmonize(images, []) is images
    assert transforms.harmonize(images[:0], ["z_score"]).shape == (0, *PLANES[1:])


def test_names_are_checked():
    images = pixels(PLANES)
    with pytest.raises(ValueError, match='"z_scores"; .* colour_constancy, percentile_clip, z_sc'):
        transforms.harmonize(images, ["z_scores"])
    with pytest.raises(ValueError, match='"z_score" must be the last'):
        transforms.harmonize(images, ["z_score", "percentile_clip"])
    with pytest.raises(ValueError, match='"turn"; there are flip, flip_all, affine, brightness'):
        augment(jax.random.key(0), floats(PLANES), jnp.zeros(5, int), ("flip", "turn"))


# --- Augmentation ---


def masks_like(shape, seed=0):
    """Random classes, uint8 [N, *spatial]."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 4, shape[:-1]), jnp.uint8)


def test_without_names_nothing_changes():
    images, masks = floats(PLANES), masks_like(PLANES)
    found = transforms.augment(jax.random.key(0), images, masks, [])
    assert found[0] is images and found[1] is masks


def test_augmentation_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match="float images, got uint8"):
        augment(jax.random.key(0), jnp.asarray(pixels(PLANES)), jnp.zeros(5, int), ("flip",))
    with pytest.raises(ValueError, match=r"masks \[N, ...\], got \(5, 2\)"):
        augment(jax.random.key(0), floats(PLANES), jnp.zeros((5, 2), int), ("flip",))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [PLANES, VOLUMES])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_keys_decide_and_labels_stay(shape, name):
    images, labels = floats(shape), jnp.arange(shape[0])
    first, kept = augment(jax.random.key(1), images, labels, (name,))
    again, _ = augment(jax.random.key(1), images, labels, (name,))
    other, _ = augment(jax.random.key(2), images, labels, (name,))
    np.testing.assert_array_equal(kept, labels)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != images).any()
    assert first.shape == shape and first.dtype == images.dtype


@pytest.mark.slow
def test_examples_do_not_depend_on_the_batch():
    images, masks = floats(PLANES), masks_like(PLANES)
    whole = augment(jax.random.key(3), images, masks, AUGMENTATIONS)
    few = augment(jax.random.key(3), images[:2], masks[:2], AUGMENTATIONS)
    np.testing.assert_allclose(few[0], whole[0][:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(few[1], whole[1][:2])
    same = jnp.broadcast_to(images[:1], images.shape)
    moved, _ = augment(jax.random.key(3), same, masks, ("affine",))
    assert all((moved[0] != moved[i]).any() for i in range(1, 5))


@pytest.mark.slow
def test_transforms_do_not_depend_on_each_other():
    images, masks = floats(PLANES), masks_like(PLANES)
    key = jax.random.key(4)
    apart = images, masks
    for name in AUGMENTATIONS:
        apart = augment(key, *apart, (name,))
    together = augment(key, images, masks, AUGMENTATIONS[::-1])
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(together[1], apart[1])


@pytest.mark.parametrize("shape", [(200, 3, 4, 2), (200, 2, 3, 4, 1)])
@pytest.mark.parametrize("name", ["flip", "flip_all"])
def test_flips_are_exact_and_as_often_as_not(shape, name):
    images, masks = np.asarray(floats(shape)), np.asarray(masks_like(shape))
    found, found_masks = (np.asarray(x) for x in augment(jax.random.key(5), images, masks, (name,)))
    dimensions = len(shape) - 2
    counts = dict.fromkeys(np.ndindex(*(2,) * dimensions), 0)
    for image, mask, new, new_mask in zip(images, masks, found, found_masks, strict=True):
        for flipped in counts:
            axes = tuple(np.flatnonzero(flipped))
            if np.array_equal(np.flip(image, axes), new):
                counts[flipped] += 1
                np.testing.assert_array_equal(np.flip(mask, axes), new_mask)
    assert sum(counts.values()) == shape[0]  # each is one of the flips
    if name == "flip":
        counts = {k: n for k, n in counts.items() if not any(k[:-1])}
        assert sum(counts.values()) == shape[0]  # left-right only
    expected = shape[0] / len(counts)
    spread = np.sqrt(expected * (1 - 1 / len(counts)))
    assert max(abs(n - expected) for n in counts.values()) < 4 * spread


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 40, 24, 2), (2, 14, 20, 17, 1)])
@pytest.mark.parametrize("finer", [1, 2])
def test_affine_matches_scipy(float64, shape, finer):
    images = smooth(shape)
    sides = shape[1:-1]
    masks = np.random.default_rng(1).integers(0, 4, (shape[0], *(finer * side for side in sides)))
    key = jax.random.key(6)
    found, found_masks = augment(key, jnp.asarray(images), masks.astype(np.uint8), ("affine",))
    assert found.dtype == jnp.float64 and found_masks.dtype == jnp.uint8
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        draws = draws_of(key, i, len(sides))
        places = ref_sources(sides, sides, *draws)
        for c in range(shape[-1]):
            exact = ndimage.map_coordinates(image[..., c], places, order=1, mode="nearest")
            np.testing.assert_allclose(found[i, ..., c], exact, rtol=0, atol=1e-9)
        places = ref_sources(mask.shape, sides, *draws)
        exact = ndimage.map_coordinates(mask, places, order=0, mode="nearest")
        np.testing.assert_array_equal(found_masks[i], exact)


@pytest.mark.slow
def test_draws_are_the_same_in_any_precision(float64):
    shape = (3, 40, 24, 2)
    images, masks = smooth(shape), masks_like(shape)
    exact, _ = augment(jax.random.key(7), jnp.asarray(images), masks, AUGMENTATIONS)
    with jax.enable_x64(False):
        found, _ = augment(jax.random.key(7), jnp.asarray(images), masks, AUGMENTATIONS)
        half = jnp.asarray(images, jnp.bfloat16)
        rough, _ = augment(jax.random.key(7), half, masks, AUGMENTATIONS)
    assert (exact.dtype, found.dtype, rough.dtype) == (jnp.float64, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rough.astype(float), exact, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_strengths_of_affine(dimensions):
    keys = jax.random.split(jax.random.key(8), 500)
    draw = jax.jit(jax.vmap(lambda key: transforms._draw_affine(key, dimensions)))
    angles, scales, shifts = (np.asarray(x) for x in draw(keys))
    assert angles.shape == (500, {2: 1, 3: 3}[dimensions]) and shifts.shape == (500, dimensions)
    most = {2: 15, 3: 10}[dimensions]
    for values, low, high in [(np.degrees(angles), -most, most), (shifts, -0.05, 0.05)]:
        assert low * 1.001 < values.min() < 0.95 * low and 0.95 * high < values.max() < high * 1.001
    assert 0.9 <= scales.min() < 0.91 and 1.09 < scales.max() <= 1.1
    assert np.abs(angles.mean(0)).max() < np.radians(most) / 8


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 48, 32, 1), (4, 20, 24, 22, 1)])
@pytest.mark.parametrize("finer", [1, 2])
def test_masks_follow_their_images(shape, finer):
    fine = smooth((shape[0], *(finer * side for side in shape[1:-1]), 1))
    masks = jnp.asarray(fine[..., 0] > 0, jnp.uint8)
    # An image is its mask, at its own resolution.
    images = transforms.resize(masks[..., None].astype(jnp.float32), shape[1:-1])
    moved, moved_masks = augment(jax.random.key(9), images, masks, ("flip_all", "affine"))
    shown = transforms.resize(moved, moved_masks.shape[1:])[..., 0] > 0.5
    agreement = np.mean(np.asarray(shown == moved_masks))
    assert agreement > 0.96
    assert agreement > np.mean(np.asarray(shown == masks)) + 0.02


def test_rotations_are_of_square_pixels():
    """A disc stays a disc in an image that is no square, where stretched axes make an ellipse."""
    rows, columns = np.mgrid[:30, :90]
    disc = np.hypot(rows - 14.5, columns - 44.5) < 9
    images = np.broadcast_to(disc[None, ..., None], (20, 30, 90, 1)).astype(np.float32)
    moved, _ = augment(jax.random.key(10), images, jnp.zeros(20, int), ("affine",))
    for image in np.asarray(moved[..., 0]):
        weights = image / image.sum()
        spread = [
            np.sum(weights * x**2) - np.sum(weights * x) ** 2
            for x in (rows, columns, (rows + columns) / np.sqrt(2))
        ]
        np.testing.assert_allclose(spread, spread[0], rtol=0.03)


@pytest.mark.parametrize("shape", [(300, 6, 5, 3), (300, 3, 4, 5, 1)])
@pytest.mark.parametrize("scale", [1, 255])
def test_brightness(shape, scale):
    images, masks = floats(shape) * scale, masks_like(shape)
    found, found_masks = augment(jax.random.key(11), images, masks, ("brightness",))
    np.testing.assert_array_equal(found_masks, masks)
    x = np.asarray(images, np.float64).reshape(shape[0], -1)
    y = np.asarray(found, np.float64).reshape(shape[0], -1)
    contrast = y.std(1) / x.std(1)
    brightness = (y.mean(1) - x.mean(1)) / x.std(1)
    assert 0.8999 < contrast.min() < 0.91 and 1.09 < contrast.max() < 1.1001
    assert -0.1001 < brightness.min() < -0.09 and 0.09 < brightness.max() < 0.1001
    assert abs(np.corrcoef(contrast, brightness)[0, 1]) < 0.2
    exact = x.mean(1, keepdims=True) + contrast[:, None] * (x - x.mean(1, keepdims=True))
    exact += (brightness * x.std(1))[:, None]
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * scale * 10)


def test_brightness_leaves_constant_images():
    images = jnp.full(PLANES, 0.25)
    found, _ = augment(jax.random.key(0), images, jnp.zeros(5, int), ("brightness",))
    np.testing.assert_allclose(found, images, rtol=1e-6)


@pytest.mark.slow
def test_clients_at_once_are_clients_one_by_one():
    shape = VOLUMES
    images = jnp.stack([floats(shape, seed) for seed in range(3)])
    masks = jnp.stack([masks_like(shape, seed) for seed in range(3)])
    keys = jax.random.split(jax.random.key(12), 3)
    one = functools.partial(transforms.augment, names=AUGMENTATIONS)
    at_once = jax.jit(jax.vmap(one))(keys, images, masks)
    for i in range(3):
        found = augment(keys[i], images[i], masks[i], AUGMENTATIONS)
        np.testing.assert_allclose(at_once[0][i], found[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(at_once[1][i], found[1])


def test_in_a_loop():
    images, masks = floats(PLANES), masks_like(PLANES)
    key = jax.random.key(13)

    def step(i, state):
        return transforms.augment(jax.random.fold_in(key, i), *state, AUGMENTATIONS)

    found = jax.jit(lambda *state: jax.lax.fori_loop(0, 3, step, state))(images, masks)
    exact = images, masks
    for i in range(3):
        exact = augment(jax.random.fold_in(key, i), *exact, AUGMENTATIONS)
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[1], exact[1])
