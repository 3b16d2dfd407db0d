"""Provides networks behind one small interface, :class:`fedhelp_jax.models.model.Model`.

`cnn`, `resnet` and `unet` are built in. `from_linen`, `from_nnx`, `from_equinox` and
`from_functions` add a linear head to a custom feature extractor.
"""

from fedhelp_jax.models.adapters import from_equinox, from_functions, from_linen, from_nnx
from fedhelp_jax.models.cnn import cnn
from fedhelp_jax.models.model import Model, apply_model
from fedhelp_jax.models.resnet import resnet
from fedhelp_jax.models.unet import UNetSize, unet

__all__ = [
    "Model",
    "UNetSize",
    "apply_model",
    "cnn",
    "from_equinox",
    "from_functions",
    "from_linen",
    "from_nnx",
    "resnet",
    "unet",
]
