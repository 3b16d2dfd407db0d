"""Fed-ISIC2019: dermoscopy images of the ISIC 2019 challenge, one client per centre."""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.fractions import clients_of_sites
from fedhelp_jax.data.readers.files import find_images, find_masks
from fedhelp_jax.data.readers.images import existing_path, load_images, load_masks
from fedhelp_jax.data.readers.masks import check_aspects, class_masks
from fedhelp_jax.data.readers.tables import group_of, read_table
from fedhelp_jax.data.types import ClientSplit, FederatedDataset

LABEL_NAMES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
LESION = ("lesion",)

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line of the split file; an image of no known `lesion` has one of its own."""

    image_id: str
    target: int
    center: int
    fold: str
    lesion: str


def load_fed_isic2019(
    path: str | None,
    split_csv: str | None,
    *,
    split: str,
    image_size: int,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
    cache_dir: str | None,
    masks: bool = False,
    bad: Bad | None = None,
) -> FederatedDataset:
    """Returns Fed-ISIC2019, one client `centre_<k>` per centre that has images.

    A centre none of whose images is in `path` is left out, with a warning. Labels are diagnoses,
    or the lesions' masks; the clients' splits are the same.

    Args:
        path: `data.path`, a folder or zip file with `images/<id>` or `<id>`, with the ending
            of any picture.
        split_csv: `data.split_csv`, a file with columns image_id, target (0..7), center,
            fold (train or test), lesion_id.
        split: "official" keeps the published folds, in which some lesions have images on both
            sides; "grouped" drops the training images whose lesion is in any test fold.
        image_size: Height and width of the result.
        validation_fraction: Share of a centre's training images held out, by lesion.
        max_train: At most so many training examples per centre; None keeps all.
        seed: The run's seed.
        cache_dir: Folder of the image cache; None takes the default.
        masks: Labels are masks, uint8 [N, H, W] of one size and of the aspect of the images, from
            `masks/<id>` or `masks/<id>_segmentation` in `path`.
        bad: Is told of images and masks that cannot be used; None refuses the first.

    Raises:
        UserError: A file, column, value, image or mask is missing or not as described.

    References:
        du Terrail et al., FLamby, NeurIPS 2022, arXiv:2210.04620.
    """
    if split not in ("grouped", "official"):
        raise UserError(f"data.split must be grouped or official, got {split!r}")
    bad = bad or Bad()
    source = existing_path(path, "data.path", "a folder or zip file of images")
    table = existing_path(split_csv, "data.split_csv", "the Fed-ISIC2019 split file")
    rows, has_lesions = read_split(table)
    rows, files = _with_images(rows, source, table)
    # Sorted, so that nothing below depends on the order of lines.
    rows.sort(key=lambda row: (row.center, row.image_id))
    if split == "grouped" and not has_lesions:
        raise UserError(
            f"data.split_csv: {table} has no column lesion_id, which data.split=grouped needs; "
            "use data.split=official"
        )

    def share_out(rows: list[Row]) -> tuple[ClientSplit, ...]:
        return clients_of_sites(
            np.array([row.center for row in rows]),
            _client,
            is_test=np.array([row.fold == "test" for row in rows]),
            groups=np.array([row.lesion for row in rows]),
            split=split,
            validation_fraction=validation_fraction,
            max_train=max_train,
            seed=seed,
            where=f"data.split_csv: {table}",
        )

    # Before thousands of images are decoded, since it may be refused.
    clients = share_out(rows)
    names = [files[row.image_id] for row in rows]
    # Masks first, since missing ones are found sooner than images are decoded.
    mask_names = _find_masks(rows, source, table) if masks else []
    where = f"data.path: {source}"
    labels = np.array([row.target for row in rows], np.int32)
    if masks:
        labels = load_masks(source, mask_names, cache_dir=cache_dir, bad=bad)
    decoded = load_images(source, names, image_size, cache_dir=cache_dir, bad=bad)
    if masks:
        check_aspects(decoded.sides, labels.shape[1:], names, mask_names, where, bad)
        labels = class_masks(labels, LESION, mask_names, where, bad)
    bad.check(len(rows), where)

    def describe(place: int) -> BadExample:
        row, read = rows[place], [names[place], *mask_names[place : place + 1]]
        return BadExample(row.fold, _client(row.center), row.image_id, " ".join(read))

    left_out, left_out_images = bad.listed(describe), bad.dropped(decoded.images)
    if left_out:
        rows = bad.drop(rows)
        clients = share_out(rows)
    tested = {row.lesion for row in rows if row.fold == "test"}
    leaks = {row.lesion for row in rows if row.fold == "train"} & tested
    if split == "official":
        count = str(len(leaks)) if has_lesions else "an unknown number of"
        logger.warning("data.split=official: %s lesions have images in both train and test", count)
    return FederatedDataset(
        name="fed_isic2019",
        synthetic=False,
        images=bad.drop(decoded.images),
        labels=bad.drop(labels),
        label_names=LESION if masks else LABEL_NAMES,
        clients=clients,
        left_out=left_out,
        left_out_images=left_out_images,
    )


def _client(center: int) -> str:
    return f"centre_{center}"


def read_split(table: Path) -> tuple[list[Row], bool]:
    """Returns the lines of a split file, and whether it has lesion ids.

    Raises:
        UserError: The file is no such table, or a line holds an unusable value.
    """
    where = f"data.split_csv: {table}"
    try:
        data = table.read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    columns, lines = read_table(data, ("image_id", "target", "center", "fold"), where)
    # The heading is line 1.
    rows = [_parse(line, f"{where} row {n}") for n, line in enumerate(lines, 2)]
    image_id, count = Counter(row.image_id for row in rows).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where} lists image {image_id} {count} times")
    return rows, "lesion_id" in columns


def _parse(line: dict[str, str], where: str) -> Row:
    image_id, target, center, fold = (
        line[column] for column in ("image_id", "target", "center", "fold")
    )
    # No path separators, or a line could reach outside the folder.
    if not re.fullmatch(r"\w[\w.-]*", image_id, re.ASCII):
        raise UserError(f"{where}: image_id {image_id!r} is not an image's name")
    if target not in tuple("01234567"):
        raise UserError(f"{where} ({image_id}): target must be in 0..7, got {target!r}")
    if not re.fullmatch(r"[0-9]{1,6}", center):
        raise UserError(f"{where} ({image_id}): center must be a whole number, got {center!r}")
    if fold not in ("train", "test"):
        raise UserError(f"{where} ({image_id}): fold must be train or test, got {fold!r}")
    lesion = group_of(line.get("lesion_id", ""), image_id)
    return Row(image_id, int(target), int(center), fold, lesion)


def _with_images(rows: list[Row], source: Path, table: Path) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of centres that have images, and where each image is."""
    files = find_images(source, (row.image_id for row in rows))
    present = {row.center for row in rows if row.image_id in files}
    if not present:
        raise UserError(
            f"data.path: {source} has none of the {len(rows)} images of {table}, "
            f"such as {rows[0].image_id}.jpg or images/{rows[0].image_id}.jpg"
        )
    absent = sorted({row.center for row in rows} - present)
    if absent:
        logger.warning("data.path: %s has no image of centres %s: left out", source, absent)
    rows = [row for row in rows if row.center in present]
    missing = [row.image_id for row in rows if row.image_id not in files]
    if missing:
        raise UserError(
            f"data.path: image {missing[0]} of {table} is not in {source} "
            f"({len(missing)} of {len(rows)} are missing)"
        )
    return rows, files


def _find_masks(rows: list[Row], source: Path, table: Path) -> list[str]:
    """Returns where the mask of each row's image is."""
    files = find_masks(source, (row.image_id for row in rows))
    missing = [row.image_id for row in rows if row.image_id not in files]
    if missing:
        raise UserError(
            f"data.path: mask masks/{missing[0]}.png or masks/{missing[0]}_segmentation.png of an "
            f"image of {table} is not in {source} ({len(missing)} of {len(rows)} are missing)"
        )
    return [files[row.image_id] for row in rows]
