"""Loads data by the names that configs use."""

import dataclasses
from typing import Any

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.data.sources import load_public as load_public_data
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, of_federated, of_public
from fedhelp_jax.settings.schema import DataConfig, PublicConfig
from fedhelp_jax.settings.values import value_as


def load(name: str, *, seed: int = 0, masks: bool = False, **settings: Any) -> FederatedDataset:
    """Returns private data by name.

    Args:
      name: As ``data.name`` in configs: "phantoms", "medmnist", "tfds:..." and so on.
      seed: Seed of all random draws and of generated images.
      masks: Whether labels are masks rather than classes of whole images.
      **settings: As ``data.*`` in configs (``fedhelp train --help``).

    Raises:
      UserError: If a setting is invalid, or the data cannot be read.

    Example:
      >>> data = load("phantoms", num_examples=300, image_size=16)
      >>> data.images.shape, len(data.clients)
      ((300, 16, 16, 3), 6)
    """
    dataset = load_federated(_checked(DataConfig, {"name": name, **settings}), seed, masks=masks)
    return dataset._replace(content_sha256=of_federated(dataset))


def load_public(
    name: str,
    *,
    seed: int = 0,
    masks: bool = False,
    image_size: int = DataConfig.image_size,
    volume_size: tuple[int, ...] = DataConfig.volume_size,
    **settings: Any,
) -> PublicDataset:
    """Returns public data by name.

    Args:
      name: As ``public.name`` in configs.
      seed: Seed of generated images.
      masks: Whether labels are masks rather than classes of whole images.
      image_size: Side in pixels, equal to that of the private images.
      volume_size: Sides in voxels, equal to those of the private volumes.
      **settings: As ``public.*`` in configs.

    Raises:
      UserError: If a setting is invalid, or the data cannot be read.
    """
    config = _checked(PublicConfig, {"name": name, **settings})
    public = load_public_data(config, image_size, seed, masks=masks, volume_size=volume_size)
    return public._replace(content_sha256=of_public(public))


def _checked(cls: type[Any], values: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"{key} is not a setting of the data{suggest(key, list(fields))}")
    return cls(
        **{
            key: value_as(value, fields[key].type, fields[key].metadata["check"], key)
            for key, value in values.items()
        }
    )
