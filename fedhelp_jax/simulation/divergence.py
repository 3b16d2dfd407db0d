"""Detects clients that have diverged: found on the device, reported and counted on the host.

A client has diverged when the metrics it reports, its own state or its upload hold NaN or infinity
in the last round that it took part in, or when its deployed model gives such logits. The server
leaves uploads that are not finite out of its mean (`fedhelp_jax.simulation.round`).
"""

import logging
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from fedhelp_jax.core.errors import Failure, first_of
from fedhelp_jax.core.tree import all_finite, choose, zeros_of
from fedhelp_jax.typing import PyTree, Record, Upload

_log = logging.getLogger(__name__)

# An extra metric: the number of examples of the split whose logits are not all finite.
NON_FINITE = "non_finite"


class NonFinite(NamedTuple):
    """Flags where the outcome of a client's round holds NaN or infinity, one boolean per client.

    Attributes:
      loss: Whether the scalars that it reports do.
      state: Whether the state that it keeps does.
      upload: Whether its upload does; the server then leaves it out.
    """

    loss: PyTree
    state: PyTree
    upload: Upload


def quarantine(state: PyTree, upload: Upload, info: PyTree) -> tuple[NonFinite, PyTree]:
    """Returns where one client's update is not finite, and the upload, zeroed if not finite."""
    found = NonFinite(~all_finite(info), ~all_finite(state), ~all_finite(upload))
    # A weight of 0 in the mean is not enough: 0 times NaN is NaN.
    return found, choose(found.upload, zeros_of(upload), upload)


class Diverged(Failure):
    """Raised when every client of a role has diverged; the run has been saved and stops.

    Attributes:
      summary: The content of ``summary.json``; empty in all processes but the first.
    """

    def __init__(self, message: str, summary: Record):
        self.summary = summary
        super().__init__(message)


class Divergence:
    """Keeps track of which clients of a run have diverged.

    Attributes:
      clients: The names of the diverged clients by role, in the order of the groups.
    """

    def __init__(
        self,
        names: Mapping[str, Sequence[str]],
        before: Mapping[str, Sequence[str]] | None = None,
        *,
        warns: bool = True,
        run: str = "",
    ):
        """Starts with the clients that had diverged before.

        Args:
          names: The names of all clients, by role.
          before: The value of `clients` when the same run stopped, if it is resumed.
          warns: Whether divergence is logged.
          run: The name of the run in the log, if there are several.
        """
        self._names, self._warns, self._run = names, warns, f"{run}: " if run else ""
        self._told: set[str] = set()
        self.clients = {role: list((before or {}).get(role, ())) for role in names}

    def trained(
        self, round: int, participants: Mapping[str, jax.Array], found: Mapping[str, NonFinite]
    ) -> dict[str, int]:
        """Records a round, and logs which clients have diverged in it.

        Args:
          round: The number of the round, from 1, for the log.
          participants: By role, the ``[M]`` rows that took part; empty slots lie past the end.
          found: By role, the ``[M]`` flags of the participants.

        Returns:
          By role, how many uploads were left out.
        """
        left_out, lines = {}, []
        for role, names in self._names.items():
            slots, bad = np.asarray(participants[role]), jax.tree.map(np.asarray, found[role])
            present = slots < len(names)
            left_out[role] = int(bad.upload[present].sum())
            now = {}
            for place in np.flatnonzero(present).tolist():
                kinds = [kind for kind in NonFinite._fields if getattr(bad, kind)[place]]
                now[names[int(slots[place])]] = ", ".join(kinds)
            lines += [
                f"{role} {name} ({kinds})"
                for name, kinds in now.items()
                if kinds and name not in self.clients[role]
            ]
            known = set(self.clients[role]) - now.keys()
            known |= {name for name, kinds in now.items() if kinds}
            self._set(role, known)
        tail = f"; {sum(left_out.values())} of the uploads are left out of the server's mean"
        self._warn(
            f"round {round}: NaN or infinity in the training of",
            lines,
            tail if any(left_out.values()) else "",
        )
        return left_out

    def measured(
        self, when: str, results: Mapping[str, Mapping[str, Mapping[str, jax.Array]]]
    ) -> None:
        """Records an evaluation, and logs which clients' logits are not finite.

        Args:
          when: The round and the split, for the log.
          results: The results of `CompiledRounds.evaluate`.
        """
        lines = []
        for role, models in results.items():
            names = self._names[role]
            for number, (model, metrics) in enumerate(models.items()):
                counts = np.asarray(metrics[NON_FINITE]).tolist()
                bad = [name for name, count in zip(names, counts, strict=True) if count]
                new = [name for name in bad if name not in self.clients[role]]
                found = [f"{role} {name} ({model})" for name in new]
                if number == 0:  # the headline model decides whether the client has diverged
                    self._set(role, {*self.clients[role], *new})
                else:  # other models do not count as divergence, so they are logged only once
                    found = [line for line in found if line not in self._told]
                    self._told.update(found)
                lines += found
        self._warn(f"{when}: logits that are not finite of", lines)

    @property
    def count(self) -> int:
        """How many clients have diverged."""
        return sum(map(len, self.clients.values()))

    @property
    def lost_roles(self) -> list[str]:
        """The roles of which every client has diverged."""
        return [
            r for r, names in self._names.items() if names and len(self.clients[r]) == len(names)
        ]

    def scores(
        self, values: Mapping[str, jax.Array | np.ndarray]
    ) -> dict[str, jax.Array | np.ndarray]:
        """Replaces the values of roles of which every client has diverged by NaN."""
        lost = self.lost_roles
        return {r: np.full(len(v), np.nan) if r in lost else v for r, v in values.items()}

    def message(self, round: int, workdir: Any) -> str:
        """Returns the message of the failure that ends a run because a whole role diverged."""
        lost = " and ".join(self.lost_roles)
        return (
            f"every {lost} client has diverged by round {round} (NaN or infinity); the run in "
            f"{workdir} is saved. A lower learning rate may help; "
            "--config.on_divergence=continue goes on regardless"
        )

    def _set(self, role: str, diverged: Set[str]) -> None:
        # Make a new dict: callers keep the old one as the record of an earlier round.
        own = [name for name in self._names[role] if name in diverged]
        self.clients = {**self.clients, role: own}

    def _warn(self, head: str, lines: Sequence[str], tail: str = "") -> None:
        if lines and self._warns:
            _log.warning("%s%s %s%s", self._run, head, first_of(lines), tail)
