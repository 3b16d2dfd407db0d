"""Private and public data from data sets prepared by TensorFlow Datasets.

They are prepared by ``fedhelp data prepare`` or in any other way.
"""

import logging

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.cache import Arrays, cached
from fedhelp_jax.data.partition.clients import (
    GROUP,
    SITE,
    Examples,
    Splitting,
    make_clients,
    make_column,
)
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.images import LazyImages
from fedhelp_jax.data.readers.npz import public_subset
from fedhelp_jax.data.readers.stored_set import StoredSet, base_name, file_name, order_of, stacked
from fedhelp_jax.data.types import FederatedDataset, PublicDataset

logger = logging.getLogger(__name__)


def load_prepared(
    name: str,
    data_dir: str | None,
    *,
    masks: bool,
    image_size: int,
    volume_size: tuple[int, ...],
    sharing: Sharing,
    splitting: Splitting,
    cache_dir: str | None,
    bad: Bad | None = None,
) -> FederatedDataset:
    """Returns a prepared data set as the clients' private data.

    The result equals that of the reader of the raw files, if there is one. Examples are ordered by
    site (by split if there are no sites) and then by name. A split called test is the official test
    split; all other splits are used for training.

    Args:
        name: `data.name` without its prefix: NAME or NAME/CONFIG.
        data_dir: `data.path`, the folder of prepared data sets; None uses TFDS's default.
        masks: Whether labels are masks rather than classes. Masks are resized to the size of the
            result (nearest neighbour).
        image_size: Height and width of the result.
        volume_size: Sides of the result if it is volumes; floating-point volumes stay floats.
        sharing: How examples are assigned to clients.
        splitting: How each client's examples are split.
        cache_dir: Folder of the image cache; None uses the default.
        bad: Collects examples that cannot be used; None raises an error for the first.

    Raises:
        UserError: The data set is unknown, not prepared or damaged, or lacks what is requested.
    """
    bad = bad or Bad()
    stored = StoredSet(name, data_dir, "data.name", masks, image_size, volume_size)
    if stored.target is None:
        raise UserError(
            f"data.name: {name} has no {'masks' if masks else 'classes'} to learn, and private "
            f"examples need them; it has {', '.join(stored.features)}"
        )
    columns = stored.columns()

    def make(bad: Bad) -> Arrays:
        rows = list(stored.rows(stored.all(), hashed=False, skip=bad.skip))
        # Sorted, so that nothing depends on the order in the files.
        rows.sort(key=order_of)
        stored.tell(rows, bad)
        arrays = {
            "images": stacked(rows, "image"),
            "targets": stacked(rows, "target"),
            "ids": np.array([row["id"] for row in rows]),
            "is_test": np.array([row["split"] == "test" for row in rows]),
        }
        for column in columns:
            arrays[f"column {column}"] = np.array([row["columns"][column] for row in rows])
        return arrays

    kinds: dict[str, tuple[str, tuple[int | None, ...]]] = {
        **stored.kinds(stored.count),
        "ids": ("U", (stored.count,)),
        "is_test": ("bool", (stored.count,)),
    }
    for column, names in columns.items():
        kinds[f"column {column}"] = ("U" if names is None else "int64", (stored.count,))
    arrays = cached(stored.folder, stored.files, stored.what, kinds, make, cache_dir, bad)
    where, ids = f"data.name: {name}", arrays["ids"].tolist()
    labels, label_names = stored.labels(arrays["targets"], ids, where, bad)
    bad.check(stored.count, where)
    sites = None
    if SITE in columns and sharing.by in (None, SITE):
        sites = make_column(SITE, arrays[f"column {SITE}"], columns[SITE], ids)

    def describe(place: int) -> BadExample:
        split = ("test" if arrays["is_test"][place] else "train") if "test" in stored.splits else ""
        site = -1 if sites is None else int(sites.codes[place])
        client = "" if sites is None or site < 0 else str(sites.names[site])
        return BadExample(split, client, ids[place], stored.name)

    left_out, left_out_images = bad.listed(describe), bad.dropped(arrays["images"])
    arrays = {name: bad.drop(array) for name, array in arrays.items()}
    labels, ids = bad.drop(labels), bad.drop(ids)
    found = {
        column: make_column(column, arrays[f"column {column}"], names, ids)
        for column, names in columns.items()
    }
    groups = found[GROUP].codes if GROUP in found else np.arange(len(ids))
    examples = Examples(
        images=arrays["images"],
        labels=None if masks else labels,
        groups=groups,
        is_test=arrays["is_test"] if "test" in stored.splits else None,
        columns=found,
        names=ids,
    )
    return FederatedDataset(
        name=file_name(name),
        synthetic=False,
        images=arrays["images"],
        labels=labels,
        label_names=label_names,
        clients=make_clients(examples, sharing, splitting, name=base_name(name), where=where),
        left_out=left_out,
        left_out_images=left_out_images,
    )


def load_prepared_public(
    name: str,
    data_dir: str | None,
    num_examples: int | None,
    *,
    masks: bool,
    image_size: int,
    volume_size: tuple[int, ...],
    cache_dir: str | None,
    bad: Bad | None = None,
) -> PublicDataset:
    """Returns all splits of a prepared data set, labelled or not, as public data.

    Any data set of TFDS's catalogue with an ``image`` can be used. A subset is the same for every
    seed, and only the subset is read. Images at their native size stay in the files.

    Args:
        name: `public.name` without its prefix.
        data_dir: `public.path`, the folder of prepared data sets; None uses TFDS's default.
        num_examples: `public.num_examples`; None means all.
        masks: As in `load_prepared`, like the remaining arguments.
        image_size: Height and width of the result.
        volume_size: Sides of volumes.
        cache_dir: Folder of the image cache.
        bad: Collects examples that cannot be used; None raises an error for the first. If they are
            skipped, the whole data set is read, so that the subset is drawn from usable examples.

    Raises:
        UserError: As in `load_prepared`, or there are too few examples.
    """
    bad = bad or Bad()
    stored = StoredSet(name, data_dir, "public.name", masks, image_size, volume_size)
    places = stored.all()
    # The set of classes must not depend on how many examples are used.
    whole = masks and stored.target is not None and stored.mask_names is None
    whole = whole or (bad.skip and num_examples is not None)
    if not whole:
        chosen = public_subset(stored.count, num_examples, stored.folder)
        places = [places[i] for i in chosen.tolist()]

    def make(bad: Bad) -> Arrays:
        rows = list(stored.rows(places, hashed=True, skip=bad.skip))
        stored.tell(rows, bad)
        arrays = {
            "images": stacked(rows, "image"),
            "sha256": np.array([row.get("sha256", "") for row in rows], "U64"),
            "ids": np.array([row["id"] for row in rows]),
        }
        if stored.target is not None:
            arrays["targets"] = stacked(rows, "target")
        return arrays

    count = len(places)
    kinds = {**stored.kinds(count), "sha256": ("U64", (count,)), "ids": ("U", (count,))}
    what = f"{stored.what} public {None if whole else num_examples}"
    arrays = cached(stored.folder, stored.files, what, kinds, make, cache_dir, bad)
    labels = names = None
    where = f"public.name: {name}"
    if stored.target is not None:
        ids = arrays["ids"].tolist()
        labels, names = stored.labels(arrays["targets"], ids, where, bad, least=-1)
    bad.check(count, where)
    left_out = bad.listed(lambda i: BadExample("", "", str(arrays["ids"][i]), stored.name))
    arrays = {name: bad.drop(array) for name, array in arrays.items()}
    places = bad.drop(places)
    if labels is not None:
        labels = bad.drop(labels)
        if not masks and labels.min() < 0:  # TFDS marks unlabelled examples by -1
            logger.warning("%s: some images have no label: none is used", where)
            labels = names = None
    if whole:
        chosen = public_subset(len(places), num_examples, stored.folder)
        arrays = {name: array[chosen] for name, array in arrays.items()}
        labels = None if labels is None else labels[chosen]
        places = [places[i] for i in chosen.tolist()]
    return PublicDataset(
        name=file_name(name),
        synthetic=False,
        images=arrays["images"],
        labels=labels,
        label_names=names,
        sha256=tuple(arrays["sha256"].tolist()),
        originals=LazyImages(len(places), lambda place: stored.original(places[place])),
        left_out=left_out,
    )
