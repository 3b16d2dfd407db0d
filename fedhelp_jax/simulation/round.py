"""Defines a round's phases as pure functions of state, key and data, for one run or many."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from fedhelp_jax.algorithms import Algorithm, Given
from fedhelp_jax.algorithms.base import FederatedAlgorithm, PublicSpec, ServerData
from fedhelp_jax.algorithms.client import predict
from fedhelp_jax.core.compilation import traced_once
from fedhelp_jax.core.random import Purpose, client_round_key, for_purpose, server_round_key
from fedhelp_jax.core.tree import choose, means, zeros_of
from fedhelp_jax.data.federation import ClientData, ClientIndex, Federation, Pool
from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.metrics import finite_examples
from fedhelp_jax.models.model import Model
from fedhelp_jax.simulation.divergence import NON_FINITE, NonFinite, quarantine
from fedhelp_jax.simulation.vectorize import Mapping as ClientMapping
from fedhelp_jax.simulation.vectorize import fill, of_one_client, over_clients, sum_over_clients
from fedhelp_jax.tasks import Task
from fedhelp_jax.typing import ClientState, PyTree, ServerState, Upload

Rows = dict[str, jax.Array]


class RunState(NamedTuple):
    """The whole state of a run between rounds.

    It holds no keys, because they are folded from the seed.

    Attributes:
      server: The method's server state.
      clients: Per role, the stacked states ``[K, ...]`` of its clients. If the mapping is private,
        they are padded to whole devices and chunks.
    """

    server: ServerState
    clients: dict[str, ClientState]


class ClientUpdates(NamedTuple):
    """What a group's training phase returns; leaves have a leading axis of the M slots.

    Attributes:
      state: The clients' new states.
      upload: What the clients send; uploads that are not finite are replaced by zeros. For a method
        that needs only the mean, the weighted sum over the clients of each device, one per device.
      weight: The weight of each upload in the server's mean, or the sum of the weights on each
        device. Empty slots and uploads that are not finite have weight 0.
      slot: The row of the client in each slot; K, which is past the end, marks an empty slot.
      info: Scalars to report.
      non_finite: Which clients' outcomes hold NaN or infinity.
    """

    state: PyTree
    upload: Upload
    weight: jax.Array
    slot: jax.Array
    info: Rows
    non_finite: NonFinite


class RoundInfo(NamedTuple):
    """What a round reports, by role.

    Attributes:
      participants: The ``[M]`` rows that took part; K marks an empty slot.
      info: The scalars that the participants report.
      non_finite: Which participants' outcomes hold NaN or infinity.
    """

    participants: dict[str, jax.Array]
    info: dict[str, Rows]
    non_finite: dict[str, NonFinite]


class Measured(NamedTuple):
    """What an evaluation of a chunk's clients returns, a row per slot.

    Attributes:
      metrics: ``{model: {metric: [M]}}``.
      logits: ``{model: [M, n, ...]}``, those of each example of the split; empty for a task that
        does not keep them.
    """

    metrics: dict[str, Rows]
    logits: Rows


class FederationArrays(NamedTuple):
    """The arrays of a federation: for each role its ``ids``, and a `ClientIndex` for each split.

    If the mapping is private, every device has its own pool, all of equal length, and each table
    indexes the pool of its client's device; ``pooled`` is None. If the images are streamed, there
    are neither pool nor tables; see `ClientChunk`.
    """

    pool: PyTree
    public: PyTree
    groups: Mapping[str, Mapping[str, PyTree]]
    pooled: PyTree


class ClientChunk(NamedTuple):
    """Clients of a role that are computed together, and the private images that they need.

    Attributes:
      slot: ``[M]`` rows of the group; K, which is past the end, marks an empty slot. None if the
        chunk is the whole group, each client in its own row.
      place: ``[M]`` positions of the clients among their device's slots of the round; an empty slot
        lies past their end. None if the chunk holds all slots of the round.
      pool: The examples, or one pool of equal length per device.
      train: Each client's training examples, as indices into the pool of its device; or None.
      split: The examples that the clients are measured on, likewise.
    """

    slot: PyTree
    place: PyTree
    pool: Pool
    train: ClientIndex | None
    split: ClientIndex | None


def federation_arrays(federation: Federation) -> FederationArrays:
    """Returns the arrays of a federation that are traced."""
    tables = {
        g.role: {"ids": g.ids, "train": g.train, "validation": g.validation, "test": g.test}
        for g in federation.groups
    }
    return FederationArrays(federation.pool, federation.public, tables, federation.pooled)


def num_clients(federation: Federation) -> dict[str, int]:
    """Returns the number of clients of each role."""
    return {group.role: len(group.names) for group in federation.groups}


@dataclasses.dataclass(frozen=True)
class RoundProgram:
    """A method over a federation's clients; all attributes are static under tracing.

    Attributes:
      algorithm: The method.
      task: The task, which defines the metrics.
      num_clients: The number of clients by role.
      mapping: How clients run.
      participation_rate: Fraction of each group that takes part in a round, rounded up.
      client_weights: "uniform" or "examples" (by number of training examples).
      eval_batch_size: Examples at a time in evaluation.
      algorithm_at: Returns the method for a round, given the round's number, if a learning rate
        changes over the rounds. None means ``algorithm`` in every round.
    """

    algorithm: FederatedAlgorithm
    task: Task
    num_clients: Mapping[str, int]
    mapping: ClientMapping
    participation_rate: float = 1.0
    client_weights: str = "uniform"
    eval_batch_size: int = 64
    algorithm_at: Callable[[jax.Array], FederatedAlgorithm] | None = None

    def init(self, run_key: jax.Array, data: FederationArrays) -> RunState:
        """Returns the state before the first round."""
        clients = {}
        for role in self.num_clients:
            init, ids = self.algorithm.clients[role].init, data.groups[role]["ids"]
            # One client after the other: under vmap, every K would draw with a different program.
            if self.mapping.private:
                one_by_one = self.mapping._replace(chunk_size=1)
                clients[role] = over_clients(init, one_by_one)(run_key, ids)
            else:
                clients[role] = lax.map(functools.partial(init, run_key), ids)
        return RunState(self.algorithm.init(run_key), clients)

    def _algorithm(self, round: jax.Array) -> FederatedAlgorithm:
        return self.algorithm if self.algorithm_at is None else self.algorithm_at(round)

    def _rows(self, role: str, slot: jax.Array | None, tree: PyTree) -> PyTree:
        """Selects the clients in the slots; an empty slot holds an arbitrary client's row."""
        # In a private mapping, every client has its own slot.
        if self.mapping.private or slot is None:
            return tree
        rows = jnp.minimum(slot, self.num_clients[role] - 1)
        return jax.tree.map(lambda leaf: leaf[rows], tree)

    def _held(self, chunk: ClientChunk) -> PyTree:
        """Returns the partitioning of a chunk's pool over the devices."""
        return self.mapping.own if chunk.place is None else self.mapping.by_client.spec

    def everyone(self, role: str, data: FederationArrays, split: str) -> ClientChunk:
        """Returns the whole group as a chunk to evaluate on a split; needs all images on device."""
        tables, adapts = data.groups[role], self.algorithm.clients[role].adapts
        return ClientChunk(
            None, None, data.pool, tables["train"] if adapts else None, tables[split]
        )

    def num_participants(self, role: str) -> int:
        """Returns how many clients of a role take part in a round."""
        return max(1, math.ceil(self.participation_rate * self.num_clients[role] - 1e-9))

    def num_slots(self, role: str) -> int:
        """Returns the slots of a round: its participants, padded to whole devices and chunks.

        In a private mapping, every client has a slot.
        """
        private = self.mapping.private
        return self.mapping.slots(
            self.num_clients[role] if private else self.num_participants(role)
        )

    def participants(
        self, role: str, ids: jax.Array, run_key: jax.Array, round: jax.Array
    ) -> jax.Array:
        """Returns the ``[M]`` rows of the group that take part, ascending; K is an empty slot."""
        size, count, slots = (
            self.num_clients[role],
            self.num_participants(role),
            self.num_slots(role),
        )
        ids = ids[:size]
        # The smallest draws take part. Each is keyed by client id, so it does not depend on the
        # grouping.
        keys = jax.vmap(functools.partial(client_round_key, run_key, round))(ids)
        draws = jax.vmap(lambda key: jax.random.bits(for_purpose(key, Purpose.PARTICIPATION)))(keys)
        chosen = jnp.sort(jnp.argsort(draws, stable=True)[:count])
        if self.mapping.private:
            rows = jnp.arange(slots)
            return jnp.where(jnp.isin(rows, chosen), rows, size)
        return jnp.pad(chosen, (0, slots - count), constant_values=size)

    def begin(
        self,
        role: str,
        states: PyTree,
        server: ServerState,
        run_key: jax.Array,
        round: jax.Array,
        data: FederationArrays,
        *,
        shapes: ClientChunk,
    ) -> ClientUpdates:
        """Returns the updates of all participants, filled with zeros, for :meth:`train` to fill in.

        ``shapes`` describes the pool and the table of a chunk that has one client per slot.
        """
        slot = self.participants(role, data.groups[role]["ids"], run_key, round)
        train = functools.partial(self.train, role)
        chunk = shapes._replace(slot=slot)
        updates = jax.eval_shape(train, states, server, run_key, round, data, chunk)
        return zeros_of(updates)._replace(slot=slot)

    def train(
        self,
        role: str,
        states: PyTree,
        server: ServerState,
        run_key: jax.Array,
        round: jax.Array,
        data: FederationArrays,
        chunk: ClientChunk | None = None,
        before: ClientUpdates | None = None,
    ) -> ClientUpdates:
        """Trains clients of a role.

        Args:
          role: The role.
          states: The states of all its clients.
          server: The server's state.
          run_key: The key of the run.
          round: The number of the round, from 0.
          data: The federation.
          chunk: Which clients train; None means all participants of the round.
          before: The updates of earlier chunks in this round, starting from those of `begin`. The
            results of this chunk are added to them.

        Returns:
          The updates.
        """
        if chunk is None:
            tables = data.groups[role]
            slot = self.participants(role, tables["ids"], run_key, round)
            table = self._rows(role, slot, tables["train"])
            chunk = ClientChunk(slot, None, data.pool, table, None)
        algorithm = self._algorithm(round)
        client, table = algorithm.clients[role], chunk.train
        assert table is not None
        present = chunk.slot < self.num_clients[role]

        def one(shared: PyTree, own: PyTree) -> PyTree:
            download, pool, public = shared
            key, state, index, size = own
            data = ClientData(pool, public, index, size)
            state, upload, info = client.update(key, download, state, data)
            found, upload = quarantine(state, upload, info)
            return (state, info, found), upload, ~found.upload

        ids = self._rows(role, chunk.slot, data.groups[role]["ids"])
        own = (
            jax.vmap(functools.partial(client_round_key, run_key, round))(ids),
            self._rows(role, chunk.slot, states),
            table.index,
            jnp.where(present, table.size, 0),
        )
        placed = P(), self._held(chunk), P()
        shared = (algorithm.download(server, role), chunk.pool, data.public)
        weight = table.size if self.client_weights == "examples" else jnp.ones_like(table.size)
        weight = jnp.where(present, weight, 0)
        if algorithm.mean_only:
            run = sum_over_clients(one, self.mapping, placed)
            begun = None if before is None else (before.upload, before.weight)
            (state, info, found), (upload, weight) = run(shared, own, weight, begun)
        else:
            run = over_clients(one, self.mapping, placed)
            (state, info, found), upload, counts = run(shared, own)
            weight = jnp.where(counts, weight, 0)
        found = jax.tree.map(lambda leaf: leaf & present, found)
        updates = ClientUpdates(state, upload, weight, chunk.slot, info, found)
        return updates if before is None else self._added(before, updates, chunk.place)

    def _added(self, before: ClientUpdates, now: ClientUpdates, place: jax.Array) -> ClientUpdates:
        """Writes the rows of a chunk into those of all participants."""
        # The sums of uploads and weights already include those of earlier chunks.
        sums = ("upload", "weight") if self.algorithm.mean_only else ()
        stacked = [name for name in ClientUpdates._fields if name not in (*sums, "slot")]
        rows = [{name: getattr(updates, name) for name in stacked} for updates in (before, now)]
        filled = fill(self.mapping, rows[0], place, rows[1])
        return now._replace(slot=before.slot, **filled)

    def aggregate(
        self,
        state: RunState,
        trained: Mapping[str, tuple[ClientState, Upload, jax.Array, jax.Array]],
        run_key: jax.Array,
        round: jax.Array,
        data: FederationArrays,
    ) -> RunState:
        """Runs the server's turn on the results of :meth:`train`, selected by `server_part`.

        If no upload of the round counts, the server keeps its state.
        """
        clients, uploads, weights = dict(state.clients), {}, {}
        for role, (updated, upload, weights[role], slot) in trained.items():
            uploads[role] = means(upload, weights[role]) if self.algorithm.mean_only else upload
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
        updated = self._algorithm(round).aggregate(state.server, uploads, weights, server)
        some = jnp.any(jnp.concatenate([weight > 0 for weight in weights.values()]))
        return RunState(choose(some, updated, state.server), clients)

    def round(
        self, state: RunState, run_key: jax.Array, round: jax.Array, data: FederationArrays
    ) -> tuple[RunState, RoundInfo]:
        """Runs a whole round: every role trains, then the server has its turn."""
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
        data: FederationArrays,
        *,
        most: int,
    ) -> tuple[RunState, RoundInfo]:
        """Runs rounds ``first`` up to, not including, ``last``, at most ``most``, in one program.

        Returns:
          The state after the rounds, and what each reported: leaves ``[most, ...]``, of which the
          first ``last - first`` rows are filled.
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
        states: PyTree,
        server: ServerState,
        data: FederationArrays,
        chunk: ClientChunk,
    ) -> Measured:
        """Returns the metrics and logits of the deployed models of a chunk's clients.

        For the chunk of `everyone`, the slots are the clients padded to whole devices and chunks.
        """
        own = (self._rows(role, chunk.slot, states), chunk.train, chunk.split)
        if chunk.slot is None:
            slots = self.mapping.slots(self.num_clients[role])
            own = jax.tree.map(
                lambda leaf: jnp.pad(leaf, [(0, slots - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)),
                own,
            )
        client = self.algorithm.clients[role]

        def one(shared: PyTree, own: PyTree) -> Measured:
            download, pool, public = shared
            state, train, (index, size) = own
            data = None if train is None else ClientData(pool, public, *train)
            deployed = client.deploy(download, state, data)
            mask = jnp.arange(index.shape[0]) < size
            found = Measured({}, {})
            for model in dict.fromkeys(client.models.values()):
                # All variables of one network go through one program, one after the other.
                names = [name for name, m in client.models.items() if m is model]
                stacked = jax.tree.map(lambda *x: jnp.stack(x), *(deployed[n] for n in names))

                def measure(variables: PyTree, model: Model = model) -> tuple[Rows, PyTree]:
                    logits = predict(model, variables, pool, index, size, self.eval_batch_size)
                    metrics = traced_once(self.task.metrics)(logits, pool.targets[index], mask)
                    metrics = {**metrics, NON_FINITE: jnp.sum(mask & ~finite_examples(logits))}
                    return metrics, logits if self.task.keeps_logits else None

                rows, logits = lax.map(measure, stacked)
                for i, name in enumerate(names):
                    found.metrics[name] = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
                    if logits is not None:
                        found.logits[name] = logits[i]
            return found

        shared = (self.algorithm.download(server, role), chunk.pool, data.public)
        return over_clients(one, self.mapping, (P(), self._held(chunk), P()))(shared, own)

    def predict(
        self,
        role: str,
        states: PyTree,
        server: ServerState,
        data: FederationArrays,
        chunk: ClientChunk,
        row: jax.Array,
        places: jax.Array,
    ) -> jax.Array:
        """Returns the predictions of one client's headline model on examples of its split.

        Args:
          role: The role.
          states: The states of all its clients.
          server: The server's state.
          data: The federation.
          chunk: The chunk that holds the client.
          row: The client's slot in the chunk.
          places: Which examples of the split.

        Returns:
          ``[n, ...]``. If the mapping is private, ``[D, n, ...]``, with zeros on all devices but
          the client's own.
        """
        one = functools.partial(self._predict, role)
        shared = (self.algorithm.download(server, role), chunk.pool, data.public, places)
        if self.mapping.private:
            placed = (P(), self.mapping.own, P(), P())
            own = (states, chunk.train, chunk.split)
            return of_one_client(one, self.mapping, placed)(shared, own, row)
        number = row if chunk.slot is None else chunk.slot[row]
        state = jax.tree.map(lambda leaf: leaf[number], states)
        tables = jax.tree.map(lambda leaf: leaf[row], (chunk.train, chunk.split))
        return one(shared, (state, *tables))

    def _predict(self, role: str, shared: PyTree, own: PyTree) -> jax.Array:
        client = self.algorithm.clients[role]
        name, model = next(iter(client.models.items()))
        download, pool, public, places = shared
        state, train, table = own
        data = None if train is None else ClientData(pool, public, *train)
        deployed = client.deploy(download, state, data)[name]
        index = table.index[places]
        logits = predict(model, deployed, pool, index, jnp.int32(len(index)), len(index))
        assert self.task.predict is not None
        return self.task.predict(logits, pool.targets[index])


def make_program(
    algorithm: Algorithm,
    given: Given,
    federation: Federation,
    mapping: ClientMapping,
    *,
    participation_rate: float = 1.0,
    client_weights: str = "uniform",
) -> RoundProgram:
    """Returns the round of an algorithm over the clients of a federation."""
    return RoundProgram(
        algorithm.build(given),
        given.task,
        num_clients(federation),
        mapping,
        participation_rate=participation_rate,
        client_weights=client_weights,
        eval_batch_size=_eval_batch_size(given.sample_shape[:-1], federation),
        algorithm_at=algorithm.at(given),
    )


def _eval_batch_size(spatial: tuple[int, ...], federation: Federation) -> int:
    """Returns how many images are evaluated at a time.

    That is at most 64, or fewer for images larger than 64x64, so that a batch has no more pixels.
    The largest validation or test split makes equal batches, so few images are not padded to 64.
    More than 8 are a multiple of 8, which a CPU can divide into parts.
    """
    most = max(1, min(64, 2**18 // math.prod(spatial)))
    sizes = [split.size for g in federation.groups for split in (g.validation, g.test)]
    # By NumPy: a sweep makes its program while JAX traces, which would trace a maximum too.
    largest = max(int(np.asarray(size).max()) for size in sizes)
    size = -(-largest // -(-largest // most))
    return size if size <= 8 else min(most, -(-size // 8) * 8)


def public_spec(public: PublicDataset | None, answers: Any) -> PublicSpec | None:
    """Returns the label spaces of a public set, and of a teacher's `Answers` about it."""
    if public is None:
        return None
    labels = None if public.label_names is None else len(public.label_names)
    return PublicSpec(
        num_images=len(public.images),
        num_labels=labels,
        num_answers=None if answers is None else len(answers.label_names),
        shared=answers is not None
        and labels is not None
        and answers.label_names == public.label_names,
    )


def server_part(
    trained: Mapping[str, ClientUpdates],
) -> dict[str, tuple[ClientState, Upload, jax.Array, jax.Array]]:
    """Selects what the server's turn needs: by role, state, upload, weight and slot."""
    return {role: (t.state, t.upload, t.weight, t.slot) for role, t in trained.items()}


def round_info(trained: Mapping[str, ClientUpdates]) -> RoundInfo:
    """Returns what a round reports about its training phases."""
    return RoundInfo(
        {role: t.slot for role, t in trained.items()},
        {role: t.info for role, t in trained.items()},
        {role: t.non_finite for role, t in trained.items()},
    )


def _scatter(states: PyTree, slot: jax.Array, updated: PyTree) -> PyTree:
    """Writes clients' new states to their rows; empty slots, past the end, are dropped."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), states, updated)


def _take(present: jax.Array, updated: PyTree, states: PyTree) -> PyTree:
    """Returns the new states of the clients that are present, and the old ones of all others."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(present.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(one, updated, states)
