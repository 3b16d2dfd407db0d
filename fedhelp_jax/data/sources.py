"""The private and the public data set that a configuration names."""

import logging
from collections.abc import Sequence

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.clients import Splitting
from fedhelp_jax.data.partition.sharing import Sharing
from fedhelp_jax.data.readers.fed_isic2019 import load_fed_isic2019
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
from fedhelp_jax.settings.schema import PREPARED, DataConfig, PublicConfig

logger = logging.getLogger(__name__)


def load_federated(config: DataConfig, seed: int, *, masks: bool = False) -> FederatedDataset:
    """Returns the private data of all clients, checked.

    Args:
        config: `data` of the run's configuration.
        seed: The run's seed.
        masks: Whether labels are masks rather than classes of whole images.

    Raises:
        UserError: The name is unknown, a file or value is unusable, or a client is empty.
    """
    sharing = Sharing(
        by=config.split_by,
        fractions=config.fractions,
        num_clients=config.num_clients,
        dirichlet_alpha=config.dirichlet_alpha,
        min_examples=config.min_examples,
        shards_per_client=config.shards_per_client,
    )
    splitting = Splitting(
        split=config.split,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        max_train=config.max_train,
        seed=seed,
    )
    bad = Bad(config.on_bad_example == "skip")
    if config.name in ("phantoms", "phantom_volumes"):
        sides = config.volume_size if config.name == "phantom_volumes" else (config.image_size,) * 2
        _check_drawn(config.num_examples, sides, "data.num_examples", "private")
    match config.name:
        case "phantoms":
            dataset = load_phantoms(
                num_examples=config.num_examples,
                fractions=config.fractions,
                image_size=config.image_size,
                validation_fraction=config.validation_fraction,
                test_fraction=config.test_fraction,
                max_train=config.max_train,
                seed=seed,
                masks=masks,
            )
        case "phantom_volumes":
            dataset = load_phantom_volumes(
                num_examples=config.num_examples,
                fractions=config.fractions,
                volume_size=config.volume_size,
                validation_fraction=config.validation_fraction,
                test_fraction=config.test_fraction,
                max_train=config.max_train,
                seed=seed,
            )
        case "npz_masks":
            dataset = load_npz_masks(
                config.path,
                fractions=config.fractions,
                split_by=config.split_by,
                image_size=config.image_size,
                volume_size=config.volume_size,
                validation_fraction=config.validation_fraction,
                test_fraction=config.test_fraction,
                max_train=config.max_train,
                scanner_shift=config.scanner_shift,
                seed=seed,
                bad=bad,
            )
        case "folder":
            dataset = load_folder(config, sharing, splitting, masks=masks, bad=bad)
        case "fed_isic2019":
            dataset = load_fed_isic2019(
                config.path,
                config.split_csv,
                split=config.split,
                image_size=config.image_size,
                validation_fraction=config.validation_fraction,
                max_train=config.max_train,
                seed=seed,
                cache_dir=config.cache_dir,
                masks=masks,
                bad=bad,
            )
        case "medmnist":
            dataset = load_medmnist(
                config.path,
                image_size=config.image_size,
                sharing=sharing,
                splitting=splitting,
                bad=bad,
            )
        case name if name.startswith(PREPARED):
            dataset = load_prepared(
                name.removeprefix(PREPARED),
                config.path,
                masks=masks,
                image_size=config.image_size,
                volume_size=config.volume_size,
                sharing=sharing,
                splitting=splitting,
                cache_dir=config.cache_dir,
                bad=bad,
            )
        case name:
            raise UserError(f"data.name: {name!r} is not known")
    _tell_left_out(dataset.left_out, len(dataset.images), "private")
    gone = {bad.client for bad in dataset.left_out if bad.client}
    if gone := sorted(gone - {client.name for client in dataset.clients}):
        logger.warning("data %s: no example is left of %s", dataset.name, ", ".join(gone))
    return check_federated(dataset)


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
        image_size: Height and width, as of the private images.
        seed: The run's seed; images that are read, not generated, do not depend on it.
        masks: Whether labels are masks rather than classes of whole images.
        volume_size: Sides of volumes, as of the private ones.
        cache_dir: Folder of the image cache; None takes the default.
        skip_bad: Whether examples that cannot be used are left out rather than refused.

    Raises:
        UserError: The name is unknown, or the file or a value is unusable.
    """
    if config.name in ("phantoms", "phantom_volumes"):
        sides = volume_size if config.name == "phantom_volumes" else (image_size,) * 2
        _check_drawn(config.num_examples or 1, sides, "public.num_examples", "public")
    bad = Bad(skip_bad)
    match config.name:
        case "phantoms":
            public = load_phantom_public(config.num_examples, image_size, seed, masks=masks)
        case "phantom_volumes":
            public = load_phantom_volume_public(config.num_examples, volume_size, seed)
        case "npz":
            public = load_npz_public(
                config.path,
                config.num_examples,
                image_size,
                masks=masks,
                volume_size=volume_size,
                bad=bad,
            )
        case "folder":
            public = load_folder_public(
                config, image_size, masks=masks, cache_dir=cache_dir, bad=bad
            )
        case name if name.startswith(PREPARED):
            public = load_prepared_public(
                name.removeprefix(PREPARED),
                config.path,
                config.num_examples,
                masks=masks,
                image_size=image_size,
                volume_size=volume_size,
                cache_dir=cache_dir,
                bad=bad,
            )
        case name:
            raise UserError(f"public.name: {name!r} is not known")
    _tell_left_out(public.left_out, len(public.images), "public")
    return check_public(public)


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


def _check_drawn(count: int, sides: tuple[int, ...], key: str, whose: str) -> None:
    channels, size = (1, "volume_size") if len(sides) == 3 else (3, "image_size")
    check_fits((count, *sides, channels), "uint8", f"{key} or data.{size}", f"the {whose} images")
