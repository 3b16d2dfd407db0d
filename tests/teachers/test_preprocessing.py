import numpy as np
import pytest
from PIL import Image

from fedhelp_jax.settings.schema import PIXEL_LAYOUTS, PIXEL_SCALES
from fedhelp_jax.teachers.preprocessing import Preprocessing

COLOUR = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
GREY = COLOUR[..., :1]


def test_pixels_at_native_size_are_kept():
    got = Preprocessing()(COLOUR)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, COLOUR)
    np.testing.assert_array_equal(Preprocessing(10)(COLOUR[:, :, :10]), COLOUR[:, :, :10])


@pytest.mark.parametrize("size", [None, 7, 10])
def test_grey_becomes_rgb(size):
    got = Preprocessing(size)(GREY)
    rgb = Preprocessing(size)(np.repeat(GREY, 3, axis=-1))
    assert got.shape == (4, size or 10, size or 12, 3)
    np.testing.assert_array_equal(got, rgb)
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize("size", [5, 10, 32])
def test_resizing_is_bicubic_on_rgb(size):
    for pixels in (COLOUR, GREY):
        pictures = [Image.fromarray(p if p.shape[-1] == 3 else p[..., 0]) for p in pixels]
        expected = [p.convert("RGB").resize((size, size), Image.BICUBIC) for p in pictures]
        np.testing.assert_array_equal(Preprocessing(size)(pixels), np.stack(expected))


def test_scales_by_their_formulas():
    x = COLOUR.astype(np.float64)
    imagenet = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = {
        "unit": x / 255,
        "signed": x / 127.5 - 1,
        "imagenet": imagenet,
        "clip": (x / 255 - mean) / std,
    }
    assert {*expected, "uint8"} == set(PIXEL_SCALES)
    for scale, values in expected.items():
        got = Preprocessing(scale=scale)(COLOUR)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, values, rtol=0, atol=1e-6, err_msg=scale)


def test_ends_of_the_scales_are_exact():
    ends = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(Preprocessing(scale="unit")(ends)[:, 0, 0, 0], [0, 1])
    np.testing.assert_array_equal(Preprocessing(scale="signed")(ends)[:, 0, 0, 0], [-1, 1])


@pytest.mark.parametrize("scale", PIXEL_SCALES)
def test_layouts_are_the_same_numbers(scale):
    last = Preprocessing(8, scale, "nhwc")(COLOUR)
    first = Preprocessing(8, scale, "nchw")(COLOUR)
    assert first.shape == (4, 3, 8, 8) and first.dtype == last.dtype
    assert first.flags.c_contiguous and last.flags.c_contiguous
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="scale must be one of uint8, unit, .*got 'float'"):
        Preprocessing(scale="float")
    with pytest.raises(ValueError, match="layout must be one of nhwc, nchw, got 'chw'"):
        Preprocessing(layout="chw")


@pytest.mark.parametrize("pixels", [COLOUR / 255, COLOUR[0], COLOUR[..., :2]])
def test_what_is_no_image_is_refused(pixels):
    with pytest.raises(ValueError, match="pixels must be uint8"):
        Preprocessing()(pixels)


def test_the_fingerprint_tells_all_settings():
    assert str(Preprocessing(224)) == "bicubic 224, uint8, nhwc"
    assert str(Preprocessing()) == "native size, uint8, nhwc"
    every = {
        str(Preprocessing(size, scale, layout))
        for size in (None, 8, 224)
        for scale in PIXEL_SCALES
        for layout in PIXEL_LAYOUTS
    }
    assert len(every) == 3 * len(PIXEL_SCALES) * len(PIXEL_LAYOUTS)
    assert Preprocessing(224) == Preprocessing(224, "uint8", "nhwc") != Preprocessing(225)
