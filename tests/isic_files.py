"""A small imitation of Fed-ISIC2019: a table of splits, a zip of images, and their settings."""

import csv
import io
import zipfile

import numpy as np
from PIL import Image

from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.settings.schema import ColumnsConfig, DataConfig

COLUMNS = ("image_id", "target", "center", "fold", "lesion_id")
LABELS = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
CALLED = {"image": "image_id", "label": "target", "site": "center", "split": "fold"}
CALLED |= {"group": "lesion_id"}
FLAGS = " ".join(
    [
        "--config.data.name=folder",
        *(f"--config.data.columns.{column}={name}" for column, name in CALLED.items()),
    ]
)


def isic_config(path, table, *, masks=False, called=CALLED, **settings):
    """Returns the `data` settings for raw Fed-ISIC2019 files, as in configs/fed_isic2019.py."""
    names = ("lesion",) if masks else LABELS
    columns = ColumnsConfig(**called)
    where = {"path": str(path), "table": str(table), "label_names": names, "columns": columns}
    return DataConfig(name="folder", **(where | settings))


def make_rows():
    """Returns the rows of the table.

    Centre 1 has 40 images of 20 lesions; lesions 0 to 2 are in both splits. Centre 4 has 2 images.
    """
    rows = []
    for i in range(40):
        fold = "test" if i >= 30 or i in (0, 2) else "train"
        lesion = i // 2 if i < 30 else 15 + (i - 30) // 2
        rows.append([f"ISIC_{i:03}", i % 8, 1, fold, f"HAM_{lesion}"])
    rows[38][4] = "HAM_2"  # a test image of a lesion whose other two images are in train
    rows.append(["ISIC_100_downsampled", 7, 4, "train", ""])
    rows.append(["ISIC_101", 0, 4, "test", ""])
    return rows


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def mask_of(image_id, shape=(9, 14)):
    """Returns a mask that differs by image and has another resolution than the images."""
    seed = int.from_bytes(image_id.encode()[-4:], "big")
    return np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class IsicFiles:
    """A folder with a split file and a zip of images, which a test can change."""

    def __init__(self, path):
        self.path = path
        self.table = path / "split.csv"
        self.zip = path / "images.zip"
        self.rows = make_rows()
        self.write_zip(row[0] for row in self.rows)

    def write_zip(self, ids):
        with zipfile.ZipFile(self.zip, "w") as file:
            for seed, image_id in enumerate(ids):
                file.writestr(f"images/{image_id}.jpg", jpeg(seed))

    def add_masks(self, **instead):
        """Writes a mask for each image, or the given content instead; None writes nothing."""
        with zipfile.ZipFile(self.zip, "a") as file:
            for number, (image_id, *_) in enumerate(self.rows):
                content = instead.get(image_id, png(255 * mask_of(image_id)))
                end = "_segmentation" if number % 3 else ""
                if content is not None:
                    file.writestr(f"masks/{image_id}{end}.png", content)

    def write_table(self, columns=COLUMNS):
        with self.table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(row[: len(columns)] for row in self.rows)

    def load(self, seed=0, columns=COLUMNS, masks=False, **changes):
        self.write_table(columns)
        called = {column: name for column, name in CALLED.items() if name in columns}
        settings = {"image_size": 8, "cache_dir": str(self.path / "cache"), "called": called}
        settings |= {"path": self.zip, "table": self.table} | changes
        return load_federated(isic_config(masks=masks, **settings), seed, masks=masks)

    def ids(self):
        """Returns the image ids in the order of the pool."""
        return sorted(row[0] for row in self.rows)
