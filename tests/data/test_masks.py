import io
import logging
import re

import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from fedhelp_jax.data.readers.masks import class_masks, decode_mask, stored_values

RNG = np.random.default_rng(0)
BINARY = RNG.integers(0, 2, (4, 6, 5), dtype=np.uint8)
CLASSES = RNG.integers(0, 3, (4, 6, 5, 3), dtype=np.uint8)
NAMES = ("a.png", "b.png", "c.png", "d.png")
ONE, THREE = ("lung",), ("background", "front", "back")


def changed(masks, value, place=(2, 1, 1)):
    masks = masks.astype(np.int16 if value < 0 else masks.dtype)
    masks[place] = value
    return masks


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int64])
def test_masks_of_any_whole_type_become_classes(dtype):
    masks = class_masks(BINARY.astype(dtype), ONE, NAMES, "data.path: f")
    assert masks.dtype == np.uint8 and np.array_equal(masks, BINARY)
    if dtype is not bool:
        masks = class_masks(CLASSES.astype(dtype), THREE, NAMES, "data.path: f")
        assert masks.dtype == np.uint8 and np.array_equal(masks, CLASSES)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_white_is_one_foreground_class(dtype):
    masks = class_masks(255 * BINARY.astype(dtype), ONE, NAMES, "data.path: f")
    assert masks.dtype == np.uint8 and np.array_equal(masks, BINARY)


def test_volumes_and_a_class_that_is_not_there():
    masks = class_masks(np.minimum(CLASSES, 1), THREE, NAMES, "data.path: f")
    assert masks.shape == (4, 6, 5, 3) and masks.max() == 1


@pytest.mark.parametrize(
    ("masks", "label_names", "message"),
    [
        (changed(BINARY, 7), ONE, "mask c.png holds 7; masks of one foreground class hold 0 and 1"),
        (changed(BINARY, -1), ONE, "mask c.png holds -1;"),
        (changed(255 * BINARY, 254), ONE, "mask c.png holds 254; .* hold 0 and 255"),
        # Neither spelling is taken for the other: 1 would be lost, or be too much.
        (changed(255 * BINARY, 1), ONE, "mask c.png holds 1; .* hold 0 and 255"),
        (changed(CLASSES, 3), THREE, "mask c.png holds 3; masks of 3 classes hold 0..2"),
        (changed(CLASSES, 255), THREE, "mask c.png holds 255;"),
        (changed(CLASSES, -1), THREE, "mask c.png holds -1;"),
        (
            np.full((4, 2, 2), 256),
            tuple(map(str, range(300))),
            "mask a.png holds 256; masks of 300 classes hold 0..255",
        ),
        (BINARY / 1.0, ONE, "must be integers or bools, got float64"),
        (BINARY[:3], ONE, "expected 4 masks, got the shape \\(3, 6, 5\\)"),
        (BINARY[:, :0], ONE, "expected 4 masks, got the shape \\(4, 0, 5\\)"),
        (np.array([0, 1, 0, 1]), ONE, "expected 4 masks, got the shape \\(4,\\)"),
        (0 * BINARY, ONE, "all 4 masks are empty"),
        (0 * CLASSES, THREE, "all 4 masks are empty"),
    ],
)
def test_bad_masks_are_refused_by_file_and_value(masks, label_names, message):
    line = refusal(lambda: class_masks(masks, label_names, NAMES, "data.path: f: masks"))
    assert re.search(f"^data.path: f: masks.*{message}", line), line


@pytest.mark.parametrize("white", [1, 255])
def test_some_empty_masks_are_said_once(white, caplog):
    masks = white * np.ones((4, 2, 2), np.uint8)
    with caplog.at_level(logging.WARNING):
        class_masks(masks, ONE, NAMES, "data.path: f")
        assert not caplog.records
        masks[[1, 3]] = 0
        class_masks(masks, ONE, NAMES, "data.path: f")
    (record,) = caplog.records
    assert record.getMessage() == "data.path: f: 2 of 4 masks are empty, the first is b.png"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_stored_values(dtype):
    masks = RNG.choice([-3 if dtype != np.uint8 else 3, 0, 5, 90], (3, 4, 4)).astype(dtype)
    assert stored_values(masks, "") == sorted(set(masks.ravel().tolist()))
    assert stored_values(np.array([[False], [True]]), "") == [0, 1]


# --- pictures -------------------------------------------------------------------------------------

DISC = np.hypot(*np.mgrid[-20:20, -25:25]) < 12


def grey(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def palette(order, colours):
    image = Image.fromarray(np.asarray(order, np.uint8), "P")
    image.putpalette(colours)
    return image


def reopened(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


PICTURES = {
    "0 and 255": grey(255 * DISC),
    "0 and 1": grey(DISC),
    "1 bit": grey(255 * DISC).convert("1"),
    "RGB": grey(255 * DISC).convert("RGB"),
    "RGB of 0 and 1": grey(DISC).convert("RGB"),
    "LA": grey(255 * DISC).convert("LA"),
    "RGBA": grey(255 * DISC).convert("RGBA"),
    "palette": palette(DISC, [0, 0, 0, 255, 255, 255]),
    # As 402 of the masks of HAM10000: by the numbers it would be inside out.
    "palette, white first": palette(~DISC, [255, 255, 255, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_all_ways_to_draw_a_mask(kind):
    mask = decode_mask(reopened(PICTURES[kind]), "m.png", "data.path: f")
    assert mask.dtype == bool and np.array_equal(mask, DISC)


@pytest.mark.parametrize("method", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_a_resized_mask_is_cut_at_its_border(method):
    large = np.kron(DISC, np.ones((4, 4), bool))
    image = grey(255 * large).resize((131, 113), method)
    pixels = np.asarray(image)
    assert np.any((pixels > 32) & (pixels < 223))
    mask = decode_mask(image, "m.png", "data.path: f")
    assert np.array_equal(mask, pixels > 127)
    assert abs(mask.mean() - DISC.mean()) < 0.005


@pytest.mark.parametrize("value", [0, 255])
def test_all_of_one_kind(value):
    mask = decode_mask(grey(np.full((3, 4), value)), "m.png", "data.path: f")
    assert mask.shape == (3, 4) and np.all(mask == (value == 255))


# Foreground 1, and around it 255 for what counts as neither.
VOID = np.where(np.hypot(*np.mgrid[-20:20, -25:25]).round() == 13, 255, DISC)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (grey(RNG.integers(0, 256, (40, 50))), "is grey on 7.% of its pixels; a mask of one"),
        (grey(VOID), "holds 1 beside 255;"),
        (grey(np.where(DISC, 255, 90)), "is grey on 7.% of its pixels"),
        (grey(2 * DISC), "holds 2;"),
        (grey(128 * DISC), "holds 128;"),
        (Image.fromarray(np.where(DISC, 40000, 0).astype(np.uint16)), "has pixels of mode I;16"),
        (palette(DISC, [0, 0, 0, 128, 0, 0]), "has colours"),
        (Image.fromarray(np.stack([255 * DISC, 0 * DISC, 0 * DISC], -1).astype(np.uint8)), "colou"),
        (Image.merge("LA", (grey(0 * DISC), grey(255 * DISC))), "is partly transparent"),
    ],
)
def test_pictures_that_are_no_masks(image, message):
    line = refusal(lambda: decode_mask(image, "m.png", "data.path: f"))
    assert re.search(f"^data.path: f: mask m.png.*{message}", line), line
