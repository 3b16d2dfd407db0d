"""Checkpoints of the whole run state, which load bit for bit as they were saved, or are refused.

Orbax writes a checkpoint to a temporary folder and renames it, so a killed run leaves a complete
checkpoint or none. Orbax may not notice damage on the disk (a stored array with a flipped byte can
load without an error), or may report it from its own threads. Therefore the digests of a
checkpoint's files are written into it, in the format of ``sha256sum -c``, and compared before Orbax
reads it.

With several processes, each writes and reads its part of the arrays in one shared folder. The first
process does the rest and tells the others what it finds there.
"""

import functools
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedhelp_jax.core import distributed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.storage import replaced, storage_errors
from fedhelp_jax.typing import JsonObject, PyTree

_log = logging.getLogger(__name__)

_KEEP = 2  # the newest, and the previous one in case the newest cannot be read
_SUMS = "SHA256SUMS"


class Checkpointer:
    """Saves a run's state by round in a folder and restores the newest readable checkpoint.

    Args:
        folder: folder of the checkpoints, usually ``workdir/checkpoints``; created if missing.
        read_only: if True, nothing in the folder is changed, and nothing can be saved.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        _drop_traces_of_threads()
        self._folder, self._read_only = folder.absolute(), read_only
        self._manager = self._open()
        self._unreadable: list[int] = []

    def save(self, round: int, state: PyTree, meta: JsonObject) -> None:
        """Saves `state` and returns once it is on disk; only the last two checkpoints are kept.

        Args:
            round: number of completed rounds; larger than in any checkpoint that `restore_latest`
                could read.
            state: any pytree of arrays.
            meta: JSON-serialisable; returned unchanged by `restore_latest`.

        Raises:
            StorageError: If the disk is full; nothing is left of this checkpoint then.
        """
        self._set_unreadable_aside()
        leaves = _leaves(state)
        # Orbax refuses arrays without elements, which hold nothing to save.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        envelope = {"meta": meta, "leaves": _describe(leaves)}
        place = self._folder / str(round)
        with storage_errors(place):
            try:
                self._manager.save(
                    round,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(arrays), envelope=ocp.args.JsonSave(envelope)
                    ),
                    force=True,
                )
                if distributed.is_coordinator():
                    _write_sums(place)
            except Exception:
                # Free the space of the incomplete checkpoint, as the disk may be full.
                for part in (place, *self._folder.glob(f"{round}.*")):
                    shutil.rmtree(part, ignore_errors=True)
                raise
        distributed.all_gather_text("saved")
        _log.info("round %d saved in %s", round, place)

    def restore_latest(
        self, template: PyTree, check: Callable[[JsonObject], None] = lambda meta: None
    ) -> tuple[int, PyTree, JsonObject] | None:
        """Returns (round, state, meta) of the newest readable checkpoint; None if none exists.

        An unreadable checkpoint is skipped with a warning, in favour of the previous one.

        Args:
            template: a pytree like the saved state. Its leaves need only `shape` and `dtype`, so
                `jax.eval_shape` can make it; with several processes they need `sharding` too.
            check: called with the metadata; refuses the checkpoint by raising a UserError, before
                the state is compared with the template.

        Returns:
            The state has the template's structure, with NumPy arrays as leaves; with several
            processes, the leaves are arrays on their devices.

        Raises:
            UserError: There are checkpoints, but none can be read or fits the template.
        """
        found = sorted(self._manager.all_steps(), reverse=True)
        # Another process may see an older state of the shared folder.
        rounds = json.loads(distributed.all_gather_text(json.dumps(found))[0])
        reasons: list[str] = []
        for round in rounds:
            restored, reason = None, self._check(round)
            if not reason:
                try:
                    restored = self._restore(round, template, check)
                except UserError:
                    raise
                except Exception as error:  # on damage, Orbax and TensorStore may raise anything
                    reason = _first_line(error)
                reason = next(filter(None, distributed.all_gather_text(reason)), "")
            if restored is None or reason:
                reasons.append(f"{self._folder / str(round)} ({reason})")
                continue
            state, meta = restored
            if reasons:
                self._unreadable = rounds[: len(reasons)]
                _log.warning(
                    "checkpoint %s cannot be read; going on from the one before, %s",
                    " and ".join(reasons),
                    self._folder / str(round),
                )
            return round, state, meta
        if reasons:
            raise distributed.Agreed(
                f"no checkpoint can be read: {' and '.join(reasons)}; "
                "--overwrite begins the run anew"
            )
        return None

    def close(self) -> None:
        """Closes the checkpoint manager."""
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        if self._read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True,
                create=False,
                save_interval_steps=0,
                enable_async_checkpointing=False,
            )
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_KEEP,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # left by killed runs
            )
        return ocp.CheckpointManager(self._folder, options=options)

    def _check(self, round: int) -> str:
        """Returns what is wrong with a checkpoint's files, or an empty string."""
        reason = ""
        if distributed.is_coordinator():
            try:
                _check_sums(self._folder / str(round))
            except (OSError, ValueError) as error:
                reason = _first_line(error)
        return distributed.all_gather_text(reason)[0]

    def _restore(
        self, round: int, template: PyTree, check: Callable[[JsonObject], None]
    ) -> tuple[PyTree, JsonObject]:
        restored = self._manager.restore(
            round, args=ocp.args.Composite(envelope=ocp.args.JsonRestore())
        )
        envelope = restored["envelope"]
        check(envelope["meta"])
        shapes = _leaves(template, shapes_only=True)
        wanted = _describe(shapes)
        _check_fit(envelope["leaves"], wanted)
        leaves = {name: np.zeros(shape, dtype) for name, (dtype, shape) in wanted.items()}
        if jax.process_count() > 1:  # each process reads what its devices hold
            leaves |= {name: leaf for name, leaf in shapes.items() if leaf.size}
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        restored = self._manager.restore(
            round, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
        )
        leaves |= restored["state"]
        return jax.tree.unflatten(jax.tree.structure(template), leaves.values()), envelope["meta"]

    def _set_unreadable_aside(self) -> None:
        """Renames checkpoints that were skipped, so that their rounds can be saved again."""
        if not self._unreadable:
            return
        self._manager.close()
        for round in self._unreadable if distributed.is_coordinator() else ():
            aside = self._folder / f"unreadable_{round}"
            number = 1
            while aside.exists():
                number += 1
                aside = self._folder / f"unreadable_{round}_{number}"
            (self._folder / str(round)).rename(aside)
        self._unreadable = []
        distributed.all_gather_text("set aside")
        self._manager = self._open()


@functools.cache
def _drop_traces_of_threads() -> None:
    """Suppresses messages from background threads, so that a failed save is reported only once.

    The error that Orbax raises is enough. Its threads log the same error, and threads of
    TensorStore print that their event loop is closed. Orbax also warns that it only reads.
    """
    noise = "_SignalingThread", "Given directory is read only"
    logging.getLogger("absl").addFilter(
        lambda record: not any(words in str(record.msg) for words in noise)
    )
    show = sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def _leaves(state: PyTree, *, shapes_only: bool = False) -> dict[str, PyTree]:
    """Returns the leaves by path, in the order of the tree."""
    paths, _ = jax.tree.flatten_with_path(state)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        if shapes_only or not getattr(leaf, "is_fully_addressable", True)
        else np.asarray(leaf)
        for path, leaf in paths
    }
    assert len(named) == len(paths), "two leaves of the state have the same path"
    return named


def _describe(leaves: dict[str, PyTree]) -> JsonObject:
    return {name: [np.dtype(x.dtype).name, list(x.shape)] for name, x in leaves.items()}


def _check_fit(saved: JsonObject, wanted: JsonObject) -> None:
    for name in [*saved, *(name for name in wanted if name not in saved)]:
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{name} is {saved.get(name, 'not there')}, this run needs "
                f"{wanted.get(name, 'no such leaf')}"
            )


def _sums(checkpoint: Path) -> dict[str, str]:
    """Returns the digest of each file, by its path inside the checkpoint."""
    return {
        file.relative_to(checkpoint).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != _SUMS
    }


def _write_sums(checkpoint: Path) -> None:
    lines = [f"{sha}  {name}\n" for name, sha in _sums(checkpoint).items()]
    with replaced(checkpoint / _SUMS) as beside:
        beside.write_text("".join(lines))


def _check_sums(checkpoint: Path) -> None:
    """Raises ValueError if a file is not as it was saved, or if the digests are missing.

    They are missing if the process was killed before the save was complete.
    """
    try:
        lines = (checkpoint / _SUMS).read_text().splitlines()
    except FileNotFoundError:
        raise ValueError(f"it was not saved to the end: {_SUMS} is missing") from None
    saved = {name: sha for sha, _, name in (line.partition("  ") for line in lines)}
    found = _sums(checkpoint)
    for name in saved | found:
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != saved.get(name):
            raise ValueError(f"{name} is not as it was saved")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
