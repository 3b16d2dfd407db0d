"""The identity of a run: its settings, the data it read, and the program that computed it.

The schema states for each setting whether it counts (`fedhelp_jax.settings.schema.setting`). The
location of data does not count, but its content does: ``provenance.json`` in a run folder and each
checkpoint hold its hash. They also hold what else determines the last bits of a result: the back
end, the devices and how clients are vectorised on them.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core import distributed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import FederatedDataset, PublicDataset
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import Experiment
from fedhelp_jax.report import run_files
from fedhelp_jax.settings.schema import MappingConfig
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.teachers.resolve import is_asked, members
from fedhelp_jax.typing import JsonObject, Record

_log = logging.getLogger(__name__)

PROVENANCE = "provenance.json"

# --- settings -----------------------------------------------------------------------------------


def identity(config: RunConfig) -> JsonObject:
    """Returns the settings that identify a run, as dicts, lists, numbers and strings."""
    return {**_identity(config), "algorithm": configs.to_dict(config)["algorithm"]}


def identity_sha256(config: RunConfig) -> str:
    """Returns the hash of the settings that must not change when a run resumes from a checkpoint.

    They include the number of rounds only if a schedule depends on it.
    """
    values = identity(config)
    if not schedule_over_rounds(config):
        del values["rounds"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(ours: RunConfig, theirs: RunConfig) -> tuple[str, ...]:
    """Returns one ``key: value -> value`` for each setting that makes two runs different.

    Example:
        >>> differences(RunConfig(), RunConfig(rounds=12))
        ('rounds: 50 -> 12',)
    """
    return changes(identity(ours), identity(theirs))


def changes(before: Record, after: Record) -> tuple[str, ...]:
    """Returns the same as `differences`, given two dicts that `identity` returned."""
    old, new = dict(configs.flat(before)), dict(configs.flat(after))
    keys = [*old, *(key for key in new if key not in old)]
    if old.get("algorithm.name") != new.get("algorithm.name"):  # another method has other settings
        keys = [key for key in keys if not key.startswith("algorithm.settings.")]
    return tuple(
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    )


def schedule_over_rounds(config: RunConfig) -> str:
    """Returns the setting that depends on the number of rounds, or an empty string.

    If there is one, the number of rounds must not change.
    """
    if config.learning_rate_schedule != "constant":
        return f"learning_rate_schedule = {config.learning_rate_schedule!r}"
    if ALGORITHMS[config.algorithm.name].schedules(config.algorithm.settings):
        return f"the schedule of {config.algorithm.name}"
    return ""


def refuse_other_settings(before: RunConfig, config: RunConfig, where: str) -> None:
    """Refuses settings with which the run in a folder cannot be resumed.

    Args:
      before: The settings in the folder.
      config: The requested settings. The number of rounds may differ if no schedule depends on it.
      where: The flag and the folder, for the message.

    Raises:
      UserError: If the requested settings make a different run.
    """
    schedule = schedule_over_rounds(config)
    if not schedule:
        before = dataclasses.replace(before, rounds=config.rounds)
    changed = differences(before, config)
    if changed:
        why = ""
        if schedule and before.rounds != config.rounds:
            why = f"; {schedule} depends on the number of rounds"
        raise UserError(
            f"{where}: holds a run of another configuration ({'; '.join(changed)}{why}); name "
            "another folder, or --overwrite"
        )


def _identity(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _identity(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata.get("identity", True)
        }
    if isinstance(value, tuple):
        return [_identity(item) for item in value]
    return value


# --- what was read ------------------------------------------------------------------------------


def sources(
    config: RunConfig,
    dataset: FederatedDataset,
    public: PublicDataset | None,
    answers: Answers | None,
) -> dict[str, JsonObject]:
    """Returns the path, file size in bytes, number of examples and content hash of each source."""
    asked = [m.store if is_asked(m) else m.path for m in members(config.teacher)]
    found: dict[str, tuple[list[str | None], int, str]] = {
        "data": ([config.data.path], len(dataset.images), dataset.content_sha256)
    }
    if public is not None:
        found["public"] = [config.public.path], len(public.images), public.content_sha256
    if answers is not None:
        found["teacher"] = asked, len(answers.logits), answers.content_sha256
    return {
        name: {**_place(paths), "examples": count, "sha256": sha}
        for name, (paths, count, sha) in found.items()
    }


def refuse_other_sources(before: Record, now: Record, where: str) -> None:
    """Refuses to resume a run with examples or answers other than those it was started with.

    Args:
      before: What `sources` returned at the start of the run.
      now: What `sources` returns now.
      where: The flag and the folder of the run, for the message.

    Raises:
      UserError: If the content of a source has changed.
    """
    for name in now:
        old, new = before.get(name, {}).get("sha256", ""), now[name]["sha256"]
        if old != new:
            place = f" at {now[name]['path']}" if now[name]["path"] else ""
            raise UserError(
                f"{where}: {name}{place}: other content than this was started with (sha256 of what "
                f"was read: {old[:16]}, now {new[:16]}); put it back, or name another folder"
            )


def _place(paths: list[str | None]) -> JsonObject:
    known = [Path(path).expanduser().resolve() for path in paths if path]
    size = sum(path.stat().st_size for path in known if path.is_file())
    return {"path": ", ".join(map(str, known)) or None, "bytes": size or None}


# --- the program --------------------------------------------------------------------------------


def program(experiment: Experiment) -> JsonObject:
    """Returns what determines the last bits of a result, besides settings and data."""
    mapping, count = experiment.simulation.mapping, jax.process_count()
    max_device_bytes = experiment.config.mapping.max_device_bytes
    return {
        "platform": mapping.mesh.devices.flat[0].platform,
        "devices": mapping.num_devices,
        "chunk_size": mapping.chunk_size,
        **({"processes": count} if count > 1 else {}),
        **({"max_device_bytes": max_device_bytes} if max_device_bytes else {}),
    }


def provenance(experiment: Experiment) -> JsonObject:
    """Returns the content of ``provenance.json``: the program and the sources."""
    read = experiment.dataset, experiment.public, experiment.answers
    return {"program": program(experiment), "sources": sources(experiment.config, *read)}


def write_provenance(workdir: Path, value: Record) -> None:
    """Writes ``provenance.json``."""
    run_files.write_json(workdir / PROVENANCE, value)


def read_provenance(workdir: Path) -> JsonObject | None:
    """Returns the content of ``provenance.json``, or None if there is no such file.

    Raises:
      UserError: If the file cannot be read or is damaged.
    """
    path = workdir / PROVENANCE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = found["program"]["devices"], found["sources"]["data"]["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be used ({type(error).__name__}: {error}); was it edited by hand?"
        ) from None
    return found


def as_started(config: RunConfig, workdir: Path, cpu_devices: int | None = None) -> RunConfig:
    """Returns settings with the mapping of the run in a folder, and warns if it differs.

    With another mapping, the run would not end with the same bits.

    Args:
      config: The requested settings.
      workdir: The run folder. If it holds no checkpoint, the settings are returned unchanged.
      cpu_devices: The default number of CPU devices, if JAX has not started yet.

    Raises:
      UserError: If ``provenance.json`` cannot be read or is damaged.
    """
    recorded = read_provenance(workdir)
    checkpoints = workdir / "checkpoints"
    if recorded is None or not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        return config
    before, asked = recorded["program"], config.mapping
    on_cpu = before["platform"] == "cpu"
    devices = before["devices"] // before.get("processes", 1) if on_cpu else asked.cpu_devices
    max_device_bytes = before.get("max_device_bytes", 0)
    kept = MappingConfig(devices, before["chunk_size"], max_device_bytes)
    wanted = MappingConfig(
        (asked.cpu_devices or cpu_devices or devices) if on_cpu else devices,
        kept.chunk_size if asked.chunk_size is None else asked.chunk_size,
        asked.max_device_bytes,
    )
    for name, value in vars(wanted).items():
        if value != vars(kept)[name]:
            _log.warning(
                "going on with mapping.%s = %s, with which the run in %s was started, and not %s",
                name,
                vars(kept)[name],
                workdir,
                value,
            )
    return dataclasses.replace(config, mapping=kept)


# --- checkpoints --------------------------------------------------------------------------------


def of_checkpoint(experiment: Experiment) -> JsonObject:
    """Returns the metadata that each checkpoint holds, for `refuse_other_checkpoint`."""
    return {
        **provenance(experiment),
        "identity_sha256": identity_sha256(experiment.config),
    }


def refuse_other_checkpoint(meta: Record, ours: Record, where: str, *, same_program: bool) -> None:
    """Refuses a checkpoint of a different run.

    Args:
      meta: What `of_checkpoint` returned when the checkpoint was saved.
      ours: What `of_checkpoint` returns now.
      where: The flag and the folder of the run, for the message.
      same_program: Whether the results must have the same bits as if the run had never stopped.
        With several processes the program must always be the same, since their state fits no other.

    Raises:
      UserError: If the settings, the data or the program differ.
    """
    if "identity_sha256" not in meta:
        raise distributed.Agreed(
            f"{where}: its checkpoints are of an earlier version of fedhelp_jax, which did not "
            "record what a run reads; go on with that version, or name another folder"
        )
    if meta["identity_sha256"] != ours["identity_sha256"]:
        raise distributed.Agreed(
            f"{where}: config.json is not the one this run was started with; was it edited by "
            "hand? Put it back, or remove the folder"
        )
    refuse_other_sources(meta["sources"], ours["sources"], where)
    before, now = meta["program"], ours["program"]
    if before != now and (same_program or "processes" in before or "processes" in now):
        raise distributed.Agreed(
            f"{where}: the run was started with {before}, this is {now}: it would not end with the "
            "same bits; use the same back end and processes, or name another folder"
        )
