"""MedMNIST .npz files, shared out among clients."""

import numpy as np

from fedhelp_jax.data.images import existing_path, resize_arrays
from fedhelp_jax.data.npz import name_labels, read_npz, take_images, take_labels
from fedhelp_jax.data.partition import rng_for, split_validation
from fedhelp_jax.data.sharing import Sharing, share_out, share_out_alike
from fedhelp_jax.data.types import ClientSplit, FederatedDataset
from fedhelp_jax.errors import UserError

_PARTS = ("train", "val", "test")


def load_medmnist(
    path: str | None,
    *,
    sharing: Sharing,
    image_size: int,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
) -> FederatedDataset:
    """Returns a MedMNIST data set over clients.

    The official train and validation splits are pooled and shared out for training. The official
    test split is dealt out by the same fractions, or such that a client's classes are as in its
    training examples. Every client gets at least one example of either.

    Args:
        path: `data.dir`, an .npz file with {train,val,test}_{images,labels}.
        sharing: How the examples are shared out.
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
    train_labels, test_labels = pool_labels[:num_train], pool_labels[num_train:]
    trains = share_out(train_labels, sharing, rng_for(seed, "medmnist train"))
    test_rng = rng_for(seed, "medmnist test")
    if sharing.by == "fractions":
        tests = share_out(test_labels, sharing._replace(min_examples=1), test_rng)
    else:
        tests = share_out_alike([train_labels[own] for own in trains], test_labels, test_rng)
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
