"""The registries of private and public data sources, by the names that configs use."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.core.registry import Registry
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.clients import Splitting
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.folder import load_folder, load_folder_public
from fedhelp_jax.data.readers.medmnist import load_medmnist
from fedhelp_jax.data.readers.npz import load_npz_public
from fedhelp_jax.data.readers.npz_masks import load_npz_masks
from fedhelp_jax.data.readers.tfds import load_prepared, load_prepared_public
from fedhelp_jax.data.synthetic.phantom_tiles import load_phantom_public
from fedhelp_jax.data.synthetic.phantom_volumes import (
    load_phantom_volume_public,
    load_phantom_volumes,
)
from fedhelp_jax.data.synthetic.phantoms import load_phantoms
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, check_federated, check_public
from fedhelp_jax.settings.checks import PREPARED
from fedhelp_jax.settings.schema import SHARINGS, DataConfig, PublicConfig

logger = logging.getLogger(__name__)

TASKS = ("classification", "segmentation")


class Request(NamedTuple):
    """What a source is asked for in addition to its own settings.

    Attributes:
        seed: The run's seed.
        masks: Whether labels are masks rather than classes of whole images.
        bad: Collects examples that cannot be used.
        image_size: Height and width of public images, equal to those of the private ones.
        volume_size: Sides of public volumes, equal to those of the private ones.
        cache_dir: Folder of the image cache; None uses the default.
    """

    seed: int
    masks: bool
    bad: Bad
    image_size: int = 0
    volume_size: tuple[int, ...] = ()
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A named source of data.

    Attributes:
        load: ``(config, request) -> FederatedDataset``, or ``PublicDataset`` for public data, where
            the config is ``data`` or ``public``.
        about: One-line description.
        needs: Settings that must be given, as pairs of a name and what it must be.
        tasks: Tasks that can be learned from it.
        split_by: The values of ``split_by`` that it supports; None leaves the check to the loader.
    """

    load: Callable[[Any, Request], Any]
    about: str
    needs: tuple[tuple[str, str], ...] = ()
    tasks: tuple[str, ...] = TASKS
    split_by: tuple[str, ...] | None = None


def source(registry: Registry, name: str, key: str) -> Source:
    """Returns the source called `name`, which is the value of the setting `key`.

    ``tfds:NAME`` is a data set prepared by TensorFlow Datasets. A user's own function
    ``(config, request) -> data`` is a source for any task.

    Raises:
        UserError: There is no such source.
    """
    if name.startswith(PREPARED):
        if name == PREPARED:
            raise UserError(f"{key} = {name!r} names no data set: it is {PREPARED}NAME")
        return _PREPARED[registry.kind]
    found = registry.find(name, key)
    if isinstance(found, Source):
        return found
    return Source(found, (getattr(found, "__doc__", None) or "").strip().split("\n", 1)[0])


def load_federated(config: DataConfig, seed: int, *, masks: bool = False) -> FederatedDataset:
    """Returns the private data of all clients, checked.

    Args:
        config: `data` of the run's configuration.
        seed: The run's seed.
        masks: Whether labels are masks rather than classes of whole images.

    Raises:
        UserError: The name is unknown, a file or value is unusable, or a client has no examples.
    """
    request = Request(seed, masks, Bad(config.on_bad_example == "skip"))
    dataset = source(DATA, config.name, "data.name").load(config, request)
    if not isinstance(dataset, FederatedDataset):
        raise UserError(
            f"data.name: {config.name} returned a {type(dataset).__name__}, and no "
            "FederatedDataset (fh.data.from_arrays makes one)"
        )
    _tell_read("data", dataset.name, dataset.images)
    _tell_left_out(dataset.left_out, len(dataset.images), "private")
    gone = {bad.client for bad in dataset.left_out if bad.client}
    if gone := sorted(gone - {client.name for client in dataset.clients}):
        logger.warning("data %s: no example is left of %s", dataset.name, ", ".join(gone))
    dataset = check_federated(dataset)
    return _tested_on_all(dataset) if config.test_on == "all" else dataset


def _tested_on_all(dataset: FederatedDataset) -> FederatedDataset:
    """Returns the data with every client's test images for each client.

    None of them is a training image of anybody: splits are disjoint, and no group is with two
    clients, unless ``data.split = "official"`` allows it.
    """
    tests = np.unique(np.concatenate([client.test for client in dataset.clients]))
    clients = tuple(client._replace(test=tests) for client in dataset.clients)
    return dataset._replace(clients=clients)


def load_public(
    config: PublicConfig,
    image_size: int,
    seed: int,
    *,
    masks: bool = False,
    volume_size: tuple[int, ...] = (24, 32, 24),
    cache_dir: str | None = None,
    skip_bad: bool = False,
) -> PublicDataset:
    """Returns the public images.

    Args:
        config: `public` of the run's configuration.
        image_size: Height and width, equal to those of the private images.
        seed: The run's seed; images that are read rather than generated do not depend on it.
        masks: Whether labels are masks rather than classes of whole images.
        volume_size: Sides of volumes, equal to those of the private ones.
        cache_dir: Folder of the image cache; None uses the default.
        skip_bad: Whether examples that cannot be used are left out rather than refused.

    Raises:
        UserError: The name is unknown, or the file or a value is unusable.
    """
    request = Request(seed, masks, Bad(skip_bad), image_size, volume_size, cache_dir)
    public = source(PUBLIC, config.name, "public.name").load(config, request)
    if not isinstance(public, PublicDataset):
        raise UserError(
            f"public.name: {config.name} returned a {type(public).__name__}, and no PublicDataset "
            "(fh.data.public_from_arrays makes one)"
        )
    _tell_read("public", public.name, public.images)
    _tell_left_out(public.left_out, len(public.images), "public")
    return check_public(public)


def _tell_read(what: str, name: str, images: np.ndarray) -> None:
    shape = "x".join(map(str, images.shape[1:]))
    logger.info("%s %s: %d images of %s %s", what, name, len(images), shape, images.dtype)


def _tell_left_out(left_out: Sequence[BadExample], used: int, whose: str) -> None:
    if left_out:
        logger.warning(
            "data.on_bad_example = skip: %d %s examples cannot be used and are left out, beside %d "
            "that are used; the first: %s",
            len(left_out),
            whose,
            used,
            left_out[0].reason,
        )


# --- built-in private sources -------------------------------------------------------------------


def _sharing(config: DataConfig) -> Sharing:
    return Sharing(
        by=config.split_by,
        fractions=config.fractions,
        num_clients=config.num_clients,
        dirichlet_alpha=config.dirichlet_alpha,
        min_examples=config.min_examples,
        shards_per_client=config.shards_per_client,
    )


def _splitting(config: DataConfig, seed: int) -> Splitting:
    return Splitting(
        split=config.split,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_train=config.max_train,
        seed=seed,
    )


def _phantoms(config: DataConfig, request: Request) -> FederatedDataset:
    _check_drawn(config.num_examples, (config.image_size,) * 2, "data.num_examples", "private")
    return load_phantoms(
        num_examples=config.num_examples,
        fractions=config.fractions,
        image_size=config.image_size,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_train=config.max_train,
        seed=request.seed,
        masks=request.masks,
    )


def _phantom_volumes(config: DataConfig, request: Request) -> FederatedDataset:
    _check_drawn(config.num_examples, config.volume_size, "data.num_examples", "private")
    return load_phantom_volumes(
        num_examples=config.num_examples,
        fractions=config.fractions,
        volume_size=config.volume_size,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_train=config.max_train,
        seed=request.seed,
    )


def _folder(config: DataConfig, request: Request) -> FederatedDataset:
    splitting = _splitting(config, request.seed)
    return load_folder(config, _sharing(config), splitting, masks=request.masks, bad=request.bad)


def _npz_masks(config: DataConfig, request: Request) -> FederatedDataset:
    return load_npz_masks(
        config.path,
        fractions=config.fractions,
        split_by=config.split_by,
        image_size=config.image_size,
        volume_size=config.volume_size,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_train=config.max_train,
        scanner_shift=config.scanner_shift,
        seed=request.seed,
        bad=request.bad,
    )


def _medmnist(config: DataConfig, request: Request) -> FederatedDataset:
    return load_medmnist(
        config.path,
        image_size=config.image_size,
        sharing=_sharing(config),
        splitting=_splitting(config, request.seed),
        bad=request.bad,
    )


def _prepared(config: DataConfig, request: Request) -> FederatedDataset:
    return load_prepared(
        config.name.removeprefix(PREPARED),
        config.path,
        masks=request.masks,
        image_size=config.image_size,
        volume_size=config.volume_size,
        sharing=_sharing(config),
        splitting=_splitting(config, request.seed),
        cache_dir=config.cache_dir,
        bad=request.bad,
    )


# --- built-in public sources --------------------------------------------------------------------


def _public_phantoms(config: PublicConfig, request: Request) -> PublicDataset:
    sides = (request.image_size,) * 2
    _check_drawn(config.num_examples or 1, sides, "public.num_examples", "public")
    return load_phantom_public(
        config.num_examples, request.image_size, request.seed, masks=request.masks
    )


def _public_phantom_volumes(config: PublicConfig, request: Request) -> PublicDataset:
    sides = request.volume_size
    _check_drawn(config.num_examples or 1, sides, "public.num_examples", "public")
    return load_phantom_volume_public(config.num_examples, sides, request.seed)


def _public_npz(config: PublicConfig, request: Request) -> PublicDataset:
    return load_npz_public(
        config.path,
        config.num_examples,
        request.image_size,
        masks=request.masks,
        volume_size=request.volume_size,
        bad=request.bad,
    )


def _public_folder(config: PublicConfig, request: Request) -> PublicDataset:
    return load_folder_public(
        config,
        request.image_size,
        masks=request.masks,
        cache_dir=request.cache_dir,
        bad=request.bad,
    )


def _public_prepared(config: PublicConfig, request: Request) -> PublicDataset:
    return load_prepared_public(
        config.name.removeprefix(PREPARED),
        config.path,
        config.num_examples,
        masks=request.masks,
        image_size=request.image_size,
        volume_size=request.volume_size,
        cache_dir=request.cache_dir,
        bad=request.bad,
    )


def _check_drawn(count: int, sides: tuple[int, ...], key: str, whose: str) -> None:
    channels, size = (1, "volume_size") if len(sides) == 3 else (3, "image_size")
    check_fits((count, *sides, channels), "uint8", f"{key} or data.{size}", f"the {whose} images")


def _lacks(found: Any) -> str:
    if isinstance(found, Source) or callable(found):
        return ""
    return "is no source of data; it must be a function (config, request) -> data"


_NPZ = (("path", "its .npz file"),)
_IMAGES = (("path", "the folder or zip of its images"),)
_MASKS, _CLASSES = ("segmentation",), ("classification",)

DATA = Registry(
    "data",
    {
        "phantoms": Source(_phantoms, "dermoscopy-like images, synthetic", split_by=("fractions",)),
        "phantom_volumes": Source(
            _phantom_volumes,
            "volumes with masks, synthetic",
            tasks=_MASKS,
            split_by=("fractions",),
        ),
        "folder": Source(_folder, "a folder or zip of images, with a table or without", _IMAGES),
        "medmnist": Source(
            _medmnist, "a MedMNIST file of 2D images", _NPZ, _CLASSES, split_by=SHARINGS
        ),
        "npz_masks": Source(
            _npz_masks,
            "an .npz file of images or volumes with masks",
            _NPZ,
            _MASKS,
            split_by=("fractions", "site"),
        ),
    },
    _lacks,
    also=f"{PREPARED}NAME",
)
PUBLIC = Registry(
    "public",
    {
        "phantoms": Source(_public_phantoms, "tissue-like images, synthetic"),
        "phantom_volumes": Source(
            _public_phantom_volumes, "volumes with masks, synthetic", tasks=_MASKS
        ),
        "npz": Source(_public_npz, "an .npz file of images or volumes", _NPZ),
        "folder": Source(
            _public_folder, "a folder or zip of images, with a table or without", _IMAGES
        ),
    },
    _lacks,
    also=f"{PREPARED}NAME, none",
)
_PREPARED = {
    "data": Source(_prepared, "a set that TensorFlow Datasets has prepared"),
    "public": Source(_public_prepared, "a set that TensorFlow Datasets has prepared"),
}
