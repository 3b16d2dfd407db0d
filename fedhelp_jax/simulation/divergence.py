"""Clients whose training leaves the numbers: found on the device, told and counted on the host.

A client has diverged when what it reports of its training, its own state or its upload holds NaN or
infinity in the last round that it took part in, or when its deployed model gives such logits. The
server leaves uploads that are not finite out of its mean (`fedhelp_jax.simulation.round`).
"""

import logging
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from fedhelp_jax.core.errors import Failure, first_of
from fedhelp_jax.core.tree import all_finite, choose, zeros_of
from fedhelp_jax.typing import JsonObject, PyTree, Record, Upload

_log = logging.getLogger(__name__)

# Beside the task's metrics: how many examples of the split have logits that are not all finite.
NON_FINITE = "non_finite"


class NonFinite(NamedTuple):
    """Where the outcome of a client's round holds NaN or infinity; booleans, one a client.

    Attributes:
      loss: In what it reports.
      state: In what it keeps.
      upload: In what it sends; the server then leaves it out.
    """

    loss: PyTree
    state: PyTree
    upload: Upload


def quarantine(state: PyTree, upload: Upload, info: PyTree) -> tuple[NonFinite, PyTree]:
    """Where the outcome of one client's update is not finite, and its upload, or zeros for it."""
    found = NonFinite(~all_finite(info), ~all_finite(state), ~all_finite(upload))
    # A weight of 0 in the mean is not enough: 0 times NaN is NaN.
    return found, choose(found.upload, zeros_of(upload), upload)


class Diverged(Failure):
    """Every client of a role has diverged; the run is saved, and goes no further.

    Attributes:
      summary: The content of ``summary.json``; nothing in other processes than the first.
    """

    def __init__(self, message: str, summary: Record):
        self.summary = summary
        super().__init__(message)


class Divergence:
    """Which clients of a run have diverged.

    Attributes:
      clients: Their names by role, in the order of the groups.
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
          names: By role, all clients.
          before: `clients` of the same run, when it stopped.
          warns: Whether what is found is logged.
          run: Which of several runs it is, for the log.
        """
        self._names, self._warns, self._run = names, warns, f"{run}: " if run else ""
        self._told: set[str] = set()
        self.clients = {role: list((before or {}).get(role, ())) for role in names}

    def trained(
        self, round: int, participants: Record, found: Mapping[str, NonFinite]
    ) -> dict[str, int]:
        """Takes note of a round, and logs which clients have diverged in it.

        Args:
          round: Its number, from 1, for the log.
          participants: By role ``[M]`` rows that took part; past the end for nobody.
          found: By role ``[M]`` what was found.

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

    def measured(self, when: str, results: Mapping[str, Mapping[str, Record]]) -> None:
        """Takes note of an evaluation, and logs which clients' logits are not finite.

        Args:
          when: Round and split, for the log.
          results: As `CompiledRounds.evaluate` returns them.
        """
        lines = []
        for role, models in results.items():
            names = self._names[role]
            for number, (model, metrics) in enumerate(models.items()):
                counts = np.asarray(metrics[NON_FINITE]).tolist()
                bad = [name for name, count in zip(names, counts, strict=True) if count]
                new = [name for name in bad if name not in self.clients[role]]
                found = [f"{role} {name} ({model})" for name in new]
                if number == 0:  # the one it deploys
                    self._set(role, {*self.clients[role], *new})
                else:  # once is enough, since its clients have not diverged
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
        """Roles of which every client has diverged."""
        return [
            r for r, names in self._names.items() if names and len(self.clients[r]) == len(names)
        ]

    def scores(self, values: Record) -> JsonObject:
        """Values by role and client, with NaN for roles of which every client has diverged."""
        lost = self.lost_roles
        return {r: np.full(len(v), np.nan) if r in lost else v for r, v in values.items()}

    def message(self, round: int, workdir: Any) -> str:
        """What a run that ends for this is told to end with."""
        lost = " and ".join(self.lost_roles)
        return (
            f"every {lost} client has diverged by round {round} (NaN or infinity); the run in "
            f"{workdir} is saved. A lower learning rate may help; "
            "--config.on_divergence=continue goes on regardless"
        )

    def _set(self, role: str, diverged: Set[str]) -> None:
        # A new dict, as those handed out belong to rounds gone by.
        own = [name for name in self._names[role] if name in diverged]
        self.clients = {**self.clients, role: own}

    def _warn(self, head: str, lines: Sequence[str], tail: str = "") -> None:
        if lines and self._warns:
            _log.warning("%s%s %s%s", self._run, head, first_of(lines), tail)
