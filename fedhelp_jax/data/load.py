"""The private and the public data set that a configuration names."""

from fedhelp_jax.data.fed_isic2019 import load_fed_isic2019
from fedhelp_jax.data.medmnist import load_medmnist
from fedhelp_jax.data.npz import load_npz_public
from fedhelp_jax.data.phantom_tiles import load_phantom_public
from fedhelp_jax.data.phantoms import load_phantoms
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, check_federated
from fedhelp_jax.errors import UserError
from fedhelp_jax.schema import DataConfig, PublicConfig


def load_federated(config: DataConfig, seed: int) -> FederatedDataset:
    """Returns the private data of all clients, checked.

    Args:
        config: `data` of the run's configuration.
        seed: The run's seed.

    Raises:
        UserError: The name is unknown, a file or value is unusable, or a client is empty.
    """
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
            )
        case "fed_isic2019":
            dataset = load_fed_isic2019(
                config.dir,
                config.split_csv,
                split=config.split,
                image_size=config.image_size,
                validation_fraction=config.validation_fraction,
                max_train=config.max_train,
                seed=seed,
                cache_dir=config.cache_dir,
            )
        case "medmnist":
            dataset = load_medmnist(
                config.dir,
                fractions=config.fractions,
                image_size=config.image_size,
                validation_fraction=config.validation_fraction,
                max_train=config.max_train,
                seed=seed,
            )
        case name:
            raise UserError(f"data.name must be phantoms, fed_isic2019 or medmnist, got {name!r}")
    return check_federated(dataset)


def load_public(config: PublicConfig, image_size: int, seed: int) -> PublicDataset:
    """Returns the public images.

    Args:
        config: `public` of the run's configuration.
        image_size: Height and width, as of the private images.
        seed: The run's seed; images that are read, not generated, do not depend on it.

    Raises:
        UserError: The name is unknown, or the file or a value is unusable.
    """
    match config.name:
        case "phantoms":
            return load_phantom_public(config.num_examples, image_size, seed)
        case "npz":
            return load_npz_public(config.path, config.num_examples, image_size)
        case name:
            raise UserError(f"public.name must be phantoms or npz, got {name!r}")
