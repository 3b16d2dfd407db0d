"""Lists networks by the names that configs use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from fedhelp_jax.core.registry import Registry
from fedhelp_jax.models.cnn import CNNS, cnn
from fedhelp_jax.models.model import Model
from fedhelp_jax.models.resnet import RESNET_DEPTHS, resnet
from fedhelp_jax.models.unet import UNETS, UNetSize, unet

_TASKS = ("classification", "segmentation")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that has a name.

    Attributes:
      build: ``(num_classes, **options) -> Model``.
      about: A description in one line.
      tasks: The tasks that it can learn.
      options: Which of ``widths``, ``norm`` and ``remat`` (``model.*`` in configs) it takes.
    """

    build: Callable[..., Model]
    about: str
    tasks: tuple[str, ...] = _TASKS
    options: tuple[str, ...] = ()


def architecture(name: str, key: str) -> Architecture:
    """Returns the network of a name that the setting `key` gives.

    A custom function, ``num_classes -> Model``, becomes a network without options for any task.

    Raises:
      UserError: If there is none.
    """
    found = MODELS.find(name, key)
    if isinstance(found, Architecture):
        return found
    about = (getattr(found, "__doc__", None) or "").strip().split("\n", 1)[0]
    return Architecture(found, about)


def _lacks(found: Any) -> str:
    if isinstance(found, Architecture) or callable(found):
        return ""
    return "is no network; it must be a function (num_classes) -> Model"


def _unet(
    size: UNetSize, num_classes: int, *, widths: tuple[int, ...], norm: str, remat: bool
) -> Model:
    size = size._replace(widths=widths or size.widths)
    return unet(size, num_classes, norm=norm, remat=remat)


def _cnn_named(widths: tuple[int, ...]) -> Architecture:
    about = f"two convolutions of {widths[0]} and {widths[1]} channels"
    return Architecture(functools.partial(cnn, widths), about, ("classification",))


def _resnet_named(depth: int) -> Architecture:
    about = f"CIFAR ResNet of {depth} layers"
    return Architecture(functools.partial(resnet, depth), about, ("classification",))


def _unet_named(size: UNetSize) -> Architecture:
    about = f"U-Net in 2D or 3D with {size.widths[0]} to {size.widths[-1]} channels"
    options = ("widths", "norm", "remat")
    return Architecture(functools.partial(_unet, size), about, ("segmentation",), options)


MODELS = Registry(
    "models",
    {name: _cnn_named(widths) for name, widths in CNNS.items()}
    | {name: _resnet_named(depth) for name, depth in RESNET_DEPTHS.items()}
    | {name: _unet_named(size) for name, size in UNETS.items()},
    _lacks,
)
