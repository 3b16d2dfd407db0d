"""Data sets as arrays of images and index tables, read or generated with NumPy and Pillow only."""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arrays": ["from_arrays", "public_from_arrays"],
        "by_name": ["load", "load_public"],
        "federation": ["ClientData"],
        "partition.sharing": ["Sharing"],
        "types": ["ClientSplit", "FederatedDataset", "PublicDataset"],
    },
)

if TYPE_CHECKING:
    from fedhelp_jax.data.arrays import from_arrays, public_from_arrays
    from fedhelp_jax.data.by_name import load, load_public
    from fedhelp_jax.data.federation import ClientData
    from fedhelp_jax.data.partition.sharing import Sharing
    from fedhelp_jax.data.types import ClientSplit, FederatedDataset, PublicDataset

__all__ = [
    "ClientData",
    "ClientSplit",
    "FederatedDataset",
    "PublicDataset",
    "Sharing",
    "from_arrays",
    "load",
    "load_public",
    "public_from_arrays",
]
