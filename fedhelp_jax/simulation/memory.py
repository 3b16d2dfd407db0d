"""Chooses how many clients are vectorised at a time, so that a run fits in its devices' memory."""

import json
import logging
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax

from fedhelp_jax.core import distributed
from fedhelp_jax.core.memory import device_bytes, gib
from fedhelp_jax.simulation.compiled import CompiledRounds

_log = logging.getLogger(__name__)

# The rest is for what the compiler does not count, such as fragmentation.
_USED = 0.9

_Rounds = TypeVar("_Rounds", bound=CompiledRounds)


class Need(NamedTuple):
    """The memory that a device needs while it executes a program.

    Attributes:
      clients: The number of clients that are vectorised at a time.
      fixed: The bytes of the state, the data and the results.
      temporary: The bytes of temporaries; infinite if the compiler ran out of memory.
    """

    clients: int
    fixed: float
    temporary: float

    @property
    def total(self) -> float:
        """The bytes of all together."""
        return self.fixed + self.temporary


def fit(rounds: _Rounds, *, training: bool = True, memory: int | None = None) -> _Rounds:
    """Returns rounds that vectorise as many clients at a time as fit in the devices' memory.

    The programs are compiled for all clients at once, and the memory that the compiler plans for
    them is compared with that of the devices. If it is too much, clients are divided into equal
    chunks: temporaries grow about linearly with the clients of a chunk, so the first guess is
    proportional. It is compiled and compared too, and halved until it fits. What has been compiled
    is used by the run. With several processes, all must call this, and all choose the same.

    Args:
      rounds: The rounds. They are returned unchanged if their mapping does not vectorise all
        clients at once, or if the memory of the devices is unknown, as on CPUs.
      training: Whether the rounds will train, or only evaluate.
      memory: The bytes of a device; None asks the devices.

    Raises:
      UserError: If even one client at a time does not fit.
    """
    memory = _memory_of_all(rounds) if memory is None else memory
    if rounds.mapping.chunk_size != 0 or memory is None:
        return rounds
    at_once = needs = needs_of(rounds, training=training)
    limit, chunk = _USED * memory, max(need.clients for need in needs)
    while max(need.total for need in needs) > limit and chunk > 1:
        chunk = min((chunk + 1) // 2, *(_guess(n, limit) for n in needs if n.total > limit))
        rounds = rounds.with_chunk_size(_even(chunk, [need.clients for need in at_once]))
        chunk = rounds.mapping.chunk_size
        needs = needs_of(rounds, training=training)
    _refuse(needs, memory)
    if rounds.mapping.chunk_size:
        _tell(rounds, max(need.total for need in at_once), memory)
    return rounds


def _memory_of_all(rounds: CompiledRounds) -> int | None:
    """Returns the memory of the smallest device, of any process; None if it is unknown."""
    found = [device_bytes(device) for device in rounds.mapping.mesh.local_devices]
    everywhere = [json.loads(text) for text in distributed.all_gather_text(json.dumps(found))]
    flat = [size for sizes in everywhere for size in sizes]
    return None if None in flat else min(flat)


def needs_of(rounds: CompiledRounds, *, training: bool = True) -> list[Need]:
    """Returns what each program needs, without temporaries if the back end does not tell.

    With several processes, all must call it; each gets the most that a process needs.

    Args:
      rounds: The rounds. Their programs are compiled.
      training: As in `fit`.
    """
    held, chunk, found = rounds.held_bytes(), rounds.mapping.chunk_size, []
    for call in rounds.calls(training=training):
        clients = min(chunk or call.clients, call.clients)
        try:
            memory = call.program.lower(*call.args).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            # On a GPU, the compiler may try out operations on arrays of their full size.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found.append(Need(clients, held, float("inf")))
            continue
        if memory is None:
            found.append(Need(clients, held, 0))
            continue
        # Arguments are held anyway. Those that a program does not use are not counted in its own.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        found.append(Need(clients, held + call.beside + new, memory.temp_size_in_bytes))
    # Compilers may decide differently in each process.
    texts = distributed.all_gather_text(json.dumps(found))
    same = zip(*(json.loads(text) for text in texts), strict=True)
    return [Need(*map(max, zip(*needs, strict=True))) for needs in same]


def _guess(need: Need, limit: float) -> int:
    """Returns how many clients will fit, at least 1.

    Some temporaries do not depend on the chunk, so slightly fewer are taken than in proportion.
    """
    if need.temporary == float("inf"):
        return need.clients
    return max(1, int(0.9 * need.clients * (limit - need.fixed) / need.temporary))


def _even(most: int, clients: Sequence[int]) -> int:
    """Returns a chunk size of at most ``most`` that divides clients into as few, equal chunks.

    Args:
      most: The largest chunk size.
      clients: The number of clients that each program computes on a device. If not all can be
        divided equally by one chunk size, the one that leaves the fewest slots empty is returned.
    """

    def slots(size: int) -> int:
        return sum(size * -(-n // size) for n in clients if n > size)

    return min((-(-n // -(-n // most)) for n in clients if n > most), key=slots)


def _refuse(needs: Sequence[Need], memory: int) -> None:
    worst = max(needs, key=lambda need: need.total)
    if worst.total > memory:
        total, computing = (
            gib(size) if size < float("inf") else "more than all"
            for size in (worst.total, worst.temporary)
        )
        raise distributed.Agreed(
            f"even one client at a time takes {total} of a device's {gib(memory)}: "
            f"{gib(worst.fixed)} for data, states and results, {computing} for "
            "computing; use more devices or a lower participation_rate, batch_size or "
            "mapping.max_device_bytes (an explicit mapping.chunk_size skips this check)"
        )


def _tell(rounds: CompiledRounds, at_once: float, memory: int) -> None:
    chunk, devices = rounds.mapping.chunk_size, rounds.mapping.num_devices
    each = {g.role: -(-len(g.names) // devices) for g in rounds.groups}
    parts = [f"{chunk} of {n} {role}" for role, n in each.items() if n > chunk]
    where = "" if devices == 1 else " on each device"
    need = f"take {gib(at_once)} of" if at_once < float("inf") else "exceed"
    _log.warning(
        "%s clients are vectorised at a time%s, because all at once would %s %s",
        " and ".join(parts),
        where,
        need,
        gib(memory),
    )
