"""MedMNIST .npz files, split over clients by fractions."""

from collections.abc import Sequence

import numpy as np

from fedhelp_jax.data.images import existing_path, resize_arrays
from fedhelp_jax.data.npz import name_labels, read_npz, take_images, take_labels
from fedhelp_jax.data.partition import partition, rng_for, split_validation
from fedhelp_jax.data.types import ClientSplit, FederatedDataset
from fedhelp_jax.errors import UserError

_PARTS = ("train", "val", "test")


def load_medmnist(
    path: str | None,
    *,
    fractions: Sequence[float],
    image_size: int,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
) -> FederatedDataset:
    """Returns a MedMNIST data set over `len(fractions)` clients, IID.

    The official train and validation splits are pooled and dealt out by `fractions` for
    training; the official test split is dealt out by the same fractions for testing. Every
    client gets at least one example of either.

    Args:
        path: `data.dir`, an .npz file with {train,val,test}_{images,labels}.
        fractions: Each client's share; positive, with sum 1.
        image_size: Height and width of the result.
        validation_fraction: Share of a client's training examples held out for validation.
        max_train: At most so many training examples per client; None keeps all.
        seed: The run's seed.

    Raises:
        UserError: The file is missing or not as described, or a value is not usable.

    Notes:
        MedMNIST files hold no patient ids, so a validation split cannot be grouped.
    """
    file = existing_path(path, "data.dir", "a MedMNIST .npz file")
    where = f"data.dir: {file}"
    arrays = read_npz(file, "data.dir")
    images = {part: take_images(arrays, f"{part}_images", where) for part in _PARTS}
    labels = {
        part: take_labels(arrays, f"{part}_labels", len(images[part]), where) for part in _PARTS
    }
    if len({part.shape[1:] for part in images.values()}) > 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    pool_labels = np.concatenate([labels[part] for part in _PARTS])

    num_test = len(labels["test"])
    num_train = len(pool_labels) - num_test
    trains = partition(num_train, fractions, rng_for(seed, "medmnist train"))
    tests = partition(num_test, fractions, rng_for(seed, "medmnist test"))
    clients = []
    for number, (train, test) in enumerate(zip(trains, tests, strict=True)):
        train, validation = split_validation(
            train,
            train,
            validation_fraction=validation_fraction,
            max_train=max_train,
            seed=seed,
            client=number,
        )
        test = (test + num_train).astype(np.int32)
        clients.append(ClientSplit(f"client_{number}", train, validation, test))
    return FederatedDataset(
        name=file.stem,
        synthetic=False,
        images=resize_arrays(np.concatenate([images[part] for part in _PARTS]), image_size),
        labels=pool_labels,
        label_names=name_labels(file, pool_labels, where),
        clients=tuple(clients),
    )
