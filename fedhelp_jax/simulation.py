"""A federated method compiled over a federation: one dispatch per group and phase of a round.

Everything here is computation; files, logging and resuming are the runner's.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedhelp_jax.algorithms.base import FederatedAlgorithm, ServerData
from fedhelp_jax.client import predict
from fedhelp_jax.federation import ClientData, Federation, Group
from fedhelp_jax.mapping import Mapping as ClientMapping
from fedhelp_jax.mapping import over_clients
from fedhelp_jax.models.model import Model
from fedhelp_jax.random import Purpose, client_round_key, for_purpose, server_round_key
from fedhelp_jax.task import Task
from fedhelp_jax.tree import num_bytes

Rows = dict[str, jax.Array]

# XLA's CPU back end drops the barriers between what is computed and what is computed again for the
# backward pass, then finds both equal and keeps the first: `model.remat` would save nothing.
KEEP_REMATERIALISATION = {"xla_disable_hlo_passes": "cse_barrier_expander"}


class RunState(NamedTuple):
    """The whole state of a run between rounds; keys are folds of the seed, so no part of it.

    Attributes:
      server: The method's server state.
      clients: Per role, the stacked states ``[K, ...]`` of its clients.
    """

    server: Any
    clients: dict[str, Any]


class Trained(NamedTuple):
    """What a group's training phase returns; every leaf has a leading axis of the M slots.

    Attributes:
      state: The clients' new states.
      upload: What they send.
      weight: Their weight in the server's mean; 0 in an empty slot.
      slot: Which client of the group trained there; K, past the end, for nobody.
      info: Scalars to report.
    """

    state: Any
    upload: Any
    weight: jax.Array
    slot: jax.Array
    info: Rows


class RoundInfo(NamedTuple):
    """What a round reports, per role: ``[M]`` rows that took part (K for nobody), and scalars."""

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
        algorithm_at: Callable[[jax.Array], FederatedAlgorithm] | None = None,
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
          algorithm_at: The method as clients follow it in a round, by the round's number, where a
            learning rate changes; ``algorithm`` in every round if None.
        """
        self.algorithm = algorithm
        self.algorithm_at = algorithm_at or (lambda round: algorithm)
        self.task = task
        self.mapping = mapping
        self.federation = jax.device_put(federation_arrays(federation), mapping.replicated)
        self.groups = federation.groups
        self.participation = participation
        self.client_weights = client_weights
        self.eval_batch_size = eval_batch_size
        self.run_key = jax.device_put(jax.random.key(seed), mapping.replicated)
        # What starts a run and what files its results only moves memory: on CPU it is compiled in
        # half the time without LLVM's optimisations.
        on_cpu = mapping.mesh.devices.flat[0].platform == "cpu"
        unoptimised = {"xla_backend_optimization_level": 0} if on_cpu else None
        whole = functools.partial(jax.jit, out_shardings=mapping.replicated)
        by_client = functools.partial(
            jax.jit,
            out_shardings=mapping.by_client,
            compiler_options=KEEP_REMATERIALISATION if on_cpu else None,
        )
        self._init = whole(self._init_fn, compiler_options=unoptimised)
        self._aggregate = whole(
            self._aggregate_fn,
            donate_argnums=0,
            compiler_options=None if algorithm.server_trains else unoptimised,
        )
        self._train = {g.role: by_client(functools.partial(self._train_fn, g)) for g in self.groups}
        self._evaluate = {
            g.role: by_client(functools.partial(self._evaluate_fn, g)) for g in self.groups
        }
        self._predict = {
            g.role: jax.jit(functools.partial(self._predict_fn, g)) for g in self.groups
        }

    def init(self) -> RunState:
        """The state before the first round."""
        return self._init(self.run_key)

    def state_shapes(self) -> RunState:
        """The shapes of :meth:`init`'s state, without computing it."""
        return self._init.eval_shape(self.run_key)

    def round(self, state: RunState, round: int) -> tuple[RunState, RoundInfo]:
        """One round: every group trains, then the server aggregates. ``state`` is consumed.

        Args:
          state: The state before the round.
          round: Its number, from 0; decides batches and participants.

        Returns:
          The state after it and what it reports.
        """
        # The round as a NumPy scalar: to make it jax's would be a dispatch of its own.
        trained = {
            role: train(
                state.clients[role], state.server, self.run_key, np.int32(round), self.federation
            )
            for role, train in self._train.items()
        }
        if self.mapping.num_devices > 1:
            # The server's mean is a collective. A CPU device that reaches it long before the others
            # warns that it may be stuck, and in the end gives up.
            jax.block_until_ready(trained)
        state = self._aggregate(
            state,
            {role: (t.state, t.upload, t.weight, t.slot) for role, t in trained.items()},
            self.run_key,
            np.int32(round),
            self.federation,
        )
        return state, RoundInfo(
            {role: t.slot for role, t in trained.items()},
            {role: t.info for role, t in trained.items()},
        )

    def evaluate(self, state: RunState, split: str) -> dict[str, dict[str, Rows]]:
        """Metrics of every client's deployed models on a split.

        Args:
          state: The state of the run.
          split: "train", "validation" or "test".

        Returns:
          ``{role: {model name: {metric: [K]}}}`` on the host, the headline model of a role first.
        """
        tables = {g.role: self.federation.groups[g.role][split] for g in self.groups}
        rows = {
            role: evaluate(state.clients[role], state.server, self.federation, tables[role])
            for role, evaluate in self._evaluate.items()
        }
        # In the method's own order, the headline model first; JAX sorts a dict by its keys.
        return {
            g.role: {
                name: _first(rows[g.role][name], len(g.names))
                for name in self.algorithm.clients[g.role].models
            }
            for g in self.groups
        }

    def predictions(self, state: RunState, group: Group, row: int, split: str) -> np.ndarray:
        """What one client's deployed model says of a split, as the task's ``predict`` gives it.

        Args:
          state: The state of the run.
          group: The client's group.
          row: Its place there.
          split: "train", "validation" or "test".

        Returns:
          ``[n, ...]`` on the host, in the order of the client's split.
        """
        table = getattr(group, split)
        index = np.asarray(table.index[row])[: int(table.size[row])]
        found = []
        for start in range(0, len(index), self.eval_batch_size):
            part = index[start : start + self.eval_batch_size]
            padded = np.pad(part, (0, self.eval_batch_size - len(part)))
            out = self._predict[group.role](
                state.clients[group.role], state.server, self.federation, row, padded
            )
            found.append(np.asarray(out)[: len(part)])
        return np.concatenate(found)

    def payload_bytes(self) -> dict[str, tuple[int, int]]:
        """Per role, what one client sends and receives in a round, in bytes ``(up, down)``."""
        state = self.state_shapes()
        payload = {}
        for group in self.groups:
            upload = self.train_shapes(group, state).upload
            down = jax.eval_shape(
                lambda server, role=group.role: self.algorithm.download(server, role), state.server
            )
            payload[group.role] = (num_bytes(upload) // self._num_slots(group), num_bytes(down))
        return payload

    def train_shapes(self, group: Group, state: RunState) -> Trained:
        """Shapes of all that a group's training phase returns, without running it."""
        # By the compiled function, which has been traced already when a run asks.
        return self._train[group.role].eval_shape(
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
        # The smallest draws take part; drawn by client id, so no draw depends on the grouping.
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
    ) -> Trained:
        algorithm = self.algorithm_at(round)
        client = algorithm.clients[group.role]
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
        shared = (algorithm.download(server, group.role), data.pool, data.public)
        updated, upload, info = over_clients(one, self.mapping)(shared, own)
        weight = sizes if self.client_weights == "examples" else jnp.ones_like(sizes)
        return Trained(updated, upload, jnp.where(present, weight, 0), participants, info)

    def _aggregate_fn(
        self,
        state: RunState,
        trained: dict[str, Any],
        run_key: jax.Array,
        round: jax.Array,
        data: "Arrays",
    ) -> RunState:
        clients, uploads, weights = dict(state.clients), {}, {}
        for role, (updated, uploads[role], weights[role], slot) in trained.items():
            clients[role] = _scatter(clients[role], slot, updated)
        server = ServerData(
            key=server_round_key(run_key, round),
            public=data.public,
            pooled=ClientData(data.pool, data.public, *data.pooled),
            num_clients=sum(len(group.names) for group in self.groups),
        )
        algorithm = self.algorithm_at(round)
        return RunState(algorithm.aggregate(state.server, uploads, weights, server), clients)

    def _evaluate_fn(
        self,
        group: Group,
        states: Any,
        server: Any,
        data: "Arrays",
        table: Any,
    ) -> dict[str, Rows]:
        client = self.algorithm.clients[group.role]
        slots = -len(group.names) % self.mapping.num_devices

        def one(shared: Any, own: Any) -> dict[str, Rows]:
            download, pool, public = shared
            state, train, (index, size) = own
            deployed = client.deploy(download, state, ClientData(pool, public, *train))
            mask = jnp.arange(index.shape[0]) < size
            results = {}
            for model in dict.fromkeys(client.models.values()):
                # Variables of one network go through one program, one after the other.
                names = [name for name, m in client.models.items() if m is model]
                stacked = jax.tree.map(lambda *x: jnp.stack(x), *(deployed[n] for n in names))

                def measure(variables: Any, model: Model = model) -> Rows:
                    logits = predict(model, variables, pool, index, size, self.eval_batch_size)
                    return self.task.metrics(logits, pool.targets[index], mask)

                rows = lax.map(measure, stacked)
                for i, name in enumerate(names):
                    results[name] = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            return results

        own = jax.tree.map(
            lambda leaf: jnp.pad(leaf, [(0, slots)] + [(0, 0)] * (leaf.ndim - 1)),
            (states, data.groups[group.role]["train"], table),
        )
        shared = (self.algorithm.download(server, group.role), data.pool, data.public)
        return over_clients(one, self.mapping)(shared, own)

    def _predict_fn(
        self,
        group: Group,
        states: Any,
        server: Any,
        data: "Arrays",
        row: jax.Array,
        index: jax.Array,
    ) -> jax.Array:
        client = self.algorithm.clients[group.role]
        name, model = next(iter(client.models.items()))
        own, train = jax.tree.map(
            lambda leaf: leaf[row], (states, data.groups[group.role]["train"])
        )
        download = self.algorithm.download(server, group.role)
        variables = client.deploy(download, own, ClientData(data.pool, data.public, *train))[name]
        logits = predict(model, variables, data.pool, index, jnp.int32(len(index)), len(index))
        assert self.task.predict is not None
        return self.task.predict(logits, data.pool.targets[index])


def _scatter(states: Any, slot: jax.Array, updated: Any) -> Any:
    """Puts clients' new states in their place; rows past the end, the empty slots, are dropped."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), states, updated)


def _first(rows: Any, count: int) -> Any:
    """The rows of real clients, on the host; past them stand the empty slots of the last device."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], rows)


class Arrays(NamedTuple):
    """The arrays of a federation; its names stay on the host."""

    pool: Any
    public: Any
    groups: Mapping[str, Mapping[str, Any]]
    pooled: Any


def federation_arrays(federation: Federation) -> Arrays:
    """The traced part of a federation."""
    tables = {
        g.role: {"train": g.train, "validation": g.validation, "test": g.test}
        for g in federation.groups
    }
    return Arrays(federation.pool, federation.public, tables, federation.pooled)
