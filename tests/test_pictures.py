"""Panels of segmentations, by the pixels of the PNG and by the texts drawn on it."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from fedhelp_jax.report import pictures
from fedhelp_jax.report.pictures import Row, segmentation_panel

ONE = ("lung",)
THREE = ("background", "anterior", "posterior")


def cells_of(path) -> list[list[np.ndarray]]:
    """The pictures on a panel, line by line: its large rectangles without any white."""
    with Image.open(path) as file:
        page = np.array(file)
    found, _ = ndimage.label((page != 255).any(-1))
    solid = [
        box
        for number, box in enumerate(ndimage.find_objects(found), start=1)
        if found[box].size > 1000 and (found[box] == number).all()
    ]
    solid.sort(key=lambda box: (box[0].start, box[1].start))
    lines = [list(line) for _, line in itertools.groupby(solid, lambda box: box[0].start)]
    assert all(len(line) == 4 for line in lines)
    return [[page[box] for box in line] for line in lines]


def draw(tmp_path, *rows, names=ONE, title="A title") -> list[list[np.ndarray]]:
    path = tmp_path / "panel.png"
    segmentation_panel(path, title, rows, names)
    assert [file.name for file in tmp_path.iterdir()] == ["panel.png"]
    return cells_of(path)


def rgb(colour: str) -> np.ndarray:
    return np.array(ImageColor.getrgb(colour))


def enlarged(mask: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """The mask at the size of a cell, by looking up each pixel."""
    times = cell.shape[0] // mask.shape[0]
    assert cell.shape == (times * mask.shape[0], times * mask.shape[1], 3)
    y, x = np.indices(cell.shape[:2]) // times
    return mask[y, x]


def outline(inside: np.ndarray) -> np.ndarray:
    """Pixels of a mask at most two steps, diagonal ones too, from what is not of it."""
    steps = ndimage.distance_transform_cdt(np.pad(inside, 1), "chessboard")[1:-1, 1:-1]
    return (steps == 1) | (steps == 2)


def letter_f(shape=(22, 33)) -> np.ndarray:
    """A mask that no flip or turn leaves as it is, and that touches the lower edge."""
    mask = np.zeros(shape, np.uint8)
    mask[4:, 5:9] = 1
    mask[4:7, 5:20] = 1
    mask[11:13, 5:14] = 1
    return mask


def make_row(truth, predicted, image=None, name="client_0, scan 1", dice=0.5) -> Row:
    if image is None:
        image = np.full((16, 16, 3), (120, 90, 60), np.uint8)
    return Row(name, image, truth, predicted, dice)


@pytest.fixture
def texts(monkeypatch):
    """All texts drawn; each must lie within its image and on no other text there."""
    seen, drawn_on = [], []
    plain = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        if str(text).strip():
            box = self.textbbox(xy, text, font=args[1], anchor=kwargs.get("anchor"))
            width, height = self.im.size
            assert box[0] >= -1 and box[1] >= 0 and box[2] <= width and box[3] <= height, text
            for image, other in drawn_on:
                apart = box[0] >= other[2] or box[2] <= other[0]
                apart |= box[1] >= other[3] or box[3] <= other[1]
                assert image is not self.im or apart, text
            drawn_on.append((self.im, box))
            seen.extend(str(text).split("\n"))
        return plain(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", text)
    return seen


# --- one class ----------------------------------------------------------------------------------


def test_outlines_lie_on_the_outermost_pixels_of_their_mask(tmp_path):
    truth, predicted = letter_f(), np.roll(letter_f(), (-3, 6), (0, 1))
    [[image, left, middle, _]] = draw(tmp_path, make_row(truth, predicted))
    assert (image == (120, 90, 60)).all()
    for cell, mask, colour in (
        (left, truth, pictures.TRUTH),
        (middle, predicted, pictures.PREDICTION),
    ):
        line = outline(enlarged(mask, cell) == 1)
        assert line.any()
        np.testing.assert_array_equal(cell, np.where(line[..., None], rgb(colour), image))


def test_a_single_pixel_a_full_and_an_empty_mask(tmp_path):
    dot, full = np.zeros((2, 20, 30), np.uint8)
    dot[19, 0], full[:] = 1, 1
    [[image, left, middle, _], [_, _, nothing, _]] = draw(
        tmp_path, make_row(dot, full), make_row(dot, 0 * dot)
    )
    for cell, mask in ((left, dot), (middle, full)):
        np.testing.assert_array_equal((cell != image).any(-1), outline(enlarged(mask, cell) == 1))
    np.testing.assert_array_equal(nothing, image)


def test_errors_are_filled_in_on_dimmed_grey(tmp_path):
    truth, predicted = letter_f(), np.roll(letter_f(), (-3, 6), (0, 1))
    [[_, _, _, error]] = draw(tmp_path, make_row(truth, predicted))
    t, p = enlarged(truth, error) == 1, enlarged(predicted, error) == 1
    grey = 0.7 * (0.299 * 120 + 0.587 * 90 + 0.114 * 60)
    expected = np.full(error.shape, grey)
    expected[t & ~p] = 0.4 * grey + 0.6 * rgb(pictures.MISSED)
    expected[p & ~t] = 0.4 * grey + 0.6 * rgb(pictures.TOO_MUCH)
    np.testing.assert_allclose(error, expected, atol=1.5)


def test_an_image_keeps_its_orientation_and_takes_the_shape_of_its_mask(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8], image[:8, 8:], image[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    mask = np.zeros((30, 40), np.uint8)
    mask[2, 3] = 1
    [[cell, *others]] = draw(tmp_path, make_row(mask, mask, image))
    height, width = cell.shape[:2]
    assert 40 * height == 30 * width and height % 30 == 0
    assert all(other.shape == cell.shape for other in others)
    for (y, x), colour in {
        (1, 1): (250, 0, 0),
        (1, 3): (0, 250, 0),
        (3, 1): (0, 0, 250),
        (3, 3): (0, 0, 0),
    }.items():
        np.testing.assert_array_equal(cell[y * height // 4, x * width // 4], colour)


@pytest.mark.parametrize(
    "shape", [(128, 128), (150, 200), (64, 48), (5, 4), (1000, 700), (1, 900)], ids=str
)
def test_cells_are_about_as_large_whatever_the_masks(tmp_path, shape, texts):
    mask = np.zeros(shape, np.uint8)
    mask[: shape[0] // 2 + 1, : shape[1] // 3] = 1
    path = tmp_path / "panel.png"
    segmentation_panel(path, "", [make_row(mask, mask)], ONE)
    with Image.open(path) as file:
        assert 640 <= file.width < 1300 and file.height < 500
    if min(shape) > 1:
        [[cell, *_]] = cells_of(path)
        assert 145 <= max(cell.shape) <= 295
        assert cell.shape[0] / cell.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.01)


def test_colours_are_told_apart_by_colour_blind_readers():
    # Full protanopia and deuteranopia after Machado, Oliveira and Fernandes (2009), linear RGB.
    blind = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    pairs = [
        (pictures.TRUTH, pictures.PREDICTION),
        *itertools.combinations((pictures.MISSED, pictures.TOO_MUCH, pictures.WRONG_CLASS), 2),
        *itertools.combinations(pictures.CLASSES, 2),
    ]
    for matrix in (np.eye(3), *map(np.array, blind.values())):
        for pair in pairs:
            seen = [np.clip(matrix @ (rgb(c) / 255) ** 2.2, 0, 1) ** (1 / 2.2) for c in pair]
            assert np.linalg.norm(seen[0] - seen[1]) > 0.15, pair


# --- several classes ----------------------------------------------------------------------------


def test_every_class_has_its_colour_and_a_confusion_its_own(tmp_path, texts):
    truth, predicted = np.zeros((2, 20, 26), np.uint8)
    truth[3:15, 4:12], truth[3:15, 12:20] = 1, 2
    predicted[3:15, 4:15], predicted[6:18, 15:20] = 1, 2
    [[image, left, middle, error]] = draw(tmp_path, make_row(truth, predicted), names=THREE)
    for cell, mask in ((left, truth), (middle, predicted)):
        expected = image.copy()
        for number in (1, 2):
            line = outline(enlarged(mask, cell) == number)
            expected[line] = rgb(pictures.CLASSES[number - 1])
        np.testing.assert_array_equal(cell, expected)
    t, p = enlarged(truth, error), enlarged(predicted, error)
    kinds = [(t > 0) & (p == 0), (t == 0) & (p > 0), (t == 2) & (p == 1), t == p]
    shades = [np.unique(error[kind], axis=0) for kind in kinds]
    assert [len(shade) for shade in shades] == [1, 1, 1, 1]
    assert len(np.unique(np.concatenate(shades), axis=0)) == 4
    assert {"anterior", "posterior", "missed", "too much", "wrong class"} <= set(texts)
    assert "background" not in texts


def test_many_classes_have_colours_of_their_own(tmp_path, texts):
    names = ("background", *(f"structure number {i}" for i in range(1, 31)))
    mask = np.zeros((40, 40), np.uint8)
    for number in range(1, 31):
        row, column = divmod(number - 1, 6)
        mask[8 * row : 8 * row + 5, 6 * column : 6 * column + 5] = number
    [[image, left, *_]] = draw(tmp_path, make_row(mask, mask), names=names)
    assert len(np.unique(left[(left != image).any(-1)], axis=0)) == 30
    assert set(names[1:]) <= set(texts)


# --- volumes ------------------------------------------------------------------------------------


def test_a_volume_is_shown_in_the_planes_through_the_middle_of_its_mask(tmp_path, texts):
    truth = np.zeros((40, 56, 72), np.uint8)
    truth[5:16, 20:31, 41:52] = 1  # centre 10, 25, 46
    truth[10, 25, 60:64], truth[10, 40, 46], truth[30, 25, 46] = 1, 1, 1  # in two planes each
    predicted = truth.copy()
    predicted[5:16, 20:31, 41:52] = 0
    depth, height, width = np.indices((20, 28, 36))
    image = (5 * depth + 2 * height + width)[..., None].astype(np.uint8)
    lines = draw(tmp_path, make_row(truth, predicted, image))
    assert len(lines) == 3
    times = {line[0].shape[0] // size for line, size in zip(lines, (56, 40, 40), strict=True)}
    assert len(times) == 1
    planes = [(mask[10], mask[:, 25], mask[:, :, 46]) for mask in (truth, predicted)]
    slices = [image[5], image[:, 12], image[:, :, 23]]
    for line, t, p, part in zip(lines, *planes, slices, strict=True):
        for cell, mask in ((line[1], t), (line[2], p)):
            border = outline(enlarged(mask, cell) == 1)
            np.testing.assert_array_equal((cell != line[0]).any(-1), border)
        missed = enlarged(t & ~p, line[3]) == 1
        blue = line[3][..., 2] < line[3][..., 0].astype(int) - 20  # yellow has little of it
        np.testing.assert_array_equal(blue, missed)
        shown = np.array(Image.fromarray(line[0]).resize(part.shape[1::-1], Image.Resampling.BOX))
        inner = (slice(1, -1), slice(1, -1))  # a ramp resized is a ramp, but at the border
        np.testing.assert_allclose(shown[inner], np.repeat(part, 3, -1)[inner], atol=1)
    where = [("D = 10", "H down", "W right"), ("H = 25", "D down", "W right")]
    where.append(("W = 46", "D down", "H right"))
    joined = "\n".join(texts)
    assert all("\n".join(names) in joined for names in where)


def test_a_volume_without_a_true_mask(tmp_path, texts):
    image = np.full((12, 14, 16, 1), 90, np.uint8)
    truth, predicted = np.zeros((2, 24, 28, 32), np.uint8)
    predicted[2:5, 3:6, 4:7] = 1
    draw(tmp_path, make_row(truth, predicted, image))
    assert {"D = 3", "H = 4", "W = 5"} <= set(texts)
    draw(tmp_path, make_row(truth, truth, image, dice=math.nan))
    assert {"D = 12", "H = 14", "W = 16", "Dice -"} <= set(texts)


# --- texts --------------------------------------------------------------------------------------


def test_what_is_written(tmp_path, texts):
    row = make_row(letter_f(), letter_f(), name="Orléans,\n scan 7", dice=0.8765)
    draw(tmp_path, row, title="fedhelp, seed 0")
    assert texts == [
        "fedhelp, seed 0",
        *("lung, truth", "lung, prediction", "missed", "too much"),
        *("image", "truth", "prediction", "error"),
        *("Orleans, scan 7", "Dice 0.876"),
    ]


def test_long_texts_fit(tmp_path, texts):
    row = make_row(letter_f(), letter_f(), name="first " + "x" * 400 + " last")
    names = ("background", *(f"{letter * 150} end" for letter in "abc"))
    title = " ".join(f"word{i}" for i in range(80)) + " " + "y" * 300
    draw(tmp_path, row, names=names, title=title)
    words = " ".join(texts).split()
    assert [word for word in words if word.startswith("word")] == title.split()[:80]
    [name] = [text for text in texts if text.startswith("first x")]
    assert "..." in name and name.endswith("x last")
    assert sum(text.endswith(" end") for text in texts) == 3


def test_many_rows(tmp_path):
    rows = []
    for i in range(50):
        mask = np.zeros((20, 20), np.uint8)
        mask[i % 20, i // 20 :] = 1
        rows.append(make_row(mask, mask, np.full((8, 8, 3), 4 * i, np.uint8)))
    lines = draw(tmp_path, *rows)
    assert len(lines) == 50
    for i, (image, left, *_) in enumerate(lines):
        assert (image == 4 * i).all()
        line = outline(enlarged(rows[i].truth, left) == 1)
        np.testing.assert_array_equal((left != image).any(-1), line)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        segmentation_panel(tmp_path / "panel.png", "", [], ONE)
