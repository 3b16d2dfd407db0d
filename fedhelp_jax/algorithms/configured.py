"""Defines `Algorithm`: a method with networks, optimizer and settings, before data are known."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

from fedhelp_jax.algorithms.base import FederatedAlgorithm, PublicSpec, Setup
from fedhelp_jax.algorithms.client import adam_l2, sgd_l2
from fedhelp_jax.algorithms.interpolation import with_interpolated
from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.models.model import Model
from fedhelp_jax.settings.values import value_as
from fedhelp_jax.tasks import Task

if TYPE_CHECKING:
    from fedhelp_jax.algorithms.method import Method

Rate = float | jax.Array
Optimizer = optax.GradientTransformation | Callable[[Rate], optax.GradientTransformation]


class Given(NamedTuple):
    """What the data and the simulation add to an `Algorithm`; attributes are as in `Setup`."""

    task: Task
    num_classes: int
    sample_shape: tuple[int, ...]
    batch_size: int
    public_batch_size: int
    local_epochs: int
    public: PublicSpec | None
    augment: tuple[str, ...] = ()
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A method that is ready for data.

    Attributes:
      method: The method.
      models: The networks, "small" and "large".
      settings: The method's settings.
      optimizer: The clients' optimizer as a function of the learning rate.
      learning_rate: The clients' learning rate in the first round.
      weight_decay: L2 regularisation of plain SGD, for methods whose rule requires plain SGD.
      schedule: ``round -> factor`` of the learning rates, which are constant if None.
      server_optimizer: The server's optimizer, for every method that averages parameters; None
        takes the mean.
      interpolate: Parts of the broadcast model in further models that clients could deploy; see
        `fedhelp_jax.algorithms.interpolation`.
    """

    method: "Method"
    models: Mapping[str, Model]
    settings: Any
    optimizer: Callable[[Rate], optax.GradientTransformation]
    learning_rate: Rate
    weight_decay: float = 0.0
    schedule: Callable[[jax.Array], Rate] | None = None
    server_optimizer: optax.GradientTransformation | None = None
    interpolate: tuple[float, ...] = ()

    def build(self, given: Given, factor: Rate = 1.0) -> FederatedAlgorithm:
        """Returns the method's pure functions, with every learning rate scaled by ``factor``."""
        rate = self.learning_rate * factor
        setup = Setup(
            **given._asdict(),
            models=self.models,
            tx=self.optimizer(rate),
            learning_rate=rate,
            weight_decay=self.weight_decay,
            schedule=factor,
            server_tx=self.server_optimizer,
        )
        return with_interpolated(self.method.build(setup, self.settings), self.interpolate)

    def at(self, given: Given) -> Callable[[jax.Array], FederatedAlgorithm] | None:
        """Returns a function from a round's number to its pure functions; None if all are equal."""
        schedule = self.schedule
        return None if schedule is None else lambda round: self.build(given, schedule(round))


def configure(
    method: "Method",
    models: Mapping[str, Model],
    *,
    optimizer: Optimizer | None = None,
    learning_rate: float | Callable[[Any], Any] | None = None,
    weight_decay: float = 0.0,
    server_optimizer: optax.GradientTransformation | None = None,
    interpolate: Sequence[float] = (),
    **settings: Any,
) -> Algorithm:
    """Returns a method with its networks, optimizer and settings.

    Args:
      method: The method.
      models: The networks, "small" and "large".
      optimizer: Any optax transformation, or a function of the learning rate that returns one, such
        as ``optax.adam``. Clients start every round with a fresh optimizer state. None takes Adam
        with L2 regularisation, or plain SGD with it for methods whose rule requires plain SGD.
      learning_rate: A number, or a schedule over rounds, ``round -> rate``, like optax's schedules
        over steps. If None, 1e-3 for Adam and 1e-2 for plain SGD.
      weight_decay: L2 regularisation, added to the gradient, if ``optimizer`` is None.
      server_optimizer: Takes the averaged update as a gradient (arXiv:2003.00295), in every method
        that averages parameters; None takes the mean itself.
      interpolate: Parts of the broadcast model, within (0, 1), in further models between a client's
        own and that one, which are evaluated too.
      **settings: The method's own settings.

    Returns:
      The algorithm.

    Raises:
      UserError: If the method has no such setting, or a value is invalid.
    """
    if optimizer is not None and method.plain_sgd:
        raise UserError(f"{method.name}: optimizer must be None, since its rule takes plain SGD")
    if optimizer is not None and weight_decay:
        raise UserError(f"{method.name}: weight_decay is for optimizer=None; chain it into yours")
    if isinstance(optimizer, optax.GradientTransformation) and learning_rate is not None:
        raise UserError(
            f"{method.name}: learning_rate is in the optimizer already; give a function of the "
            "rate, such as optax.adam, if you want to give both"
        )
    if not all(0 < part < 1 for part in interpolate):
        raise UserError(f"{method.name}: interpolate must be between 0 and 1, got {interpolate}")
    default = sgd_l2 if method.plain_sgd else adam_l2
    if learning_rate is None:
        learning_rate = 1e-2 if method.plain_sgd else 1e-3
    schedule = None
    if callable(learning_rate):
        rates, first = learning_rate, float(learning_rate(0))
        learning_rate, schedule = first, lambda round: rates(round) / first
    if isinstance(optimizer, optax.GradientTransformation):
        make_optimizer = functools.partial(_fixed, optimizer)
    else:
        make_optimizer = optimizer or functools.partial(default, weight_decay=weight_decay)
    return Algorithm(
        method=method,
        models=models,
        settings=make_settings(method.settings, settings, method.name),
        optimizer=make_optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        server_optimizer=server_optimizer,
        interpolate=tuple(interpolate),
    )


def _fixed(optimizer: optax.GradientTransformation, _: Rate) -> optax.GradientTransformation:
    """Returns an optimizer that contains its learning rate, ignoring the one given."""
    return optimizer


def make_settings(cls: type[Any], values: Mapping[str, Any], path: str) -> Any:
    """Returns a method's settings after checking them; omitted ones have their defaults.

    Raises:
      UserError: If there is no such setting, or a value is invalid.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise UserError(f"{path}.{name} is not a setting{suggest(name, list(fields))}")
    return cls(
        **{
            name: value_as(value, kinds[name], fields[name].metadata["check"], f"{path}.{name}")
            for name, value in values.items()
        }
    )
