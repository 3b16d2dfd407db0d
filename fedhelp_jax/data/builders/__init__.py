"""Builders of TensorFlow Datasets for data that hospitals and benchmarks hand out by hand."""

from fedhelp_jax.data.builders.base import Builder
from fedhelp_jax.data.builders.fed_isic2019 import FedIsic2019
from fedhelp_jax.data.builders.fed_ixi_tiny import FedIxiTiny
from fedhelp_jax.data.builders.msd import Msd

# By the names that TFDS gives them.
BUILDERS: dict[str, type[Builder]] = {cls.name: cls for cls in (FedIsic2019, FedIxiTiny, Msd)}
