"""Checks that all processes of a run have the same settings, data and folder."""

import json
import uuid
from pathlib import Path

import jax

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core import distributed
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments import identity
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import Experiment


def check_together(config: RunConfig, workdir: Path) -> None:
    """Checks that all processes have the same settings and share one folder.

    Raises:
      UserError: If they do not.
    """
    if jax.process_count() == 1:
        return
    if ALGORITHMS[config.algorithm.name].pools_data:
        raise distributed.Agreed(
            f"algorithm.name: {config.algorithm.name} needs all clients' data in one place, so "
            "cannot be --distributed"
        )

    # The location of data may differ between hosts.
    ours = {**identity.identity(config), "mapping": configs.to_dict(config)["mapping"]}

    def differences(theirs: str) -> str:
        return "; ".join(identity.changes(json.loads(theirs), ours))

    distributed.check_same("settings", json.dumps(ours, sort_keys=True), differences)
    probe = workdir / f".shared.{distributed.all_gather_text(uuid.uuid4().hex)[0]}"
    if distributed.is_coordinator():
        probe.touch()
    distributed.all_gather_text("written")

    def look() -> None:
        if not probe.exists():
            raise UserError(
                f"--workdir={workdir}: is not the folder that process 0 sees under that name; all "
                "processes must share it"
            )

    try:
        distributed.run_on_all(look)
    finally:
        if distributed.is_coordinator():
            probe.unlink()


def check_same_sources(experiment: Experiment) -> None:
    """Checks that all processes have read the same data.

    Raises:
      UserError: If they have not.
    """
    ours = identity.provenance(experiment)["sources"]
    shas = {name: source["sha256"] for name, source in ours.items()}

    def differences(theirs: str) -> str:
        return "; ".join(identity.changes(json.loads(theirs), shas))

    distributed.check_same("what is read", json.dumps(shas), differences)
