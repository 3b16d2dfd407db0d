"""MedMNIST .npz files, shared out among clients."""

import numpy as np

from fedhelp_jax.data.clients import Examples, Splitting, make_clients
from fedhelp_jax.data.images import existing_path, resize_arrays
from fedhelp_jax.data.npz import name_labels, read_npz, take_images, take_labels
from fedhelp_jax.data.sharing import Sharing
from fedhelp_jax.data.types import FederatedDataset
from fedhelp_jax.errors import UserError

_PARTS = ("train", "val", "test")


def load_medmnist(
    path: str | None,
    *,
    image_size: int,
    sharing: Sharing,
    splitting: Splitting,
) -> FederatedDataset:
    """Returns a MedMNIST data set over clients.

    The official train and validation splits are pooled and shared out for training, the official
    test split for testing, as `make_clients` does it. Every client gets one example of either.

    Args:
        path: `data.dir`, an .npz file with {train,val,test}_{images,labels}.
        image_size: Height and width of the result.
        sharing: How the examples are shared out.
        splitting: How each client's are split.

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

    pool = resize_arrays(np.concatenate([images[part] for part in _PARTS]), image_size)
    is_test = np.arange(len(pool)) >= len(pool) - len(labels["test"])
    return FederatedDataset(
        name=file.stem,
        synthetic=False,
        images=pool,
        labels=pool_labels,
        label_names=name_labels(file, pool_labels, where),
        clients=make_clients(
            Examples(pool, pool_labels, np.arange(len(pool)), is_test, {}),
            sharing,
            splitting,
            name="medmnist",
            where=where,
        ),
    )
