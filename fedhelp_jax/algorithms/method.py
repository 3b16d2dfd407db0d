"""Defines `Method`: a federated method with its name, its settings and its requirements."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fedhelp_jax.algorithms.base import FederatedAlgorithm, Setup
from fedhelp_jax.algorithms.configured import Algorithm, configure
from fedhelp_jax.models.model import Model

# Values for `unused`: the settings of servers that average networks, and those of large networks.
AVERAGING = ("server", "client_weights")
LARGE_NETWORK = ("model.large", "model.large_widths")


@dataclasses.dataclass(frozen=True)
class Method:
    """A federated method; the decorator `method` makes one from a function.

    Attributes:
      name: Its name in configs and tables.
      build: ``(setup, settings) -> FederatedAlgorithm``.
      settings: The type of its settings, a dataclass whose fields are made by
        `fedhelp_jax.settings.setting`.
      uses_public: Whether it learns from the public images.
      uses_teacher: Whether it learns from the foundation model's answers about them.
      reads_answers: Whether its clients learn from the foundation model's answers about their own
        images instead of from the images. That needs a model that runs at the clients: through an
        API it would be sent private images.
      pools_data: Whether it needs all clients' data in one place, which no federated method does.
      plain_sgd: Whether its rule requires plain SGD and allows no other optimizer.
      unused: Settings of a run, or sections of them, that have no effect on it, besides those that
        follow from the above.
      schedules: ``settings -> bool``; whether anything in it depends on the number of rounds.
    """

    name: str
    build: Callable[[Setup, Any], FederatedAlgorithm]
    settings: type[Any]
    uses_public: bool = False
    uses_teacher: bool = False
    reads_answers: bool = False
    pools_data: bool = False
    plain_sgd: bool = False
    unused: tuple[str, ...] = ()
    schedules: Callable[[Any], bool] = lambda settings: False

    def __call__(self, *, small: Model, large: Model | None = None, **options: Any) -> Algorithm:
        """Returns the method with its networks, optimizer and settings, for a `Simulation`.

        Args:
          small: The network of small clients, and of the proxies of large ones.
          large: The network of large clients; the small one if None.
          **options: ``optimizer``, ``learning_rate``, ``weight_decay``, ``server_optimizer`` and
            ``interpolate`` as in `configure`, and the method's own settings.

        Raises:
          UserError: If the method has no such option, or a value is invalid.

        Example:
          >>> import fedhelp_jax as fh
          >>> cnn = fh.models.cnn((8, 32), num_classes=8)
          >>> fh.algorithms.fedprox(small=cnn, learning_rate=1e-3, mu=0.01).settings.mu
          0.01
        """
        return configure(self, {"small": small, "large": large or small}, **options)

    @property
    def about(self) -> str:
        """A description of the method in one line."""
        return (self.build.__doc__ or "").strip().split("\n", 1)[0]

    def ignores(self, key: str) -> bool:
        """Returns whether a setting of a run, by its dotted key, has no effect on this method."""
        unused = self.unused
        if not self.uses_public:
            unused += ("public", "public_batch_size")
        if not self.uses_teacher and not self.reads_answers:
            unused += ("teacher",)
        return any(key == name or key.startswith(f"{name}.") for name in unused)


def method(settings: type[Any], **needs: Any) -> Callable[[Callable[..., Any]], Method]:
    """Turns a function ``(setup, settings) -> FederatedAlgorithm`` into a `Method` of its name.

    Args:
      settings: The type of the settings.
      **needs: Other attributes of `Method`.
    """
    return lambda build: Method(build.__name__, build, settings, **needs)


def settings_of(config: Any) -> Mapping[str, Any]:
    """Returns a method's settings by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
