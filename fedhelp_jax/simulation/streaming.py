"""Streams private images that do not fit on the devices from the host, in parts.

In every phase, the clients of a role are processed in consecutive parts: each device takes the next
of its own clients, as many as fit. A part's images are transferred while the previous part is
computed. The buffers always have the same shape, so nothing compiles after the first round. Each
device processes its clients and sums their uploads in the same order as it would with all images on
the devices.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.federation import SPLITS, ClientIndex, Federation, Group
from fedhelp_jax.simulation.compiled import Call, CompiledRounds
from fedhelp_jax.simulation.round import (
    ClientChunk,
    ClientUpdates,
    FederationArrays,
    Measured,
    RoundProgram,
    RunState,
)
from fedhelp_jax.simulation.sharding import bytes_per_device, put, shapes_on
from fedhelp_jax.typing import PyTree


class Buffer(NamedTuple):
    """The number of clients and of examples that a part has on each device."""

    clients: int
    examples: int


class HostFeeder:
    """Holds the private images on the host, and cuts them into parts.

    Attributes:
      batch_size: The number of examples in a part of :meth:`predicting`.
    """

    def __init__(self, federation: Federation, phases: RoundProgram, max_device_bytes: int):
        """Chooses the buffers.

        Args:
          federation: The data, left on the host.
          phases: The method, and how its clients run.
          max_device_bytes: The most bytes of images and targets on a device, in both buffers.

        Raises:
          UserError: If the examples of a single client do not fit.
        """
        self.mapping, self._limit = phases.mapping, max_device_bytes
        self._pool = jax.tree.map(_on_host, federation.pool)
        self._tables = {
            g.role: {split: jax.tree.map(np.asarray, getattr(g, split)) for split in SPLITS}
            for g in federation.groups
        }
        self._adapts = {role: phases.algorithm.clients[role].adapts for role in self._tables}
        self._example_bytes = sum(leaf.nbytes // len(leaf) for leaf in self._pool)
        self._capacity = max_device_bytes // 2 // self._example_bytes
        self._training, self._measuring, largest = {}, {}, 0
        for group in federation.groups:
            role, splits = group.role, [self._needs(group.role, split) for split in SPLITS]
            self._check(group.names, np.max(splits, axis=0))
            self._training[role] = self._buffer(splits[0], phases.num_slots(role))
            # One buffer serves all splits; it is sized for those that are measured in a run.
            slots = self.mapping.slots(len(group.names))
            buffer = self._buffer(np.maximum(*splits[1:]), slots)
            examples = max(buffer.examples, int(np.max(splits)))
            self._measuring[role] = buffer._replace(examples=examples)
            largest = max(largest, *(table.size.max() for table in self._tables[role].values()))
        self.batch_size = min(phases.eval_batch_size, int(largest))

    def _needs(self, role: str, split: str | None) -> np.ndarray:
        """Returns how many examples a part must hold of each client, ``[K]``.

        None as the split means training.
        """
        splits = self._looked_at(role, split)
        return np.sum([self._tables[role][name].size for name in splits], axis=0)

    def _looked_at(self, role: str, split: str | None) -> tuple[str, ...]:
        if split is None:
            return ("train",)
        return tuple(dict.fromkeys(("train", split))) if self._adapts[role] else (split,)

    def _check(self, names: Sequence[str], needs: np.ndarray) -> None:
        if needs.max() <= self._capacity:
            return
        largest = int(needs.argmax())
        count = int(needs[largest])
        raise UserError(
            f"config.mapping.max_device_bytes = {self._limit} must be at least "
            f"{2 * count * self._example_bytes}: twice the {count} images that {names[largest]} "
            "needs at once, since the next client's come meanwhile"
        )

    def _buffer(self, needs: np.ndarray, slots: int) -> Buffer:
        """Sizes a buffer for as many clients as fit on average, and for the most they may need."""
        most, chunk = slots // self.mapping.num_devices, self.mapping.chunk_size
        clients = max(1, min(most, int(self._capacity / max(1, needs.mean()))))
        if 0 < chunk < clients:
            clients -= clients % chunk
        examples = int(np.sort(needs)[-clients:].sum())
        return Buffer(clients, max(1, min(self._capacity, examples)))

    def shapes(self, role: str, slots: int) -> ClientChunk:
        """Returns the shapes of a training part that would hold one client per slot."""
        length = self.mapping.num_devices * self._training[role].examples
        pool = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), self._pool
        )
        width = self._tables[role]["train"].index.shape[1]
        index, size = (
            jax.ShapeDtypeStruct(shape, np.int32) for shape in ((slots, width), (slots,))
        )
        return ClientChunk(None, None, pool, _table(index, size), None)

    def training(self, role: str, slot: np.ndarray) -> Iterator[ClientChunk]:
        """Yields the parts to train: the clients in ``slot``, ``[M]`` rows of the group."""
        return self._parts(role, slot, None, self._training[role])

    def measuring(self, role: str, split: str) -> Iterator[ClientChunk]:
        """Yields the parts to evaluate on a split: all clients of a role."""
        count = len(self._tables[role][split].size)
        slot = np.full(self.mapping.slots(count), count)
        slot[:count] = np.arange(count)
        return self._parts(role, slot, split, self._measuring[role])

    def predicting(self, role: str, row: int, split: str, places: np.ndarray) -> ClientChunk:
        """Returns a part that holds one client, and the examples at ``places`` of its split.

        Args:
          role: The client's role.
          row: The client's row in the group.
          split: The split.
          places: ``[batch_size]`` indices into the split.

        Returns:
          The part, with one pool for all devices.
        """
        tables, count = self._tables[role], len(places)
        examples, length, train = [tables[split].index[row, places]], count, None
        if self._adapts[role]:
            index, size = tables["train"]
            examples.append(index[row, : size[row]])
            length += int(size.max())
            own = np.arange(index.shape[1], dtype=np.int32)
            train = _table(count + own[None], size[row : row + 1])
        asked = _table(np.arange(count, dtype=np.int32)[None], np.array([count], np.int32))
        pool = self._gathered([np.concatenate(examples)], length)
        return ClientChunk(np.array([row], np.int32), None, pool, train, asked)

    def on_devices(self, part: ClientChunk, pool: NamedSharding) -> ClientChunk:
        """Starts to transfer a part to the devices, with its pool placed as ``pool`` says."""
        return self._on(put, part, pool)

    def _on(
        self, fn: Callable[[PyTree, NamedSharding], PyTree], part: ClientChunk, pool: NamedSharding
    ) -> ClientChunk:
        """Applies ``fn(tree, sharding)`` to the pool of a part and to the rest, replicated."""
        rest = fn(part._replace(pool=None), self.mapping.replicated)
        return rest._replace(pool=fn(part.pool, pool))

    def _buffer_of(self, role: str, split: str | None) -> Buffer:
        return self._training[role] if split is None else self._measuring[role]

    def part_shapes(self, role: str, split: str | None, pool: NamedSharding) -> ClientChunk:
        """Returns the shapes and shardings of a part that is measured, or of one that is trained.

        Args:
          role: The role.
          split: The split that is measured; None means training.
          pool: As in :meth:`on_devices`.
        """
        devices, buffer = self.mapping.num_devices, self._buffer_of(role, split)
        nobody = [range(0)] * devices
        part = self._part(role, np.zeros((devices, 0), np.int64), nobody, split, buffer)
        return self._on(shapes_on, part, pool)

    def clients(self, role: str, split: str | None) -> int:
        """Returns how many clients a part has on each device; None means training."""
        return self._buffer_of(role, split).clients

    def _parts(
        self, role: str, slot: np.ndarray, split: str | None, buffer: Buffer
    ) -> Iterator[ClientChunk]:
        needs = self._needs(role, split)
        blocks = slot.reshape(self.mapping.num_devices, -1)
        cuts = [_cut(needs[block[block < len(needs)]], buffer) for block in blocks]
        for number in range(max(map(len, cuts))):
            places = [cut[number] if number < len(cut) else range(0) for cut in cuts]
            yield self._part(role, blocks, places, split, buffer)

    def _part(
        self,
        role: str,
        blocks: np.ndarray,
        places: Sequence[range],
        split: str | None,
        buffer: Buffer,
    ) -> ClientChunk:
        """Returns the part of the clients at ``places`` of each device's block of slots."""
        tables, shape = self._tables[role], (len(blocks), buffer.clients)
        slot = np.full(shape, len(tables["train"].size), np.int32)
        place = np.full(shape, blocks.shape[1], np.int32)
        width = tables["train"].index.shape[1]
        found = {
            name: _table(np.zeros((*shape, width), np.int32), np.zeros(shape, np.int32))
            for name in self._looked_at(role, split)
        }
        examples = []
        for device, own in enumerate(places):
            slot[device, : len(own)] = blocks[device, own]
            place[device, : len(own)] = own
            examples.append(_numbered(found, tables, slot[device, : len(own)], device))
        pool = self._gathered(examples, buffer.examples)
        flat = {
            name: _table(index.reshape(-1, width), size.reshape(-1))
            for name, (index, size) in found.items()
        }
        measured = None if split is None else flat[split]
        return ClientChunk(slot.reshape(-1), place.reshape(-1), pool, flat.get("train"), measured)

    def _gathered(self, examples: Sequence[np.ndarray], length: int) -> PyTree:
        """Gathers the examples of each device into a pool of ``length``."""

        def one(leaf: np.ndarray) -> np.ndarray:
            out = np.zeros((len(examples), length, *leaf.shape[1:]), leaf.dtype)
            for own, rows in zip(examples, out, strict=True):
                # With any mode but "clip", NumPy makes an intermediate copy.
                np.take(leaf, own, axis=0, out=rows[: len(own)], mode="clip")
            return out.reshape(-1, *leaf.shape[1:])

        return jax.tree.map(one, self._pool)


def _table(index: PyTree, size: PyTree) -> ClientIndex:
    """Makes a `ClientIndex` of NumPy arrays or shapes, which its types do not allow."""
    return ClientIndex(index, size)


def _on_host(leaf: PyTree) -> np.ndarray:
    """Returns a NumPy array of the dtype that the leaf has on the devices."""
    leaf = np.asarray(leaf)
    return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)


def _cut(needs: np.ndarray, buffer: Buffer) -> list[range]:
    """Cuts clients into consecutive parts that fit a buffer; ``needs`` are their examples."""
    parts, start, used = [], 0, 0
    for i, need in enumerate(needs.tolist()):
        if i - start == buffer.clients or used + need > buffer.examples:
            parts.append(range(start, i))
            start, used = i, 0
        used += need
    return [*parts, range(start, len(needs))]


def _numbered(
    found: dict[str, PyTree], tables: dict[str, PyTree], rows: np.ndarray, device: int
) -> np.ndarray:
    """Fills tables with indices into a device's pool; returns the examples it must hold."""
    examples, used = [np.zeros(0, np.int32)], 0
    for i, row in enumerate(rows):
        for name, (index, size) in found.items():
            own = tables[name].index[row, : tables[name].size[row]]
            index[device, i, : len(own)] = used + np.arange(len(own))
            size[device, i] = len(own)
            examples.append(own)
            used += len(own)
    return np.concatenate(examples)


class StreamedRounds(CompiledRounds):
    """A `CompiledRounds` whose private images stay on the host and are streamed in parts.

    Its results equal those of a `CompiledRounds` up to rounding.
    """

    def __init__(
        self,
        phases: RoundProgram,
        federation: Federation,
        *,
        seed: int = 0,
        max_device_bytes: int,
        donate: bool = True,
    ):
        """Prepares the phases; nothing is compiled before its first call.

        Args:
          phases: The method, and how its clients run.
          federation: The data, left on the host.
          seed: Determines all randomness of the run.
          max_device_bytes: The most bytes of private images and targets on a device at a time:
            those of the part that is computed and of the next.
          donate: As in `CompiledRounds`.

        Raises:
          UserError: If the examples of a single client do not fit, or the mapping is private.
        """
        if phases.mapping.private:
            raise UserError(
                f"config.mapping.max_device_bytes = {max_device_bytes} must be 0 in a "
                "--distributed run, where a process's devices hold only its own clients' images"
            )
        super().__init__(phases, federation, seed=seed, donate=donate)
        self._options = {"seed": seed, "max_device_bytes": max_device_bytes, "donate": donate}
        self._feed = feed = HostFeeder(federation, phases, max_device_bytes)
        self._batch_size = feed.batch_size
        self._begin = {}
        for role in self._train:
            shapes = feed.shapes(role, phases.num_slots(role))
            self._begin[role] = self._by_client(
                functools.partial(phases.begin, role, shapes=shapes)
            )
            train = functools.partial(phases.train, role)
            self._train[role] = self._by_client(train, donate_argnums=6)

    def _placed(self, federation: Federation) -> FederationArrays:
        groups = {g.role: {"ids": g.ids} for g in federation.groups}
        arrays = FederationArrays(None, federation.public, groups, None)
        return jax.device_put(arrays, self.mapping.replicated)

    def _part_shapes(self, role: str, split: str | None) -> ClientChunk:
        return self._feed.part_shapes(role, split, self.mapping.by_client)

    def _evaluations(self, state: RunState) -> list[Call]:
        return [
            Call(
                evaluate,
                (
                    *(state.clients[role], state.server, self.federation),
                    self._part_shapes(role, "validation"),
                ),
                self._feed.clients(role, "validation"),
                beside=0,
            )
            for role, evaluate in self._evaluate.items()
        ]

    def _trainings(self, state: RunState) -> list[Call]:
        # The updates of all roles are on the devices; those of a part's role are donated.
        beside = sum(self._update_bytes(state).values())
        found = []
        for role, begin in self._begin.items():
            at = state.clients[role], state.server, self.run_key, np.int32(0), self.federation
            before = shapes_on(begin.eval_shape(*at), self.mapping.by_client)
            args = (*at, self._part_shapes(role, None), before)
            found.append(Call(self._train[role], args, self._feed.clients(role, None), beside))
        return found

    def held_bytes(self) -> int:
        """Returns the bytes on each device that stay there: public data, state and two parts."""
        parts = [self._part_shapes(r, split) for r in self._train for split in (None, "validation")]
        return super().held_bytes() + 2 * max(map(bytes_per_device, parts))

    def _trained(
        self, state: RunState, key: jax.Array, round: np.int32
    ) -> dict[str, ClientUpdates]:
        trained = {
            role: begin(state.clients[role], state.server, key, round, self.federation)
            for role, begin in self._begin.items()
        }
        slots = {role: np.asarray(begun.slot) for role, begun in trained.items()}

        def train(role: str, part: ClientChunk) -> ClientUpdates:
            trained[role] = self._train[role](
                *(state.clients[role], state.server, key, round, self.federation),
                *(part, trained[role]),
            )
            return trained[role]

        parts = ((r, part) for r in slots for part in self._feed.training(r, slots[r]))
        self._stream(state, parts, train)
        return trained

    def _measured(self, state: RunState, split: str, *, logits: bool) -> dict[str, Measured]:
        found: dict[str, list[PyTree]] = {role: [] for role in self._evaluate}

        def measure(role: str, part: ClientChunk) -> PyTree:
            rows = self._evaluate[role](state.clients[role], state.server, self.federation, part)
            kept = rows if logits else rows._replace(logits={})
            found[role].append((part.slot, kept))
            return rows

        parts = ((r, part) for r in found for part in self._feed.measuring(r, split))
        self._stream(state, parts, measure)
        return {role: _by_row(parts) for role, parts in found.items()}

    def _predicted(
        self, state: RunState, role: str, row: int, split: str, places: np.ndarray
    ) -> PyTree:
        part = self._feed.predicting(role, row, split, places)
        part = self._feed.on_devices(part, self.mapping.replicated)
        at = state.clients[role], state.server, self.federation, part
        return self._predict[role](*at, 0, np.arange(len(places)))

    def train_shapes(self, group: Group, state: RunState) -> ClientUpdates:
        """Returns the shapes of a group's training results, without running the training."""
        return self._begin[group.role].eval_shape(
            *(state.clients[group.role], state.server, self.run_key, np.int32(0), self.federation)
        )

    def _stream(
        self,
        state: RunState,
        parts: Iterable[tuple[str, ClientChunk]],
        compute: Callable[[str, ClientChunk], PyTree],
    ) -> None:
        """Computes parts one after the other, while the images of the next one are transferred.

        At most two parts are on the devices: a part is computed once the previous one is done, and
        the first once the state has been computed.
        """
        running: PyTree = state
        for role, part in parts:
            placed = self._feed.on_devices(part, self.mapping.by_client)
            jax.block_until_ready(running)
            running = compute(role, placed)


def _by_row(parts: Sequence[tuple[PyTree, PyTree]]) -> PyTree:
    """Returns the rows of all parts on the host, ordered by the clients' rows in their group."""
    slots, rows = zip(*parts, strict=True)
    order = np.argsort(np.concatenate(slots), kind="stable")  # empty slots are past the end
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *rows)
