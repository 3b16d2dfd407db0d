"""Decodes, checks and uprights pictures; every picture is read through this module."""

import functools
import io
import struct
import zipfile
import zlib
from pathlib import PurePosixPath

from PIL import ExifTags, Image, UnidentifiedImageError

from fedhelp_jax.core.errors import UserError

# The errors that Pillow and archives raise for a file that is damaged, is not an image, or is
# absurdly large. RuntimeError stands for a zip file that is encrypted, or compressed by a method
# that Python does not know.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)

# Formats by Pillow's names. MPO is a JPEG file with further pictures after the main one.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM", "AVIF", "MPO")
# Pillow's modes with at most 8 bits per channel.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")

# The transposition that turns a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # a TIFF tag
_JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # the markers for the start of a code stream and its sizes


def picture_stem(name: str) -> str | None:
    """Returns a file's name without folder and extension; None if it is not a picture's extension.

    >>> picture_stem("images/a.1.JPG"), picture_stem("images/notes.txt")
    ('a.1', None)
    """
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in _known()[1] else None


def decode_picture(data: bytes, where: str) -> Image.Image:
    """Returns a fully read picture, turned upright according to its EXIF orientation.

    Args:
        data: Contents of the file.
        where: Key and file, for messages.

    Returns:
        The image in the mode that it is stored in. Its `format` is None if it was turned, because
        its pixels then differ from those in the file.

    Raises:
        UserError: The file is damaged, is not a picture, exceeds Pillow's size limit, has more than
            8 bits per channel, or has several frames or pages.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known()[0]) as image:
            _check(image, data, where)
            image.load()
    except UnidentifiedImageError:
        raise UserError(f"{where} cannot be decoded: it is no picture of a known format") from None
    except DECODE_ERRORS as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where} cannot be decoded: {said}") from error
    # Pillow's own function also rewrites the other tags, and fails if one of them is malformed.
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _check(image: Image.Image, data: bytes, where: str) -> None:
    bits = _bits(image, data)
    if bits > 8 or image.mode not in _MODES:
        depth = f"{bits} bits a channel" if bits > 8 else f"pixels of Pillow's mode {image.mode}"
        raise UserError(
            f"{where} has {depth}; pictures must have 8, since a file with more does not tell "
            "which of its values is white: convert it first"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise UserError(f"{where} has {frames} frames or pages; a picture must have one")


def _bits(image: Image.Image, data: bytes) -> int:
    """Returns the bits per channel in the file; Pillow silently cuts 16-bit colours to 8 bits."""
    if image.mode.startswith(("I", "F")):
        return 16 if ";16" in image.mode else 32
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, 8)  # pyright: ignore[reportAttributeAccessIssue]
        return max(bits) if isinstance(bits, tuple) else bits
    if image.format == "JPEG2000":
        start = data.find(_JPEG2000_SIZE)
        count = int.from_bytes(data[start + 40 : start + 42])
        depths = data[start + 42 : start + 42 + 3 * count : 3]
        return max((depth & 0x7F for depth in depths), default=7) + 1
    for tile in image.tile:  # pyright: ignore[reportAttributeAccessIssue]
        said = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(word, str) and ";16" in word for word in said):
            return 16
        if tile.codec_name.startswith("ppm") and isinstance(said[-1], int) and said[-1] > 255:
            return said[-1].bit_length()
    return 8


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1  # without a readable tag, the picture is not turned


@functools.cache
def _known() -> tuple[tuple[str, ...], frozenset[str]]:
    """Returns the formats that this Pillow reads, and their file extensions in lower case."""
    Image.init()
    formats = tuple(name for name in _FORMATS if name in Image.OPEN)
    endings = Image.registered_extensions().items()
    return formats, frozenset(ending for ending, name in endings if name in formats)
