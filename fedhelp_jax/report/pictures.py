"""Pictures of segmentations: image, truth, prediction and error, side by side.

They are drawn with Pillow only. Everything is drawn on the grid of the masks, enlarged by a whole
number, so that a contour lies exactly on the pixels it belongs to.
"""

import functools
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageColor, ImageDraw, ImageFont

from fedhelp_jax.core.storage import replaced

COLUMNS = ("image", "truth", "prediction", "error")

# Colours of Okabe and Ito, which colour-blind readers can distinguish.
TRUTH, PREDICTION = "#009E73", "#E69F00"  # outlines of a single class
CLASSES = ("#E69F00", "#009E73", "#CC79A7", "#0072B2")  # outlines of several classes
MISSED, TOO_MUCH, WRONG_CLASS = "#F0E442", "#56B4E9", "#D55E00"  # fills

_CELL = 220  # approximate longest side of a drawn mask, in pixels
_LINE = 2
_OPACITY = 0.6  # opacity of fills
_DIMMED = 0.7  # brightness of the image under fills
_MARGIN, _GAP = 16, 8
_NARROWEST = 640  # leaves room for title and legend even if the images are narrow
_INK, _PAPER = "#222222", "#FFFFFF"
_TITLE, _TEXT, _SMALL = 22, 16, 14


class Row(NamedTuple):
    """One test image and a network's prediction.

    Attributes:
      name: name of the client and the example.
      image: uint8 ``[H, W, 3]`` or ``[D, H, W, 1]``, at the network's input size.
      truth: uint8 ``[*mask]``, the class of each pixel at the masks' own resolution.
      predicted: uint8 ``[*mask]``, the predicted class of each pixel.
      dice: the Dice of this example; NaN if undefined.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    dice: float


class _Plane(NamedTuple):
    """The content of one line: an image ``[h, w, 3]`` and masks, which may have another size."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


class _Key(NamedTuple):
    """An entry of the legend."""

    name: str
    colour: str
    is_line: bool


def segmentation_panel(
    path: Path, title: str, rows: Sequence[Row], label_names: Sequence[str]
) -> None:
    """Writes a PNG with a line of four pictures per image, or three such lines per volume.

    Images are resized to the shape of their masks, whose pixels are square, so the pictures have
    the original proportions. Outlines are the outermost pixels *inside* a mask. The last column
    shows the image in dimmed grey and fills in what the prediction misses, what it adds and, with
    several classes, where it predicts the wrong class.

    For a volume, the three planes through the centre of mass of its true mask are shown. They are
    named after the axes of the array, since a file of arrays does not state the orientation of the
    body. The first axis of each plane points down.

    Args:
      path: the file; an old file is kept until the new one is complete.
      title: the title, wrapped to the width of the picture.
      rows: at least one row; names too long for the picture are shortened in the middle.
      label_names: one name for a single foreground class, else the names of all classes, background
        first.
    """
    if not rows:
        raise ValueError("a panel needs at least one row")
    classes = _classes(label_names)
    drawn = [_drawn(row, classes) for row in rows]
    lines = [line for of_row in drawn for line in of_row]
    gutter = max(_text_width(name, _SMALL) for name, _ in lines)
    gutter += _GAP if gutter else 0
    column = max(cell.width for _, cells in lines for cell in cells)
    column = max(column, (_NARROWEST - gutter - 3 * _GAP) // 4)
    width = gutter + 4 * column + 3 * _GAP

    strips = [
        _text_strip(_wrap(title, _TITLE, width), _TITLE, width),
        _legend(_keys(label_names), width),
        _line_strip("", [_text_strip([name], _TEXT, column) for name in COLUMNS], gutter, column),
    ]
    for row, of_row in zip(rows, drawn, strict=True):
        strips.append(_caption(row, width))
        strips.extend(_line_strip(name, cells, gutter, column) for name, cells in of_row)
    _save(_stack(strips, width), path)


# --- what is drawn ------------------------------------------------------------------------------


def _planes(row: Row) -> list[_Plane]:
    if row.truth.ndim == 2:
        return [_Plane("", row.image, row.truth, row.predicted)]
    shown = row.truth if row.truth.any() else row.predicted
    centre = [math.floor(np.mean(axis) + 0.5) for axis in np.nonzero(shown)] if shown.any() else []
    planes = []
    for axis, at in enumerate(centre or [side // 2 for side in shown.shape]):
        # The image slice at the middle of this mask slice; their numbers of slices may differ.
        there = int((at + 0.5) * row.image.shape[axis] / shown.shape[axis])
        grey = np.take(row.image[..., 0], there, axis)
        down, right = [name for name in "DHW" if name != "DHW"[axis]]
        planes.append(
            _Plane(
                f"{'DHW'[axis]} = {at}\n{down} down\n{right} right",
                np.repeat(grey[..., None], 3, axis=-1),
                np.take(row.truth, at, axis),
                np.take(row.predicted, at, axis),
            )
        )
    return planes


def _drawn(row: Row, classes: Sequence[str]) -> list[tuple[str, list[Image.Image]]]:
    """Returns the name and the four pictures of each line of a row, all on the same scale."""
    side = max(row.truth.shape)
    up, down = max(1, round(_CELL / side)), max(1, round(side / _CELL))
    return [(plane.name, _cells(plane, classes, up, down)) for plane in _planes(row)]


def _cells(plane: _Plane, classes: Sequence[str], up: int, down: int) -> list[Image.Image]:
    """Returns four pictures; masks are subsampled by ``down`` and enlarged by ``up``."""
    truth, predicted = (
        mask[::down, ::down].repeat(up, axis=0).repeat(up, axis=1)
        for mask in (plane.truth, plane.predicted)
    )
    image = Image.fromarray(plane.image).resize(truth.shape[::-1], Image.Resampling.BICUBIC)
    grey = _DIMMED * np.array(image.convert("L"), np.float32)
    image, error = np.array(image), np.repeat(grey[..., None].astype(np.uint8), 3, axis=-1)
    one = len(classes) == 1
    _fill(error, (truth > 0) & (predicted == 0), MISSED)
    _fill(error, (truth == 0) & (predicted > 0), TOO_MUCH)
    _fill(error, (truth > 0) & (predicted > 0) & (truth != predicted), WRONG_CLASS)
    pictures = [
        image,
        _outlined(image, truth, [TRUTH] if one else classes),
        _outlined(image, predicted, [PREDICTION] if one else classes),
        error,
    ]
    return [Image.fromarray(picture) for picture in pictures]


def _outlined(image: np.ndarray, mask: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    image = image.copy()
    for number, colour in enumerate(colours, start=1):
        inside = mask == number
        window = (2 * _LINE + 1, 2 * _LINE + 1)
        deep = sliding_window_view(np.pad(inside, _LINE), window).all(axis=(-2, -1))
        image[inside & ~deep] = ImageColor.getrgb(colour)
    return image


def _fill(image: np.ndarray, where: np.ndarray, colour: str) -> None:
    paint = np.array(ImageColor.getrgb(colour))
    image[where] = np.round((1 - _OPACITY) * image[where] + _OPACITY * paint).astype(np.uint8)


# --- colours ------------------------------------------------------------------------------------


def _classes(label_names: Sequence[str]) -> list[str]:
    """Returns a colour for each foreground class: `CLASSES`, then hues 137.5 degrees apart."""
    count = max(1, len(label_names) - 1)
    hues = [f"hsl({137.5 * i % 360:.0f}, 80%, 70%)" for i in range(count - len(CLASSES))]
    return [*CLASSES, *hues][:count]


def _keys(label_names: Sequence[str]) -> list[_Key]:
    errors = [_Key("missed", MISSED, False), _Key("too much", TOO_MUCH, False)]
    if len(label_names) <= 2:
        lines = [("truth", TRUTH), ("prediction", PREDICTION)]
        return [_Key(f"{label_names[-1]}, {name}", c, True) for name, c in lines] + errors
    lines = zip(label_names[1:], _classes(label_names), strict=True)
    return [
        *(_Key(name, colour, True) for name, colour in lines),
        *errors,
        _Key("wrong class", WRONG_CLASS, False),
    ]


# --- layout -------------------------------------------------------------------------------------


def _stack(strips: Sequence[Image.Image], width: int) -> Image.Image:
    height = sum(strip.height + _GAP for strip in strips) - _GAP
    page = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    top = _MARGIN
    for strip in strips:
        page.paste(strip, (_MARGIN, top))
        top += strip.height + _GAP
    return page


def _line_strip(name: str, cells: Sequence[Image.Image], gutter: int, column: int) -> Image.Image:
    size = (gutter + 4 * column + 3 * _GAP, max(cell.height for cell in cells))
    strip = Image.new("RGB", size, _PAPER)
    ImageDraw.Draw(strip).multiline_text((0, 0), name, _INK, _font(_SMALL))
    for number, cell in enumerate(cells):
        strip.paste(cell, (gutter + number * (column + _GAP), 0))
    return strip


def _caption(row: Row, width: int) -> Image.Image:
    dice = "Dice -" if math.isnan(row.dice) else f"Dice {row.dice:.3f}"
    room = width - _text_width(dice, _TEXT) - 2 * _GAP
    strip = _text_strip([_shorten(_drawable(row.name), _TEXT, room)], _TEXT, width)
    ImageDraw.Draw(strip).text((width, 0), dice, _INK, _font(_TEXT), anchor="ra")
    return strip


def _legend(keys: Sequence[_Key], width: int) -> Image.Image:
    """Returns swatches with their names, on as many lines as needed."""
    swatch, height = 24, 22
    places, x, y = [], 0, 0
    for key in keys:
        name = _shorten(_drawable(key.name), _SMALL, width - swatch - _GAP)
        needed = swatch + _GAP + _text_width(name, _SMALL)
        if x and x + needed > width:
            x, y = 0, y + height
        places.append((x, y, name))
        x += needed + 2 * _GAP
    strip = Image.new("RGB", (width, y + height), _PAPER)
    draw = ImageDraw.Draw(strip)
    for key, (x, y, name) in zip(keys, places, strict=True):
        half = _LINE if key.is_line else 7
        middle = y + height // 2
        draw.rectangle((x, middle - half, x + swatch - 1, middle + half - 1), key.colour)
        draw.text((x + swatch + _GAP, middle), name, _INK, _font(_SMALL), anchor="lm")
    return strip


def _text_strip(lines: Sequence[str], size: int, width: int) -> Image.Image:
    height = round(1.4 * size)
    strip = Image.new("RGB", (width, height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((0, number * height), line, _INK, _font(size))
    return strip


def _wrap(text: str, size: int, width: int) -> list[str]:
    lines = [""]
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_shorten(line, size, width) for line in lines]


def _shorten(text: str, size: int, width: int) -> str:
    """Returns the text, without its middle if too long, since names differ mostly at the ends."""
    kept = len(text)
    shorter = text
    while kept and _text_width(shorter, size) > width:
        kept -= 1
        shorter = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shorter


def _drawable(text: str) -> str:
    """Returns the text on one line without accents, which Pillow's default font lacks."""
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _text_width(text: str, size: int) -> int:
    return math.ceil(max(_font(size).getlength(line) for line in text.split("\n")))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _save(page: Image.Image, path: Path) -> None:
    with replaced(path) as beside:
        page.save(beside, format="PNG")
