"""Data sets that ``fedhelp data prepare`` has prepared: their official split, a client a site."""

import io
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedhelp_jax.data.cache import Arrays, cached
from fedhelp_jax.data.images import resize
from fedhelp_jax.data.partition import clients_of_sites
from fedhelp_jax.data.types import FederatedDataset
from fedhelp_jax.errors import UserError

PREFIX = "tfds:"

_NEEDED = {"image", "label", "site", "group"}
_AT_ONCE = 256  # examples read before they are decoded


def load_prepared(
    name: str,
    data_dir: str | None,
    *,
    split: str,
    image_size: int,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
    cache_dir: str | None,
) -> FederatedDataset:
    """Returns a prepared data set of images and classes, one client per site.

    Equal to what the reader of the raw files gives, where there is one.

    Args:
        name: `data.name` without its prefix: NAME or NAME/CONFIG.
        data_dir: `data.dir`, where prepared sets lie; None takes TFDS's default.
        split: As of `clients_of_sites`.
        image_size: Height and width of the result.
        validation_fraction: As of `clients_of_sites`.
        max_train: As of `clients_of_sites`.
        seed: The run's seed.
        cache_dir: Folder of the image cache; None takes the default.

    Raises:
        UserError: The set is unknown or not prepared, has no sites, classes or test split, or
            is damaged.
    """
    from fedhelp_jax.data.prepare import builder  # brings TFDS along

    made = builder(name, data_dir)
    folder = Path(made.data_path)
    if not folder.exists():
        raise UserError(
            f"data.name: {name} is not prepared in {made.data_dir_root}: "
            f"fedhelp data prepare {name} --manual_dir=DOWNLOAD --data_dir={made.data_dir_root}"
        )
    features = made.features()
    splits = set(made.info.splits)
    if not _NEEDED <= set(features) or splits != {"train", "test"}:
        raise UserError(
            f"data.name: {name} cannot be trained on yet: it needs images, classes, sites and an "
            "official split in train and test"
        )

    def make() -> Arrays:
        rows = list(_decoded(made, image_size))
        # By site and then by name, so that nothing depends on the order in the files.
        rows.sort(key=lambda row: (row["site"], row["id"]))
        return {
            "images": np.stack([row["image"] for row in rows]),
            "labels": np.array([row["label"] for row in rows], np.int32),
            "sites": np.array([row["site"] for row in rows], np.int32),
            # Numbered in their order, which draws by group depend on.
            "groups": np.unique([row["group"] for row in rows], return_inverse=True)[1],
            "is_test": np.array([row["split"] == "test" for row in rows]),
        }

    count = sum(info.num_examples for info in made.info.splits.values())
    files = sorted(path.name for path in folder.iterdir())
    kinds = {
        "images": ("uint8", (count, image_size, image_size, 3)),
        "labels": ("int32", (count,)),
        "sites": ("int32", (count,)),
        "groups": ("int64", (count,)),
        "is_test": ("bool", (count,)),
    }
    arrays = cached(folder, files, f"prepared {image_size}", kinds, make, cache_dir)
    site_names = features["site"].names
    return FederatedDataset(
        name=made.name,
        synthetic=False,
        images=arrays["images"],
        labels=arrays["labels"],
        label_names=tuple(features["label"].names),
        clients=clients_of_sites(
            arrays["sites"],
            lambda site: site_names[site],
            is_test=arrays["is_test"],
            groups=arrays["groups"],
            split=split,
            validation_fraction=validation_fraction,
            max_train=max_train,
            seed=seed,
            where=f"data.name: {name}",
        ),
    )


def _decoded(made: Any, image_size: int) -> Iterator[dict[str, Any]]:
    """The examples of all splits, images resized."""
    import tensorflow_datasets as tfds

    def decode(example: dict[str, Any]) -> dict[str, Any]:
        with Image.open(io.BytesIO(example["image"])) as image:
            pixels = resize(image.convert("RGB"), image_size)
        return example | {"image": pixels}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in made.info.splits:
            source = made.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            examples = ({**example, "split": split} for example in source)
            while part := list(itertools.islice(examples, _AT_ONCE)):
                yield from pool.map(decode, part)
