"""A round's phases as pure functions of state, key and data, for one run or many at once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from fedhelp_jax.algorithms.base import FederatedAlgorithm, ServerData
from fedhelp_jax.client import predict
from fedhelp_jax.federation import ClientData, Federation
from fedhelp_jax.mapping import Mapping as ClientMapping
from fedhelp_jax.mapping import mean_over_clients, of_one_client, over_clients
from fedhelp_jax.models.model import Model
from fedhelp_jax.random import Purpose, client_round_key, for_purpose, server_round_key
from fedhelp_jax.task import Task

Rows = dict[str, jax.Array]


class RunState(NamedTuple):
    """The whole state of a run between rounds; keys are folds of the seed, so no part of it.

    Attributes:
      server: The method's server state.
      clients: Per role, the stacked states ``[K, ...]`` of its clients; of whole devices and
        chunks where the mapping is private.
    """

    server: Any
    clients: dict[str, Any]


class Trained(NamedTuple):
    """What a group's training phase returns; leaves have a leading axis of the M slots.

    Attributes:
      state: The clients' new states.
      upload: What they send; of a method that needs only the mean, the means of each device's
        clients, one a device.
      weight: The weight of each upload in the server's mean; 0 in an empty slot.
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


class Arrays(NamedTuple):
    """The arrays of a federation; by role ``ids`` and a `Table` a split; names stay on the host.

    Where the mapping is private, the pool is one of equal length for each device, and each table
    holds places in the pool of its client's device; nothing is pooled.
    """

    pool: Any
    public: Any
    groups: Mapping[str, Mapping[str, Any]]
    pooled: Any


def federation_arrays(federation: Federation) -> Arrays:
    """The traced part of a federation."""
    tables = {
        g.role: {"ids": g.ids, "train": g.train, "validation": g.validation, "test": g.test}
        for g in federation.groups
    }
    return Arrays(federation.pool, federation.public, tables, federation.pooled)


def num_clients(federation: Federation) -> dict[str, int]:
    """How many clients there are of each role."""
    return {group.role: len(group.names) for group in federation.groups}


@dataclasses.dataclass(frozen=True)
class Phases:
    """A method over a federation's clients; everything here is fixed while it is traced.

    Attributes:
      algorithm: The method.
      task: Gives the metrics.
      num_clients: By role.
      mapping: How clients run.
      participation: Fraction of each group that takes part in a round, rounded up.
      client_weights: "uniform" or "examples" (by number of training examples).
      eval_batch_size: Examples at a time in evaluation.
      algorithm_at: The method as clients follow it in a round, by the round's number, where a
        learning rate changes; ``algorithm`` in every round if None.
    """

    algorithm: FederatedAlgorithm
    task: Task
    num_clients: Mapping[str, int]
    mapping: ClientMapping
    participation: float = 1.0
    client_weights: str = "uniform"
    eval_batch_size: int = 64
    algorithm_at: Callable[[jax.Array], FederatedAlgorithm] | None = None

    def init(self, run_key: jax.Array, data: Arrays) -> RunState:
        """The state before the first round."""
        clients = {}
        for role in self.num_clients:
            init, ids = self.algorithm.clients[role].init, data.groups[role]["ids"]
            # One after the other: under vmap the draws would be another program for every K.
            if self.mapping.private:
                one_by_one = self.mapping._replace(chunk_size=1)
                clients[role] = over_clients(init, one_by_one)(run_key, ids)
            else:
                clients[role] = lax.map(functools.partial(init, run_key), ids)
        return RunState(self.algorithm.init(run_key), clients)

    def _algorithm(self, round: jax.Array) -> FederatedAlgorithm:
        return self.algorithm if self.algorithm_at is None else self.algorithm_at(round)

    @property
    def _placed(self) -> Any:
        """How what clients are given lies on devices: download, pool, public set."""
        return P(), self.mapping.own, P()

    def num_participants(self, role: str) -> int:
        """How many clients of a role take part in a round."""
        return max(1, math.ceil(self.participation * self.num_clients[role] - 1e-9))

    def num_slots(self, role: str) -> int:
        """Participants rounded up to whole devices and chunks; all clients where it is private."""
        private = self.mapping.private
        return self.mapping.slots(
            self.num_clients[role] if private else self.num_participants(role)
        )

    def participants(
        self, role: str, ids: jax.Array, run_key: jax.Array, round: jax.Array
    ) -> jax.Array:
        """``[M]`` rows of the group that take part, ascending; K is a slot for nobody."""
        size, count, slots = (
            self.num_clients[role],
            self.num_participants(role),
            self.num_slots(role),
        )
        ids = ids[:size]
        # The smallest draws take part; drawn by client id, so no draw depends on the grouping.
        keys = jax.vmap(functools.partial(client_round_key, run_key, round))(ids)
        draws = jax.vmap(lambda key: jax.random.bits(for_purpose(key, Purpose.PARTICIPATION)))(keys)
        chosen = jnp.sort(jnp.argsort(draws, stable=True)[:count])
        if self.mapping.private:
            rows = jnp.arange(slots)
            return jnp.where(jnp.isin(rows, chosen), rows, size)
        return jnp.pad(chosen, (0, slots - count), constant_values=size)

    def train(
        self,
        role: str,
        states: Any,
        server: Any,
        run_key: jax.Array,
        round: jax.Array,
        data: Arrays,
    ) -> Trained:
        """A role's clients train; ``states`` are theirs, ``server`` the server's."""
        algorithm, size = self._algorithm(round), self.num_clients[role]
        client = algorithm.clients[role]
        tables = data.groups[role]
        participants = self.participants(role, tables["ids"], run_key, round)
        present = participants < size
        rows = jnp.minimum(participants, size - 1)

        def chosen(tree: Any) -> Any:
            # Nobody leaves their own slot where the mapping is private.
            return tree if self.mapping.private else jax.tree.map(lambda leaf: leaf[rows], tree)

        def one(shared: Any, own: Any) -> Any:
            download, pool, public = shared
            key, state, index, size = own
            data = ClientData(pool, public, index, size)
            state, upload, info = client.update(key, download, state, data)
            return (state, info), upload

        sizes = chosen(tables["train"].size)
        own = (
            jax.vmap(functools.partial(client_round_key, run_key, round))(chosen(tables["ids"])),
            chosen(states),
            chosen(tables["train"].index),
            jnp.where(present, sizes, 0),
        )
        shared = (algorithm.download(server, role), data.pool, data.public)
        weight = sizes if self.client_weights == "examples" else jnp.ones_like(sizes)
        weight = jnp.where(present, weight, 0)
        if algorithm.mean_only:
            run = mean_over_clients(one, self.mapping, self._placed)
            (updated, info), upload, weight = run(shared, own, weight)
        else:
            (updated, info), upload = over_clients(one, self.mapping, self._placed)(shared, own)
        return Trained(updated, upload, weight, participants, info)

    def aggregate(
        self,
        state: RunState,
        trained: dict[str, Any],
        run_key: jax.Array,
        round: jax.Array,
        data: Arrays,
    ) -> RunState:
        """The server's turn, on what :meth:`train` gave: by role state, upload, weight, slot."""
        clients, uploads, weights = dict(state.clients), {}, {}
        for role, (updated, uploads[role], weights[role], slot) in trained.items():
            if self.mapping.private:
                clients[role] = _take(slot < self.num_clients[role], updated, clients[role])
            else:
                clients[role] = _scatter(clients[role], slot, updated)
        server = ServerData(
            key=server_round_key(run_key, round),
            public=data.public,
            pooled=data.pooled and ClientData(data.pool, data.public, *data.pooled),
            num_clients=sum(self.num_clients.values()),
        )
        algorithm = self._algorithm(round)
        return RunState(algorithm.aggregate(state.server, uploads, weights, server), clients)

    def round(
        self, state: RunState, run_key: jax.Array, round: jax.Array, data: Arrays
    ) -> tuple[RunState, RoundInfo]:
        """A whole round: every role trains, then the server has its turn."""
        trained = {
            role: self.train(role, state.clients[role], state.server, run_key, round, data)
            for role in self.num_clients
        }
        state = self.aggregate(state, server_part(trained), run_key, round, data)
        return state, round_info(trained)

    def rounds(
        self,
        state: RunState,
        run_key: jax.Array,
        first: jax.Array,
        last: jax.Array,
        data: Arrays,
        *,
        most: int,
    ) -> tuple[RunState, RoundInfo]:
        """The rounds from ``first`` to before ``last``, at most ``most``, in one program.

        Returns:
          The state after them, and what each reported: leaves ``[most, ...]``, the first ``last -
          first`` filled.
        """
        shapes = jax.eval_shape(self.round, state, run_key, first, data)[1]
        infos = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

        def one(round: jax.Array, carry: tuple[RunState, RoundInfo]) -> tuple[RunState, RoundInfo]:
            state, infos = carry
            state, info = self.round(state, run_key, round, data)
            return state, jax.tree.map(lambda all, x: all.at[round - first].set(x), infos, info)

        return lax.fori_loop(first, last, one, (state, infos))

    def evaluate(
        self,
        role: str,
        states: Any,
        server: Any,
        data: Arrays,
        table: Any,
    ) -> dict[str, Rows]:
        """Metrics of a role's deployed models, ``[K]`` rounded up to whole devices and chunks."""
        client, slots = self.algorithm.clients[role], self.mapping.slots(self.num_clients[role])

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
            lambda leaf: jnp.pad(leaf, [(0, slots - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)),
            (states, data.groups[role]["train"], table),
        )
        shared = (self.algorithm.download(server, role), data.pool, data.public)
        return over_clients(one, self.mapping, self._placed)(shared, own)

    def predict(
        self,
        role: str,
        states: Any,
        server: Any,
        data: Arrays,
        table: Any,
        row: jax.Array,
        places: jax.Array,
    ) -> jax.Array:
        """What the headline model of one client says of its examples at ``places`` of a split.

        Where the mapping is private, ``[D, ...]``: zeros but for the client's own device.
        """
        client = self.algorithm.clients[role]
        name, model = next(iter(client.models.items()))

        def one(shared: Any, own: Any) -> jax.Array:
            (download, pool, public), places = shared
            state, train, table = own
            deployed = client.deploy(download, state, ClientData(pool, public, *train))[name]
            index = table.index[places]
            logits = predict(model, deployed, pool, index, jnp.int32(len(index)), len(index))
            assert self.task.predict is not None
            return self.task.predict(logits, pool.targets[index])

        shared = ((self.algorithm.download(server, role), data.pool, data.public), places)
        own = (states, data.groups[role]["train"], table)
        if self.mapping.private:
            return of_one_client(one, self.mapping, (self._placed, P()))(shared, own, row)
        return one(shared, jax.tree.map(lambda leaf: leaf[row], own))


def server_part(trained: Mapping[str, Trained]) -> dict[str, Any]:
    """What the server's turn takes of the training phases: by role state, upload, weight, slot."""
    return {role: (t.state, t.upload, t.weight, t.slot) for role, t in trained.items()}


def round_info(trained: Mapping[str, Trained]) -> RoundInfo:
    """What a round reports of its training phases."""
    return RoundInfo(
        {role: t.slot for role, t in trained.items()}, {role: t.info for role, t in trained.items()}
    )


def _scatter(states: Any, slot: jax.Array, updated: Any) -> Any:
    """Puts clients' new states in their place; rows past the end, the empty slots, are dropped."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), states, updated)


def _take(present: jax.Array, updated: Any, states: Any) -> Any:
    """The new states of those present, each in its own slot, and the old ones of all others."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(present.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(one, updated, states)
