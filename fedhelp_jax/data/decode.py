"""The one door through which pictures come in: decoded, checked, and turned upright."""

import functools
import io
import struct
import zipfile
import zlib
from pathlib import PurePosixPath

from PIL import ExifTags, Image, UnidentifiedImageError

from fedhelp_jax.core.errors import UserError

# What Pillow and archives raise where an image is damaged, is none, or is absurdly large.
# RuntimeError: a zip file that is encrypted, or compressed in a way that Python does not know.
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

# By Pillow's names. MPO is a JPEG file with another picture behind the one that cameras show.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM", "AVIF", "MPO")
# Of 8 bits a channel or fewer.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")

# What brings a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # the start of a code stream, and of its sizes


def picture_stem(name: str) -> str | None:
    """Returns a file's name without folder and ending; None if the ending is no picture's.

    >>> picture_stem("images/a.1.JPG"), picture_stem("images/notes.txt")
    ('a.1', None)
    """
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in _known()[1] else None


def decode_picture(data: bytes, where: str) -> Image.Image:
    """Returns a picture, fully read, with the side up that its EXIF orientation says.

    Args:
        data: The file.
        where: Key and file, for messages.

    Returns:
        The image in the mode that it is stored in. Its `format` is None if it was turned: then the
        file is not what the pixels are.

    Raises:
        UserError: It is damaged or no picture, larger than Pillow takes for one, has more than 8
            bits a channel, or has several frames or pages.
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
    # Pillow's own function writes the other tags anew, and fails where one of them is odd.
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
    """Returns how many bits a channel has in the file; Pillow cuts colours of 16 to 8 silently."""
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
        return 1  # nothing that can be read asks for a turn


@functools.cache
def _known() -> tuple[tuple[str, ...], frozenset[str]]:
    """Returns the formats that this Pillow reads, and the endings of their files in lower case."""
    Image.init()
    formats = tuple(name for name in _FORMATS if name in Image.OPEN)
    endings = Image.registered_extensions().items()
    return formats, frozenset(ending for ending, name in endings if name in formats)
