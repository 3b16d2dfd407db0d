"""A federated method compiled over a federation: one dispatch per group and phase of a round.

Everything here is computation; files, logging and resuming are the runner's.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedhelp_jax.algorithms.base import FederatedAlgorithm
from fedhelp_jax.client import ClientData, predict, shuffled
from fedhelp_jax.federation import Federation, Group
from fedhelp_jax.mapping import Mapping as ClientMapping
from fedhelp_jax.mapping import over_clients
from fedhelp_jax.random import Purpose, client_round_key, for_purpose
from fedhelp_jax.task import Task
from fedhelp_jax.tree import num_bytes

Rows = dict[str, jax.Array]


class RunState(NamedTuple):
    """The whole state of a run between rounds; keys are folds of the seed, so they are not part of it.

    Attributes:
      server: The method's server state.
      clients: Per role, the stacked states ``[K, ...]`` of its clients.
    """

    server: Any
    clients: dict[str, Any]


class RoundInfo(NamedTuple):
    """What a round reports, per role: who took part (``[M]`` rows of the group, K for nobody), and scalars."""

    participants: dict[str, jax.Array]
    info: dict[str, Rows]


class Simulation:
    """The compiled phases of a run: ``init``, ``round``, ``evaluate``."""

    def __init__(
        self,
        algorithm: FederatedAlgorithm,
        federation: Federation,
        task: Task,
        mapping: ClientMapping,
        *,
        seed: int,
        participation: float = 1.0,
        client_weights: str = "uniform",
        eval_batch_size: int = 64,
    ):
        """Prepares the phases; nothing is compiled before its first call.

        Args:
          algorithm: The method.
          federation: The data.
          task: Gives the metrics.
          mapping: How clients run.
          seed: All randomness of the run.
          participation: Fraction of each group that takes part in a round, rounded up.
          client_weights: "uniform" or "examples" (by number of training examples).
          eval_batch_size: Examples at a time in evaluation.
        """
        self.algorithm = algorithm
        self.task = task
        self.mapping = mapping
        self.federation = jax.device_put(federation_arrays(federation), mapping.replicated)
        self.groups = federation.groups
        self.participation = participation
        self.client_weights = client_weights
        self.eval_batch_size = eval_batch_size
        self.run_key = jax.device_put(jax.random.key(seed), mapping.replicated)
        jit = functools.partial(jax.jit, out_shardings=mapping.replicated)
        self._init = jit(self._init_fn)
        self._train = {
            g.role: jit(functools.partial(self._train_fn, g), donate_argnums=0) for g in self.groups
        }
        self._aggregate = jit(algorithm.aggregate, donate_argnums=0)
        self._evaluate = {
            g.role: jit(functools.partial(self._evaluate_fn, g)) for g in self.groups
        }

    def init(self) -> RunState:
        """The state before the first round."""
        return self._init(self.run_key)

    def state_shapes(self) -> RunState:
        """The shapes of :meth:`init`'s state, without computing it."""
        return jax.eval_shape(self._init_fn, self.run_key)

    def round(self, state: RunState, round: int) -> tuple[RunState, RoundInfo]:
        """One round: every group trains, then the server aggregates. ``state`` is consumed.

        Args:
          state: The state before the round.
          round: Its number, from 0; decides batches and participants.

        Returns:
          The state after it and what it reports.
        """
        clients, uploads, weights, participants, info = {}, [], [], {}, {}
        for group in self.groups:
            role = group.role
            clients[role], upload, weight, participants[role], info[role] = self._train[role](
                state.clients[role], state.server, self.run_key, jnp.int32(round), self.federation
            )
            uploads.append(upload)
            weights.append(weight)
        server = self._aggregate(state.server, tuple(uploads), tuple(weights))
        return RunState(server, clients), RoundInfo(participants, info)

    def evaluate(self, state: RunState, split: str) -> dict[str, dict[str, Rows]]:
        """Metrics of every client's deployed models on a split.

        Args:
          state: The state of the run.
          split: "train", "validation" or "test".

        Returns:
          ``{role: {model name: {metric: [K]}}}``.
        """
        return {
            g.role: self._evaluate[g.role](
                state.clients[g.role],
                state.server,
                self.federation.pool,
                self.federation.groups[g.role][split],
            )
            for g in self.groups
        }

    def payload_bytes(self) -> dict[str, tuple[int, int]]:
        """Per role, what one client sends and receives in a round, in bytes ``(up, down)``."""
        state = self.state_shapes()
        down = num_bytes(jax.eval_shape(self.algorithm.download, state.server))
        payload = {}
        for group in self.groups:
            _, upload, *_ = self.train_shapes(group, state)
            stacked = num_bytes(upload) // max(self._num_slots(group), 1)
            payload[group.role] = (stacked, down)
        return payload

    def train_shapes(self, group: Group, state: RunState) -> Any:
        """Shapes of all that a group's training phase returns, without running it."""
        return jax.eval_shape(
            functools.partial(self._train_fn, group),
            state.clients[group.role],
            state.server,
            self.run_key,
            jnp.int32(0),
            self.federation,
        )

    def _init_fn(self, run_key: jax.Array) -> RunState:
        clients = {}
        for group in self.groups:
            init = functools.partial(self.algorithm.clients[group.role].init, run_key)
            # One after the other: under vmap the draws would be another program for every K.
            clients[group.role] = lax.map(init, group.ids)
        return RunState(self.algorithm.init(run_key), clients)

    def num_participants(self, group: Group) -> int:
        """How many clients of a group take part in a round."""
        return max(1, math.ceil(self.participation * len(group.names) - 1e-9))

    def _num_slots(self, group: Group) -> int:
        """Participants rounded up to whole devices."""
        devices = self.mapping.num_devices
        return -(-self.num_participants(group) // devices) * devices

    def _participants(self, group: Group, run_key: jax.Array, round: jax.Array) -> jax.Array:
        """``[M]`` rows of the group that take part, ascending; K fills up the last device."""
        size, count = len(group.names), self.num_participants(group)
        # The smallest draws take part; drawn by client id, so that grouping changes nothing of a draw.
        keys = jax.vmap(functools.partial(client_round_key, run_key, round))(group.ids)
        draws = jax.vmap(lambda key: jax.random.bits(for_purpose(key, Purpose.PARTICIPATION)))(keys)
        chosen = jnp.sort(jnp.argsort(draws, stable=True)[:count])
        return jnp.pad(chosen, (0, self._num_slots(group) - count), constant_values=size)

    def _train_fn(
        self,
        group: Group,
        states: Any,
        server: Any,
        run_key: jax.Array,
        round: jax.Array,
        data: "Arrays",
    ) -> tuple[Any, Any, jax.Array, jax.Array, Rows]:
        client = self.algorithm.clients[group.role]
        tables = data.groups[group.role]
        participants = self._participants(group, run_key, round)
        present = participants < len(group.names)
        rows = jnp.minimum(participants, len(group.names) - 1)

        def one(shared: Any, own: Any) -> Any:
            download, pool, public = shared
            key, state, index, size = own
            return client.update(key, download, state, ClientData(pool, public, index, size))

        sizes = tables["train"].size[rows]
        own = (
            jax.vmap(functools.partial(client_round_key, run_key, round))(group.ids[rows]),
            jax.tree.map(lambda leaf: leaf[rows], states),
            tables["train"].index[rows],
            jnp.where(present, sizes, 0),
        )
        shared = (self.algorithm.download(server), data.pool, data.public)
        updated, upload, info = over_clients(one, self.mapping)(shared, own)
        # Rows past the end, the empty slots, are dropped.
        states = jax.tree.map(
            lambda old, new: old.at[participants].set(new, mode="drop"), states, updated
        )
        weight = sizes if self.client_weights == "examples" else jnp.ones_like(sizes)
        return states, upload, jnp.where(present, weight, 0), participants, info

    def _evaluate_fn(
        self,
        group: Group,
        states: Any,
        server: Any,
        pool: Any,
        table: Any,
    ) -> dict[str, Rows]:
        client = self.algorithm.clients[group.role]
        slots = -len(group.names) % self.mapping.num_devices

        def one(shared: Any, own: Any) -> dict[str, Rows]:
            download, pool = shared
            state, index, size = own
            deployed = client.deploy(download, state)
            mask = jnp.arange(index.shape[0]) < size
            return {
                name: self.task.metrics(
                    predict(model, deployed[name], pool, index, size, self.eval_batch_size),
                    pool.targets[index],
                    mask,
                )
                for name, model in client.models.items()
            }

        own = jax.tree.map(
            lambda leaf: jnp.pad(leaf, [(0, slots)] + [(0, 0)] * (leaf.ndim - 1)),
            (states, table.index, table.size),
        )
        shared = (self.algorithm.download(server), pool)
        results = over_clients(one, self.mapping)(shared, own)
        return jax.tree.map(lambda leaf: leaf[: len(group.names)], results)


class Arrays(NamedTuple):
    """The arrays of a federation; its names stay on the host."""

    pool: Any
    public: Any
    groups: Mapping[str, Mapping[str, Any]]


def federation_arrays(federation: Federation) -> Arrays:
    """The traced part of a federation."""
    tables = {
        g.role: {"train": g.train, "validation": g.validation, "test": g.test}
        for g in federation.groups
    }
    return Arrays(federation.pool, federation.public, tables)
