"""Asks what large hospitals pay or gain, by the number and the size of the small ones they help.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/cost_to_large.py
    fedhelp compare --study=configs/studies/cost_to_large.py --workdir=runs/cost_to_large
    fedhelp verdict runs/cost_to_large

PneumoniaMNIST is shared out at random. Two large hospitals always train on 1,000 images each; 4 or
16 small ones have 52 images each, or 4 or 10 of them 262, of which a fifth is kept for validation.
Everything else is as in `pneumonia.py:sixteen`. The results are in docs/results.md.
"""

from pathlib import Path
from typing import Any

from fedhelp_jax.experiments.config_files import load_config
from fedhelp_jax.experiments.study import Study

_PNEUMONIA = Path(__file__).parents[1] / "pneumonia.py"


def _hospitals(small: int, share: float) -> Any:
    config = load_config(f"{_PNEUMONIA}:sixteen")
    config.data.fractions = 2 * ((1 - small * share) / 2,) + small * (share,)
    config.data.max_train = 1000
    return config


def get_study() -> Study:
    """Returns the study."""
    by_examples = {"client_weights": "examples"}
    return Study(
        datasets={
            "4 of 52": _hospitals(4, 0.01),
            "16 of 52": _hospitals(16, 0.01),
            "4 of 262": _hospitals(4, 0.05),
            "10 of 262": _hospitals(10, 0.05),
        },
        methods={
            "local": {},
            "fedavg": {},
            "fedavg_by_examples": {"algorithm.name": "fedavg", **by_examples},
            "fml": {},
            "fedhelp": {},
            "fedhelp_by_examples": {"algorithm.name": "fedhelp", **by_examples},
        },
        seeds=range(5),
    )
