"""Private and public data from a folder or zip file of images, with or without a table."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError, first_of, suggest
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.clients import (
    GROUP,
    SITE,
    Column,
    Examples,
    Splitting,
    make_clients,
)
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.images import existing_path, load_images, load_masks, native_images
from fedhelp_jax.data.readers.listing import Entry, list_images
from fedhelp_jax.data.readers.masks import check_aspects, class_masks
from fedhelp_jax.data.readers.npz import public_subset
from fedhelp_jax.data.readers.tables import group_of, is_unknown
from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset
from fedhelp_jax.settings.schema import DataConfig, PublicConfig

FOREGROUND = ("foreground",)
_OWN = ("image", "label", "mask", "split")  # columns from which clients cannot be made

logger = logging.getLogger(__name__)


class _Read(NamedTuple):
    """The usable examples of a folder."""

    entries: list[Entry]
    images: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    sha256: tuple[str, ...]
    left_out: tuple[BadExample, ...]
    left_out_images: np.ndarray | None
    source: Path
    facts: tuple[tuple[str, str], ...]


def load_folder(
    config: DataConfig, sharing: Sharing, splitting: Splitting, *, masks: bool, bad: Bad
) -> FederatedDataset:
    """Returns the clients' private data from a folder or zip file of images.

    If sites are known, they are the clients by default. The table or the folders define the splits;
    if they do not, splits are drawn by whole groups.

    Args:
        config: `data` of the run: `path`, `table`, `columns`, `label_names`, `image_size`.
        sharing: How examples are assigned to clients.
        splitting: How each client's examples are split.
        masks: Whether labels are masks of one foreground class rather than classes.
        bad: Collects images and masks that cannot be used.

    Raises:
        UserError: A file, column or value is missing or not as described.
    """
    read = _read(config, "data", config.image_size, masks, bad, config.cache_dir, hashed=False)
    if read.labels is None or read.label_names is None:
        what = "masks, such as masks/ID.png" if masks else "labels: a column label, or a folder"
        raise UserError(f"data.path: {read.source} has no {what}, and private images need them")
    groups, columns = _columns(read.entries, config.columns.site or SITE)
    sides = np.array([entry.values.get("split", "") for entry in read.entries])
    if (sides == "").any() and (sides != "").any():
        unknown = read.entries[int(np.argmax(sides == ""))].id
        raise UserError(f"data.path: {read.source}: {unknown} is on no side of the split")
    where = f"data.path: {read.source}"
    examples = Examples(
        images=read.images,
        labels=None if masks else read.labels,
        groups=groups,
        is_test=sides == "test" if (sides == "test").any() else None,
        columns=columns,
        names=[entry.id for entry in read.entries],
    )
    if GROUP not in columns:
        logger.warning(
            "%s: no column says which patient an image is of (data.columns.group); a patient with "
            "several images may be on both sides of the split",
            where,
        )
    name = read.source.stem
    if (sides == "validation").any():
        # All other examples are for training: nothing more is held out for validation.
        splitting = splitting._replace(validation_fraction=0.0)
    clients = make_clients(examples, sharing, splitting, name=name, where=where)
    if (sides == "validation").any():
        clients = tuple(_with_validation(client, sides) for client in clients)
    return FederatedDataset(
        name=name,
        synthetic=False,
        images=read.images,
        labels=read.labels,
        label_names=read.label_names,
        clients=clients,
        left_out=read.left_out,
        left_out_images=read.left_out_images,
        facts=(*read.facts, *_about_groups(groups, clients, GROUP in columns)),
    )


def load_folder_public(
    config: PublicConfig,
    image_size: int,
    *,
    masks: bool,
    cache_dir: str | None,
    bad: Bad,
) -> PublicDataset:
    """Returns public data from a folder or zip file of images, labelled or not.

    A subset is the same for every seed, so that a study over seeds queries the teacher only once.
    Images at their native size stay in the files, and are decoded again when a teacher is queried.

    Args:
        config: `public` of the run.
        image_size: Height and width of the result.
        masks: Whether to use only the images that have a mask, with the masks as labels.
        cache_dir: Folder of the image cache; None uses the default.
        bad: Collects images and masks that cannot be used. If they are skipped, all images are
            decoded, so that the subset is drawn from usable examples.

    Raises:
        UserError: A file, column or value is unusable, or there are too few images.
    """
    read = _read(
        config, "public", image_size, masks, bad, cache_dir, hashed=True, most=config.num_examples
    )
    return PublicDataset(
        name=read.source.stem,
        synthetic=False,
        images=read.images,
        labels=read.labels,
        label_names=read.label_names,
        sha256=read.sha256,
        originals=native_images(read.source, [e.image for e in read.entries], "public.path"),
        left_out=read.left_out,
        facts=read.facts,
    )


def _read(
    config: DataConfig | PublicConfig,
    section: str,
    image_size: int,
    masks: bool,
    bad: Bad,
    cache_dir: str | None,
    *,
    hashed: bool,
    most: int | None = None,
) -> _Read:
    key = f"{section}.path"
    source = existing_path(config.path, key, "a folder or zip file of images")
    table = None
    if config.table is not None:
        table = existing_path(config.table, f"{section}.table", "a CSV or Parquet file")
    columns = vars(config.columns)
    entries = list_images(source, table, columns, (key, f"{section}.table"))
    if masks:
        entries = _with_masks(entries, source, key, every=section == "data")
    elif section == "data":
        entries = _labelled(entries, f"{key}: {source}")
    if most is not None and not bad.skip:
        entries = [entries[i] for i in public_subset(len(entries), most, source).tolist()]
    names, mask_names = [e.image for e in entries], [e.mask for e in entries]
    where = f"{key}: {source}"
    labels, label_names = None, None
    if masks:
        labels = load_masks(source, mask_names, cache_dir=cache_dir, key=key, bad=bad)
        label_names = tuple(config.label_names) or FOREGROUND
    else:
        labels, label_names = _classes(entries, tuple(config.label_names), where)
    decoded = load_images(
        source, names, image_size, hashed=hashed, cache_dir=cache_dir, key=key, bad=bad
    )
    if masks:
        assert labels is not None
        check_aspects(decoded.sides, labels.shape[1:], names, mask_names, where, bad)
        labels = class_masks(labels, label_names or FOREGROUND, mask_names, where, bad)
    bad.check(len(entries), where)

    sites = _column([e.values.get(SITE, "") for e in entries], config.columns.site or SITE)

    def describe(place: int) -> BadExample:
        entry = entries[place]
        files = f"{entry.image} {entry.mask}" if masks else entry.image
        site = int(sites.codes[place])
        client = str(sites.names[site]) if site >= 0 else ""
        return BadExample(entry.values.get("split", ""), client, entry.id, files)

    left_out, left_out_images = bad.listed(describe), bad.dropped(decoded.images)
    kept, images = bad.drop(entries), bad.drop(decoded.images)
    sha256 = [*bad.drop(list(decoded.sha256))] if hashed else []
    labels = None if labels is None else bad.drop(labels)
    if most is not None and bad.skip:
        chosen = public_subset(len(kept), most, source)
        kept, sha256 = [kept[i] for i in chosen], [sha256[i] for i in chosen]
        images, labels = images[chosen], None if labels is None else labels[chosen]
    facts = (("files", str(source)), ("sizes", _sizes(bad.drop(decoded.sides))))
    return _Read(
        *(kept, images, labels, label_names, tuple(sha256), left_out, left_out_images),
        source=source,
        facts=facts,
    )


def _sizes(sides: np.ndarray) -> str:
    """Describes the widths and heights of images before they were resized."""
    if not len(sides):
        return "none"
    low, high = sides.min(axis=0), sides.max(axis=0)
    if (low == high).all():
        return f"all {low[1]}x{low[0]}"
    return f"{low[1]} to {high[1]} wide, {low[0]} to {high[0]} high"


def _about_groups(
    groups: np.ndarray, clients: Sequence[ClientSplit], known: bool
) -> tuple[tuple[str, str], ...]:
    """Describes how many groups there are, and how many have both training and test examples."""
    if not known:
        return (("groups", "none: an example stands for itself"),)
    sides = [np.concatenate([getattr(c, side) for c in clients]) for side in ("train", "test")]
    both = np.intersect1d(groups[sides[0]], groups[sides[1]])
    text = f"{len(np.unique(groups))}, {len(both) or 'none'} of them both in train and in test"
    return (("groups", text),)


def _with_masks(entries: list[Entry], source: Path, key: str, *, every: bool) -> list[Entry]:
    """Returns the images that have a mask; every private image must have one."""
    missing = [entry.id for entry in entries if not entry.mask]
    if len(missing) == len(entries):
        raise UserError(
            f"{key}: {source} has no mask of its {len(entries)} images, such as "
            f"masks/{entries[0].id}.png or masks/{entries[0].id}_segmentation.png"
        )
    if missing and every:
        raise UserError(
            f"{key}: mask masks/{missing[0]}.png or masks/{missing[0]}_segmentation.png of an "
            f"image is not in {source} ({len(missing)} of {len(entries)} are missing)"
        )
    if missing:
        logger.warning(
            "%s: %d of %d images have no mask: left out", key, len(missing), len(entries)
        )
    return [entry for entry in entries if entry.mask]


def _labelled(entries: list[Entry], where: str) -> list[Entry]:
    """Returns private images after checking that either all or none have a label."""
    unknown = [entry.id for entry in entries if is_unknown(entry.values.get("label", ""))]
    if unknown and len(unknown) < len(entries):
        raise UserError(
            f"{where}: {len(unknown)} of {len(entries)} images have no label, such as {unknown[0]}"
        )
    return entries


def _classes(
    entries: Sequence[Entry], names: tuple[str, ...], where: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Returns the class number of each image and the classes' names; None if any class is unknown.

    Labels that are nonnegative integers are the class numbers themselves. Words are numbered in the
    order of `names` or, without names, in alphabetical order.
    """
    texts = [entry.values.get("label", "") for entry in entries]
    if any(map(is_unknown, texts)):
        return None, None
    if all(text.isdecimal() for text in texts) and not set(texts) <= set(names):
        labels = np.array([int(text) for text in texts], np.int32)
        count = len(names) or int(labels.max()) + 1
        if labels.max() >= count:
            bad = entries[int(labels.argmax())]
            raise UserError(
                f"{where}: label {labels.max()} of {bad.id} is not in 0..{count - 1}, the places "
                "of label_names"
            )
        if count > 1000 and not names:
            raise UserError(f"{where}: label {labels.max()} is no class; classes count from 0")
        return labels, names or tuple(map(str, range(count)))
    known = names or tuple(sorted(set(texts)))
    place = {name: number for number, name in enumerate(known)}
    for text, entry in zip(texts, entries, strict=True):
        if text not in place:
            raise UserError(
                f"{where}: label {text!r} of {entry.id} is not one of {first_of(known)}"
                f"{suggest(text, known)}"
            )
    return np.array([place[text] for text in texts], np.int32), known


def _columns(entries: Sequence[Entry], site_name: str) -> tuple[np.ndarray, dict[str, Column]]:
    """Returns the group of each image, and the columns from which clients can be made."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.values))
    columns: dict[str, Column] = {}
    for name in names:
        texts = [entry.values.get(name, "") for entry in entries]
        if name in _OWN or all(map(is_unknown, texts)):
            continue
        columns[name] = _column(texts, site_name if name == SITE else None)
    texts = [entry.values.get(GROUP, "") for entry in entries]
    own = [group_of(text, entry.id) for text, entry in zip(texts, entries, strict=True)]
    known, codes = np.unique(np.array(own), return_inverse=True)
    if GROUP in columns:
        columns[GROUP] = Column(codes, known.tolist())
    return codes, columns


def _column(texts: Sequence[str], site_name: str | None) -> Column:
    """Returns the values of a column.

    Sites that are numbers are their own codes, so that the random draws for site 3 do not depend on
    whether sites 1 and 2 are present. Site 3 of the column "center" is called "center_3".

    Args:
        texts: The value of each example.
        site_name: Name of the table's column of sites; None for any other column.
    """
    if site_name is not None and all(text.isdecimal() and len(text) < 7 for text in texts):
        codes = np.array([int(text) for text in texts])
        return Column(codes, [f"{site_name}_{i}" for i in range(int(codes.max()) + 1)])
    unknown = np.array([is_unknown(text) for text in texts])
    known, found = np.unique(np.array(texts)[~unknown], return_inverse=True)
    codes = np.full(len(texts), -1)
    codes[~unknown] = found
    return Column(codes, known.tolist())


def _with_validation(client: ClientSplit, sides: np.ndarray) -> ClientSplit:
    """Returns the client with the validation examples that the table or the folders define."""
    held = sides[client.train] == "validation"
    return client._replace(train=client.train[~held], validation=client.train[held])
