"""``fedhelp teach``."""

from fedhelp_jax.cli.command import CONFIG, OUTPUT, STUDY, Command, Flag, Given
from fedhelp_jax.cli.process import settings_of
from fedhelp_jax.core.errors import UserError


def _teach(given: Given) -> int:
    dry_run = bool(given["dry_run"])
    if given["study"]:
        if given["config"]:
            raise UserError("--study names its configs itself; leave --config out")
        from fedhelp_jax.experiments.config_files import load_study, refuse_rest

        refuse_rest(given.rest)
        study = load_study(given["study"])
        from fedhelp_jax.experiments import study as studies

        studies.teach(study, dry_run=dry_run)
        return 0
    if not given["config"]:
        raise UserError("--config is missing; e.g. --config=configs/fed_isic2019.py")
    config = settings_of(given)
    from fedhelp_jax.experiments.teach import teach

    teach(config, dry_run=dry_run)
    return 0


TEACH = Command(
    "teach",
    "ask the foundation model about the public images, once; train reads the answers",
    (
        "fedhelp teach --config=configs/quickstart.py",
        "fedhelp teach --config=configs/fed_isic2019.py --dry_run",
        "fedhelp teach --study=configs/studies/baselines.py",
    ),
    _teach,
    (
        CONFIG._replace(needed=""),
        STUDY._replace(about="all that the runs of a study learn from, for all seeds", needed=""),
        Flag("dry_run", "only print what would be asked: images, requests, bytes, cost", "switch"),
        *OUTPUT,
    ),
    settings=True,
)
