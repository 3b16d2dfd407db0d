"""Contact sheets: small images of each client, to see what a run would learn from."""

import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedhelp_jax.core.storage import replaced
from fedhelp_jax.data.types import ClientSplit, FederatedDataset
from fedhelp_jax.report.page.figures import shortened

_CELL, _GAP, _CAPTION, _COLUMNS = 112, 8, 34, 8
_INK, _PAPER = "#222222", "#FFFFFF"
_SPLITS = ("train", "validation", "test")


def write_contact_sheets(folder: Path, dataset: FederatedDataset, most: int = 32) -> list[Path]:
    """Writes ``CLIENT.png`` for each client: images from all of its splits, with their classes.

    Args:
      folder: Folder for the files.
      dataset: The data. For volumes, the middle plane is shown.
      most: Approximate number of images per client, shared among its splits in proportion.

    Returns:
      The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, client in enumerate(dataset.clients):
        name = re.sub(r"[^\w.-]+", "_", client.name) or f"client_{number}"
        files.append(folder / f"{name}.png")
        with replaced(files[-1]) as beside:
            _sheet(dataset, client, most).save(beside, format="PNG")
    return files


def _sheet(dataset: FederatedDataset, client: ClientSplit, most: int) -> Image.Image:
    shown = _chosen(client, most)
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (split, index) in enumerate(shown):
        row, column = divmod(place, columns)
        x, y = _GAP + column * (_CELL + _GAP), _GAP + row * (_CELL + _CAPTION + _GAP)
        sheet.paste(_thumbnail(dataset.images[index]), (x, y))
        for line, text in enumerate((_class_of(dataset, index), split)):
            draw.text((x, y + _CELL + 2 + 15 * line), _fitted(draw, text, font), _INK, font)
    return sheet


def _chosen(client: ClientSplit, most: int) -> list[tuple[str, int]]:
    """Returns images spread evenly over each split, at least one from each non-empty split."""
    total = sum(len(getattr(client, split)) for split in _SPLITS)
    chosen = []
    for split in _SPLITS:
        members = getattr(client, split)
        count = min(len(members), max(1, round(most * len(members) / total)))
        if count:
            places = np.linspace(0, len(members) - 1, count).round().astype(int)
            chosen += [(split, int(index)) for index in members[places]]
    return chosen


def _thumbnail(image: np.ndarray) -> Image.Image:
    if image.ndim == 4:  # a volume
        image = image[len(image) // 2]
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = (255 * (image - low) / ((high - low) or 1)).astype(np.uint8)
    if image.shape[-1] != 3:
        image = np.repeat(image[..., :1], 3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resample = Image.Resampling.NEAREST if picture.width < _CELL else Image.Resampling.BICUBIC
    return picture.resize((_CELL, _CELL), resample)


def _class_of(dataset: FederatedDataset, index: int) -> str:
    label = dataset.labels[index]
    if label.ndim:
        return f"{(label > 0).mean():.0%} foreground"
    return shortened(dataset.label_names)[int(label)]


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if draw.textlength(text, font) <= _CELL:
        return text
    while text and draw.textlength(f"{text}...", font) > _CELL:
        text = text[:-1]
    return f"{text}..."
