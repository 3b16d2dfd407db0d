"""Compiles a federated method over a federation: one dispatch per group and phase of a round.

This module only computes. The runner takes care of files, logging and resuming.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fedhelp_jax.core.compilation import Program, jit
from fedhelp_jax.core.tree import num_bytes
from fedhelp_jax.data.federation import ClientData, Federation, Group
from fedhelp_jax.models.model import Model, Variables
from fedhelp_jax.simulation.round import (
    ClientUpdates,
    FederationArrays,
    Measured,
    RoundInfo,
    RoundProgram,
    Rows,
    RunState,
    round_info,
    server_part,
)
from fedhelp_jax.simulation.sharding import bytes_per_device, place, put, shapes_on
from fedhelp_jax.typing import PyTree


class Call(NamedTuple):
    """A program as a run calls it.

    Attributes:
      program: The program.
      args: Its arguments, or their shapes and shardings.
      clients: The number of clients that it computes on each device.
      beside: The bytes that other programs' results take on each device meanwhile.
    """

    program: Program
    args: tuple[PyTree, ...]
    clients: int
    beside: int


class CompiledRounds:
    """The compiled phases of a run: ``init``, ``round``, ``evaluate``."""

    def __init__(
        self,
        phases: RoundProgram,
        federation: Federation,
        *,
        seed: int = 0,
        rounds_at_once: int = 1,
        donate: bool = True,
    ):
        """Prepares the phases; nothing is compiled before its first call.

        Args:
          phases: The method, and how its clients run.
          federation: The data, of the same clients as ``phases``.
          seed: Determines all randomness of the run, unless a method is given a key.
          rounds_at_once: The most rounds that one call of :meth:`rounds` may ask for. If more than
            one, they run in a single dispatch, except on several CPU devices.
          donate: Whether a round takes over the memory of the state that it is given, which then
            cannot be used again.
        """
        self.phases = phases
        self.mapping = mapping = phases.mapping
        self.groups = federation.groups
        self._options: dict[str, Any] = {
            "seed": seed,
            "rounds_at_once": rounds_at_once,
            "donate": donate,
        }
        self.federation = self._placed(federation)
        # For `with_chunk_size`. Arrays on the devices are kept only once.
        self._source = (
            federation
            if mapping.private or self.federation.pool is None
            else federation._replace(pool=self.federation.pool, public=self.federation.public)
        )
        self._batch_size = phases.eval_batch_size
        self._jit = program = functools.partial(jit, platform=mapping.platform)
        self.run_key = self._drawn_from(seed)
        self._state_sharding = RunState(
            mapping.replicated,
            {g.role: NamedSharding(mapping.mesh, mapping.own) for g in self.groups},
        )
        whole = functools.partial(program, out_shardings=self._state_sharding)
        self._by_client = by_client = functools.partial(program, out_shardings=mapping.by_client)
        # Initialisation, and aggregation unless the server trains, only move memory.
        self._init = whole(phases.init, optimized=False)
        self._aggregate = whole(
            phases.aggregate,
            donate_argnums=0 if donate else (),
            optimized=phases.algorithm.server_trains,
        )
        # On several CPU devices, `round` waits for the clients before the mean (see there).
        waits = mapping.platform == "cpu" and mapping.num_devices > 1
        self.rounds_at_once = 1 if waits else rounds_at_once
        self._rounds = program(
            functools.partial(phases.rounds, most=rounds_at_once),
            out_shardings=(self._state_sharding, mapping.replicated),
            donate_argnums=0 if donate else (),
        )
        roles = [group.role for group in self.groups]
        self._train = {r: by_client(functools.partial(phases.train, r)) for r in roles}
        self._evaluate = {r: by_client(functools.partial(phases.evaluate, r)) for r in roles}
        self._predict = {r: program(functools.partial(phases.predict, r)) for r in roles}
        self._gather = program(lambda tree: tree, out_shardings=mapping.replicated)

    def _placed(self, federation: Federation) -> FederationArrays:
        """Returns the arrays that stay on the devices for the whole run."""
        return place(federation, self.mapping)

    def _drawn_from(self, seed: int) -> jax.Array:
        """Returns the key of the run."""
        # Created on the devices: placing a host array would make the processes compare its values.
        return self._jit(lambda: jax.random.key(seed), out_shardings=self.mapping.replicated)()

    def with_chunk_size(self, chunk_size: int) -> Self:
        """Returns the same rounds with another number of clients vectorised at a time."""
        mapping = self.mapping._replace(chunk_size=chunk_size)
        phases = dataclasses.replace(self.phases, mapping=mapping)
        return type(self)(phases, self._source, **self._options)

    def calls(self, *, training: bool = True) -> list[Call]:
        """Returns the programs that vectorise clients, with the arguments that they will have.

        What is compiled for these is used when the run calls the programs.

        Args:
          training: Whether to return those that train too, or only those that evaluate.
        """
        state, found = self.state_shapes(), []
        if training:
            together = self.rounds_at_once > 1
            found = [self._together(state)] if together else self._trainings(state)
        return found + self._evaluations(state)

    def compile_ahead(
        self, *, training: bool = True, told: Callable[[int, int], None] | None = None
    ) -> None:
        """Compiles the programs of :meth:`calls` beside each other, instead of when first called.

        Args:
          training: As in :meth:`calls`.
          told: Called with how many programs are compiled, and how many there are.
        """
        # Each is traced here, while those before it are compiled: tracing holds Python's lock.
        threads, compiling = ThreadPoolExecutor(os.cpu_count()), []
        calls, told = self.calls(training=training), told or (lambda done, total: None)
        try:
            told(0, len(calls))
            for call in calls:
                compiling.append(threads.submit(call.program.lower(*call.args).compile))
            for number, program in enumerate(as_completed(compiling), start=1):
                program.result()
                told(number, len(calls))
        finally:
            threads.shutdown(cancel_futures=True)

    def _evaluations(self, state: RunState) -> list[Call]:
        """Returns the evaluation program of each role."""
        return [
            Call(
                self._evaluate[g.role],
                (
                    *(state.clients[g.role], state.server, self.federation),
                    self.phases.everyone(g.role, self.federation, "validation"),
                ),
                self._on_each(len(g.names)),
                beside=0,
            )
            for g in self.groups
        ]

    def _together(self, state: RunState) -> Call:
        """Returns the program of several rounds in one dispatch."""
        first = last = np.int32(0)
        args = state, self.run_key, first, last, self.federation
        return Call(self._rounds, args, max(self._trained_on_each().values()), beside=0)

    def _trainings(self, state: RunState) -> list[Call]:
        """Returns the training program of each role."""
        clients, updates = self._trained_on_each(), self._update_bytes(state)
        return [
            Call(
                train,
                (state.clients[role], state.server, self.run_key, np.int32(0), self.federation),
                clients[role],
                beside=sum(updates.values()) - updates[role],
            )
            for role, train in self._train.items()
        ]

    def _trained_on_each(self) -> dict[str, int]:
        """Returns how many clients of each role train on each device."""
        if self.mapping.private:
            return {g.role: self._on_each(len(g.names)) for g in self.groups}
        return {r: self._on_each(self.phases.num_participants(r)) for r in self._train}

    def _on_each(self, clients: int) -> int:
        """Returns the number of clients on each device."""
        return -(-clients // self.mapping.num_devices)

    def _update_bytes(self, state: RunState) -> dict[str, int]:
        """Returns the bytes of each role's updates on each device."""
        return {
            g.role: num_bytes(self.train_shapes(g, state)) // self.mapping.num_devices
            for g in self.groups
        }

    def held_bytes(self) -> int:
        """Returns the bytes on each device that stay there during a run: data and state."""
        return bytes_per_device((self.federation, self.state_shapes()))

    def init(self, key: jax.Array | None = None) -> RunState:
        """Returns the state before the first round; ``key`` replaces the seed."""
        return self._init(self._key(key), self.federation)

    def _key(self, key: jax.Array | None) -> jax.Array:
        return self.run_key if key is None else key

    def state_shapes(self) -> RunState:
        """Returns the shapes and shardings of :meth:`init`'s state, without computing it."""
        return self._each(shapes_on, self._init.eval_shape(self.run_key, self.federation))

    def put(self, state: RunState) -> RunState:
        """Puts a restored state on the devices; arrays that are there already stay."""
        return self._each(lambda x, s: x if isinstance(x, jax.Array) else put(x, s), state)

    def _each(self, fn: Callable[[PyTree, NamedSharding], PyTree], state: RunState) -> RunState:
        """Maps ``fn(leaf, sharding)`` over a state."""
        server, clients = self._state_sharding
        return RunState(
            jax.tree.map(lambda leaf: fn(leaf, server), state.server),
            {
                role: jax.tree.map(lambda leaf, s=clients[role]: fn(leaf, s), own)
                for role, own in state.clients.items()
            },
        )

    def round(
        self, state: RunState, round: int, key: jax.Array | None = None
    ) -> tuple[RunState, RoundInfo]:
        """Runs one round: every group trains, then the server aggregates. ``state`` is donated.

        Args:
          state: The state before the round.
          round: The number of the round, from 0; it decides batches and participants.
          key: Replaces the seed.

        Returns:
          The state after the round, and what the round reports.
        """
        # The round is passed as a NumPy scalar: making it a JAX array would cost a dispatch.
        key = self._key(key)
        trained = self._trained(state, key, np.int32(round))
        if self.mapping.num_devices > 1:
            # The server's mean is a collective. A CPU device that reaches it long before the others
            # first warns that it may be stuck, and finally gives up.
            jax.block_until_ready(trained)
        state = self._aggregate(
            state,
            server_part(trained),
            key,
            np.int32(round),
            self.federation,
        )
        return state, self._reported(round_info(trained))

    def _trained(
        self, state: RunState, key: jax.Array, round: np.int32
    ) -> dict[str, ClientUpdates]:
        """Returns the updates of each role's training phase."""
        return {
            role: train(state.clients[role], state.server, key, round, self.federation)
            for role, train in self._train.items()
        }

    def _reported(self, tree: PyTree) -> PyTree:
        """Makes results readable in every process."""
        if not self.mapping.private:
            return tree
        return self._gather(jax.block_until_ready(tree))

    def rounds(
        self, state: RunState, first: int, last: int, key: jax.Array | None = None
    ) -> tuple[RunState, list[RoundInfo]]:
        """Runs the rounds from ``first`` up to, but not including, ``last``. ``state`` is donated.

        Returns:
          The state after the rounds, and what each of them reported.
        """
        if self.rounds_at_once == 1:
            infos = []
            for round in range(first, last):
                state, info = self.round(state, round, key)
                infos.append(info)
            return state, infos
        numbers = np.int32(first), np.int32(last)
        state, rows = self._rounds(state, self._key(key), *numbers, self.federation)
        rows = jax.device_get(rows)
        return state, [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(last - first)]

    def evaluate(self, state: RunState, split: str) -> dict[str, dict[str, Rows]]:
        """Returns the metrics of every client's deployed models on a split.

        Args:
          state: The state of the run.
          split: "train", "validation" or "test".

        Returns:
          ``{role: {model name: {metric: [K]}}}`` on the host, the headline model of a role first.
        """
        rows = self._measured(state, split, logits=False)
        return {g.role: self._in_order(g, rows[g.role].metrics) for g in self.groups}

    def evaluate_examples(
        self, state: RunState, split: str
    ) -> tuple[dict[str, dict[str, Rows]], dict[str, dict[str, list[np.ndarray]]]]:
        """Returns what :meth:`evaluate` does, and the logits of every example.

        Args:
          state: The state of the run.
          split: "train", "validation" or "test".

        Returns:
          The metrics, and ``{role: {model name: [[n, ...], ...]}}`` with an array per client, in
          the order of its split; without models for a task that does not keep logits.
        """
        rows, metrics, logits = self._measured(state, split, logits=True), {}, {}
        for g in self.groups:
            metrics[g.role] = self._in_order(g, rows[g.role].metrics)
            sizes = np.asarray(getattr(g, split).size).tolist()
            logits[g.role] = {
                name: [own[:size] for own, size in zip(stacked, sizes, strict=True)]
                for name, stacked in self._in_order(g, rows[g.role].logits).items()
            }
        return metrics, logits

    def _in_order(self, group: Group, rows: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the real clients' rows by model, on the host, the headline model first.

        JAX sorts a dict by its keys; this restores the method's order.
        """
        models = self.phases.algorithm.clients[group.role].models
        return {name: _first(rows[name], len(group.names)) for name in models if name in rows}

    def _measured(self, state: RunState, split: str, *, logits: bool) -> dict[str, Measured]:
        """Returns a row per slot, by role; rows of empty slots are arbitrary."""
        found = {}
        for role, evaluate in self._evaluate.items():
            chunk = self.phases.everyone(role, self.federation, split)
            rows = evaluate(state.clients[role], state.server, self.federation, chunk)
            # They are large, and most calls need none.
            found[role] = rows if logits else rows._replace(logits={})
        return self._reported(found)

    def predictions(self, state: RunState, group: Group, row: int, split: str) -> np.ndarray:
        """Returns the predictions of one client's deployed model on a split.

        They are what the task's ``predict`` returns.

        Args:
          state: The state of the run.
          group: The client's group.
          row: The client's row in the group.
          split: "train", "validation" or "test".

        Returns:
          ``[n, ...]`` on the host, in the order of the client's split.
        """
        size, batch = int(getattr(group, split).size[row]), self._batch_size
        found = []
        for start in range(0, size, batch):
            places = np.minimum(np.arange(start, start + batch), size - 1)
            out = self._predicted(state, group.role, row, split, places)
            found.append(np.asarray(out)[: size - start])
        return np.concatenate(found)

    def _predicted(
        self, state: RunState, role: str, row: int, split: str, places: np.ndarray
    ) -> PyTree:
        """Returns the predictions for the examples at ``places`` of the split."""
        chunk = self.phases.everyone(role, self.federation, split)
        out = self._reported(
            self._predict[role](
                state.clients[role], state.server, self.federation, chunk, row, places
            )
        )
        # In a private mapping every client has a slot, and all devices have equally many slots.
        device = row * self.mapping.num_devices // len(self.federation.groups[role][split].size)
        return out[device] if self.mapping.private else out

    def deployed(
        self, state: RunState, group: Group, row: int, data: ClientData
    ) -> tuple[Model, Variables]:
        """Returns the network that one client deploys first, and its variables on the host.

        Args:
          state: The state of the run.
          group: The client's group.
          row: The client's row in the group.
          data: The client's training examples; some methods adapt the network to them.
        """
        client = self.phases.algorithm.clients[group.role]
        name, model = next(iter(client.models.items()))
        pick = self._jit(
            lambda tree, row: jax.tree.map(lambda leaf: leaf[row], tree),
            optimized=False,
            out_shardings=self.mapping.replicated,
        )
        own = jax.tree.map(np.asarray, pick(state.clients[group.role], np.int32(row)))
        given = data if client.adapts else None
        deploy = self._jit(
            lambda server, own, data: client.deploy(
                self.phases.algorithm.download(server, group.role), own, data
            )[name]
        )
        return model, jax.tree.map(np.asarray, deploy(state.server, own, given))

    def payload_bytes(self) -> dict[str, tuple[int, int]]:
        """Returns how many bytes ``(up, down)`` a client of each role exchanges in a round."""
        state = self.state_shapes()
        payload = {}
        for group in self.groups:
            trained = self.train_shapes(group, state)
            down = jax.eval_shape(
                lambda server, role=group.role: self.phases.algorithm.download(server, role),
                state.server,
            )
            payload[group.role] = (
                num_bytes(trained.upload) // trained.weight.shape[0],
                num_bytes(down),
            )
        return payload

    def train_shapes(self, group: Group, state: RunState) -> ClientUpdates:
        """Returns the shapes of a group's training results, without running the training."""
        # The compiled function is used because a run has traced it already.
        return self._train[group.role].eval_shape(
            state.clients[group.role],
            state.server,
            self.run_key,
            jnp.int32(0),
            self.federation,
        )


def _first(rows: PyTree, count: int) -> PyTree:
    """Returns the rows of real clients, on the host; the empty slots come after them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], rows)
