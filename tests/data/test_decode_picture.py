"""The door through which pictures come in."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from fedhelp_jax.data.decode import decode_picture, picture_stem

GREYS = np.random.default_rng(0).integers(0, 4096, (6, 9)).astype(np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png_of_16_bits(colour_type, channels):
    """Pillow reads colours of 16 bits, but does not write them."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    rows = zlib.compress(2 * (b"\0" + bytes(4 * channels)))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


DEEP = {
    "grey PNG": (encoded(GREYS, "PNG"), 16),
    "grey TIFF": (encoded(GREYS, "TIFF"), 16),
    "grey JPEG 2000": (encoded(GREYS, "JPEG2000"), 16),
    "float TIFF": (encoded(GREYS.astype(np.float32), "TIFF"), 32),
    "PNG of colours": (png_of_16_bits(2, 3), 16),
    "PNG of greys and alpha": (png_of_16_bits(4, 2), 16),
    "PNG of colours and alpha": (png_of_16_bits(6, 4), 16),
    "PPM of colours": (b"P6 2 2 65535\n" + bytes(24), 16),
    "PPM of colours of 12 bits": (b"P6 2 2 4095\n" + bytes(24), 12),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_refused(kind):
    data, bits = DEEP[kind]
    line = refusal(lambda: decode_picture(data, "data.path: x"))
    assert line.startswith(f"data.path: x has {bits} bits a channel; pictures must have 8")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_what_has_8_bits_is_read_as_it_is(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    image = decode_picture(encoded(COLOURS, kind, **options), "x")
    assert np.array_equal(np.asarray(image), COLOURS) and image.format == kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = COLOURS
    # By the EXIF standard: where row 0 and column 0 of what is stored are shown.
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_picture(encoded(stored, kind, exif=exif, **options), "x")
    assert np.array_equal(np.asarray(image), shown)
    assert image.format == kind or orientation > 1


@pytest.mark.parametrize("tag", [0xA005, 0x0100, 0x011A])
def test_a_picture_is_turned_whatever_its_other_tags_hold(tag):
    """Text stands where a number or a place in the file should."""
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 6)
    odd = struct.pack("<HHI4s", tag, 2, 4, b"odd\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + odd + bytes(4)
    image = decode_picture(encoded(COLOURS, "PNG", exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(image), np.rot90(COLOURS, -1))


def test_a_broken_orientation_is_none():
    data = encoded(COLOURS, "PNG", exif=b"Exif\0\0no such thing")
    assert np.array_equal(np.asarray(decode_picture(data, "x")), COLOURS)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG"])
def test_several_pages_are_refused(kind):
    other = Image.fromarray(255 - COLOURS)
    data = encoded(COLOURS, kind, save_all=True, append_images=[other])
    assert refusal(lambda: decode_picture(data, "x")).startswith("x has 2 frames or pages")


@pytest.mark.parametrize("data", [b"", b"text", encoded(COLOURS, "PNG")[:80]])
def test_what_is_no_picture(data):
    assert refusal(lambda: decode_picture(data, "x")).startswith("x cannot be decoded: ")


@pytest.mark.parametrize(
    "ending", ["jpg", "JPEG", "png", "Tif", "tiff", "bmp", "gif", "webp", "jp2"]
)
def test_endings(ending):
    assert picture_stem(f"images/a.b.{ending}") == "a.b"
    assert picture_stem(f"images/{ending}") is None
