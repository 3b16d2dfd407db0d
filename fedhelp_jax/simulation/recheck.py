"""Measures one client of each role again, with another program, before results are reported.

A wrong number does not look wrong, and back ends have returned different numbers from one call to
the next (``docs/cpu-race.md``). Therefore the end of a run measures the same networks on the same
examples again: in batches of another size, on a single device, without the other clients.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedhelp_jax.core.compilation import jit
from fedhelp_jax.core.errors import Failure
from fedhelp_jax.data.federation import ClientIndex, Group, Pool, PublicPool
from fedhelp_jax.data.types import FederatedDataset
from fedhelp_jax.simulation.round import ClientChunk, FederationArrays, RoundProgram, Rows, RunState
from fedhelp_jax.simulation.vectorize import make_mapping

# The metrics that are compared, and their tolerances relative to the larger value or 1, whichever
# is larger. Two programs differ only by rounding, which moves a loss by about 1e-6 and occasionally
# flips a pixel of a mask. Activations in bfloat16 round to 1 part in 256.
_TOLERANCE = {"loss": 1e-3, "dice": 0.01}
_BFLOAT16 = 50
# Images of a client for which a program with all optimisations is compiled.
_MANY = 500


def recheck(
    phases: RoundProgram,
    groups: Sequence[Group],
    public: PublicPool | None,
    state: RunState,
    dataset: FederatedDataset,
    split: str,
    results: dict[str, dict[str, Rows]],
    *,
    bfloat16: bool = False,
) -> None:
    """Compares results with those of another program, for the median client of each role.

    Args:
      phases: The method, and how the run mapped its clients.
      groups: All clients, by role.
      public: The public set.
      state: The state that was measured.
      dataset: The private data, on the host.
      split: The split that it was measured on.
      results: ``{role: {model name: {metric: [K]}}}``, as `CompiledRounds.evaluate` returns them.
      bfloat16: Whether activations are computed in bfloat16.

    Raises:
      Failure: If they disagree by more than rounding explains.
    """
    for group in groups:
        sizes = np.asarray(getattr(group, split).size)
        row = int(np.argsort(sizes, kind="stable")[len(sizes) // 2])
        if sizes[row] == 0:
            continue
        again = measured_alone(phases, group, public, state, dataset, row, split)
        for model, metrics in again.items():
            for name in _TOLERANCE.keys() & metrics.keys():
                before = float(results[group.role][model][name][row])
                value = float(np.asarray(metrics[name])[0])
                allowed = _TOLERANCE[name] * (_BFLOAT16 if bfloat16 else 1)
                apart = abs(before - value)
                if not (np.isfinite(before) or np.isfinite(value)):
                    continue
                if not apart <= allowed * max(1.0, abs(before), abs(value)):
                    raise Failure(
                        f"the {split} {name} of {group.names[row]} ({group.role}, {model}) is "
                        f"{before:g} by the run's program and {value:g} by another: one of them is "
                        "wrong, so no results are written. The run is saved; fedhelp evaluate "
                        "measures it again. Please report it with the versions of jax and jaxlib "
                        "and the processor (docs/cpu-race.md)"
                    )


def measured_alone(
    phases: RoundProgram,
    group: Group,
    public: PublicPool | None,
    state: RunState,
    dataset: FederatedDataset,
    row: int,
    split: str,
) -> dict[str, Rows]:
    """Returns one client's metrics by model and name, ``[1]``, from a program for it alone."""
    mapping, role = phases.mapping, group.role
    # Gathered by a separate program, so that every process of a distributed run gets the client.
    pick = jit(
        lambda tree, row: jax.tree.map(lambda leaf: leaf[row][None], tree),
        platform=mapping.platform,
        optimized=False,
        out_shardings=mapping.replicated,
    )
    states, server, public = jax.tree.map(
        np.asarray, (pick(state.clients[role], np.int32(row)), state.server, public)
    )
    client = dataset.clients[int(np.asarray(group.ids)[row])]
    adapts = phases.algorithm.clients[role].adapts
    parts = [getattr(client, split), *([client.train] if adapts else [])]
    starts = np.cumsum([0, *map(len, parts)])
    on_host: Any = np.asarray  # NumPy arrays in place of JAX's
    tables = [
        ClientIndex(
            on_host(np.arange(start, start + len(part), dtype=np.int32)[None]),
            on_host([len(part)], np.int32),
        )
        for start, part in zip(starts, parts, strict=False)
    ]
    index = np.concatenate(parts)
    pool: Any = Pool(dataset.images[index], dataset.labels[index])  # pyright: ignore[reportArgumentType]
    part = ClientChunk(np.zeros(1, np.int32), None, pool, tables[1] if adapts else None, tables[0])
    batch = phases.eval_batch_size
    alone = dataclasses.replace(
        phases,
        num_clients={role: 1},
        mapping=make_mapping(1, 1, local=True),
        eval_batch_size=batch // 2 + 1 if batch > 2 else batch + 1,  # another program
    )
    # With few images, compiling without optimisations saves more than a slow program loses.
    many = len(parts[0]) > _MANY
    evaluate = functools.partial(alone.evaluate, role)
    measure = jit(evaluate, platform=mapping.platform, optimized=many)
    return measure(states, server, FederationArrays(None, public, {}, None), part).metrics
