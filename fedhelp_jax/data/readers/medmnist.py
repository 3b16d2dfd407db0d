"""MedMNIST .npz files, split among clients."""

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.clients import Examples, Splitting, make_clients
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.images import existing_path, resize_arrays
from fedhelp_jax.data.readers.npz import name_labels, read_npz, take_all_labels, take_images
from fedhelp_jax.data.types import FederatedDataset

_PARTS = ("train", "val", "test")


def load_medmnist(
    path: str | None,
    *,
    image_size: int,
    sharing: Sharing,
    splitting: Splitting,
    bad: Bad | None = None,
) -> FederatedDataset:
    """Returns a MedMNIST data set, split among clients.

    The official train and validation splits are pooled for training; the official test split is
    for testing. `make_clients` assigns both to clients, each of which gets at least one example of
    either.

    Args:
        path: `data.path`, an .npz file with {train,val,test}_{images,labels}.
        image_size: Height and width of the result.
        sharing: How the examples are assigned to clients.
        splitting: How each client's examples are split.
        bad: Collects labels that cannot be used; None raises an error for the first.

    Raises:
        UserError: The file is missing or not as described, or a value is invalid.

    Notes:
        MedMNIST files hold no patient ids, so a validation split cannot be grouped.
    """
    bad = bad or Bad()
    file = existing_path(path, "data.path", "a MedMNIST .npz file")
    where = f"data.path: {file}"
    arrays = read_npz(file, "data.path")
    images = {part: take_images(arrays, f"{part}_images", where) for part in _PARTS}
    if len({part.shape[1:] for part in images.values()}) > 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    counts = {f"{part}_labels": len(images[part]) for part in _PARTS}
    labels = take_all_labels(arrays, counts, where, bad)
    label_names = name_labels(file, labels, where, bad=bad)
    pool = resize_arrays(np.concatenate([images[part] for part in _PARTS]), image_size)
    bad.check(len(pool), where)
    parts = np.repeat(_PARTS, [len(images[part]) for part in _PARTS])
    is_test = parts == "test"

    def describe(place: int) -> BadExample:
        part = parts[place]
        example = f"{part} {place - int((parts == part).argmax())}"
        return BadExample("test" if is_test[place] else "train", "", example, file.name)

    left_out, left_out_images = bad.listed(describe), bad.dropped(pool)
    pool, labels, is_test = map(bad.drop, (pool, labels, is_test))
    return FederatedDataset(
        name=file.stem,
        synthetic=False,
        images=pool,
        labels=labels,
        label_names=label_names,
        clients=make_clients(
            Examples(pool, labels, np.arange(len(pool)), is_test, {}),
            sharing,
            splitting,
            name="medmnist",
            where=where,
        ),
        left_out=left_out,
        left_out_images=left_out_images,
    )
