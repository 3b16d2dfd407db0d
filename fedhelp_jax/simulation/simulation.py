"""Provides `Simulation`, which runs an algorithm over clients' data round by round from Python."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedhelp_jax import tasks
from fedhelp_jax.algorithms import Algorithm, Given
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import assign_roles, make_federation
from fedhelp_jax.data.types import FederatedDataset, PublicDataset
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.memory import fit
from fedhelp_jax.simulation.round import RoundInfo, Rows, RunState, make_program, public_spec
from fedhelp_jax.simulation.streaming import StreamedRounds
from fedhelp_jax.simulation.vectorize import make_mapping
from fedhelp_jax.tasks import Task


class SimulationState(NamedTuple):
    """A run between two rounds.

    Attributes:
      key: The key that determines all randomness of the run.
      round: The number of rounds that are done.
      run: The state of the server, and the stacked states of the clients by role.
    """

    key: jax.Array
    round: int
    run: RunState


class Simulation:
    """An algorithm over the clients of a federated data set.

    A run is a pure function of the state that `init` returns: the same key gives the same bits, on
    any number of devices.

    Attributes:
      algorithm: The algorithm's pure functions, for calling them directly.
      federation: The data on the device.
      roles: "small" or "large" for each client of the data.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        data: FederatedDataset,
        *,
        public: PublicDataset | None = None,
        teacher: Any = None,
        task: Task | None = None,
        large: int | Sequence[str] = 2,
        batch_size: int = 4,
        public_batch_size: int | None = None,
        local_epochs: int = 1,
        augment: Sequence[str] = (),
        participation_rate: float = 1.0,
        client_weights: str = "uniform",
        rounds: int = 1,
        chunk_size: int | None = None,
        num_devices: int | None = None,
        max_device_bytes: int = 0,
        donate: bool = True,
    ):
        """Puts the data on the device; nothing is compiled before it is needed.

        Args:
          algorithm: A method with its networks, such as ``fh.algorithms.fedhelp(small=...)``.
          data: The private data, for example from ``fh.data.load`` or ``fh.data.from_arrays``.
          public: The public images, for methods that learn from them.
          teacher: A foundation model's logits for the public images, from `fedhelp_jax.teachers`.
          task: Losses and metrics. None selects classification or segmentation, according to the
            data. ``fh.tasks.classification._replace(loss=...)`` sets a custom loss.
          large: Which clients are large: either how many, taking those with the most training
            images, or their names.
          batch_size: Private images per step.
          public_batch_size: Public images per step; ``batch_size`` if None.
          local_epochs: Passes that a client makes over its images in a round.
          augment: Augmentations of the training batches, from ``fh.transforms.AUGMENTATIONS``.
          participation_rate: Fraction of each role that takes part in a round, rounded up.
          client_weights: A client's weight in the server's mean: "uniform", or "examples" for its
            number of training images.
          rounds: How many rounds will be run, for methods with a schedule over them (FedKD).
          chunk_size: Clients vectorised at a time on a device; 0 means all of them. None takes 1 on
            CPU; on accelerators it takes all, or as many as fit in memory.
          num_devices: The number of devices that clients are spread over; all if None.
          max_device_bytes: The most bytes of private images on a device, while the rest wait on the
            host; 0 keeps all on the devices.
          donate: Whether `step` takes over the memory of the state that it is given. If False,
            older states stay usable, at the cost of twice the memory.

        Raises:
          UserError: If the method, the data and the options are incompatible.
        """
        method = algorithm.method
        if max_device_bytes and method.pools_data:
            raise UserError(f"max_device_bytes must be 0: {method.name} needs all data at once")
        if method.uses_public and public is None and method.name != "fedhelp":
            raise UserError(f"{method.name} learns from public images: give public=...")
        if not method.uses_public:
            public = teacher = None
        masks = data.labels.ndim > 1
        if task is None:
            task = tasks.segmentation(data.label_names) if masks else tasks.classification
        top_n, names = (large, ()) if isinstance(large, int) else (0, tuple(large))
        self.roles = assign_roles(data, top_n=top_n, large=names)
        logits = None
        if teacher is not None:
            if public is None:
                raise UserError("teacher: its answers are about public images: give public=...")
            logits = teacher.about(public)
        on_host = max_device_bytes > 0
        federation = make_federation(data, self.roles, public, logits, on_host=on_host)
        given = Given(
            task=task,
            num_classes=len(data.label_names),
            sample_shape=data.images.shape[1:],
            batch_size=batch_size,
            public_batch_size=public_batch_size or batch_size,
            local_epochs=local_epochs,
            public=public_spec(public, teacher),
            augment=tuple(augment),
            rounds=rounds,
        )
        program = make_program(
            algorithm,
            given,
            federation,
            make_mapping(chunk_size, num_devices),
            participation_rate=participation_rate,
            client_weights=client_weights,
        )
        self.algorithm = program.algorithm
        if max_device_bytes:
            compiled = StreamedRounds(
                program, federation, max_device_bytes=max_device_bytes, donate=donate
            )
        else:
            compiled = CompiledRounds(program, federation, donate=donate)
        self._as_asked, self._fits, self._task = compiled, chunk_size is None, task
        self.federation = federation

    @functools.cached_property
    def _compiled(self) -> CompiledRounds:
        return fit(self._as_asked) if self._fits else self._as_asked

    def init(self, key: jax.Array) -> SimulationState:
        """Returns the state before the first round; ``key`` comes from ``jax.random.key``."""
        # Placed like the key that programs are compiled with in advance.
        key = jax.device_put(key, self._compiled.mapping.replicated)
        return SimulationState(key, 0, self._compiled.init(key))

    def step(self, state: SimulationState) -> tuple[SimulationState, RoundInfo]:
        """Returns the state after one round, and what its clients report.

        The memory of ``state`` is taken over, unless the simulation was made with
        ``donate=False``.
        """
        run, info = self._compiled.round(state.run, state.round, state.key)
        return SimulationState(state.key, state.round + 1, run), info

    def evaluate(
        self, state: SimulationState, split: str = "test"
    ) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Returns the metrics of every client's deployed models on a split.

        Args:
          state: A state.
          split: "train", "validation" or "test".

        Returns:
          ``{role: {model: {metric: [K]}}}``, with the model that a role's clients deploy first.
        """
        measured: dict[str, dict[str, Rows]] = self._compiled.evaluate(state.run, split)
        return measured  # pyright: ignore[reportReturnType]

    def clients(self, state: SimulationState, split: str = "test") -> dict[str, dict[str, float]]:
        """Returns the metrics of the model that each client deploys, by client."""
        rows, measured = {}, self._compiled.evaluate(state.run, split)
        for group in self._compiled.groups:
            models = measured[group.role]
            metrics = next(iter(models.values()))
            for i, name in enumerate(group.names):
                rows[name] = {metric: float(values[i]) for metric, values in metrics.items()}
        return rows
