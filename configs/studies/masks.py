"""Compares FedHelp with staying alone, FedAvg and FML on masks, over three seeds.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/masks.py
    fedhelp compare --study=configs/studies/masks.py --workdir=runs/lungs
    fedhelp verdict runs/lungs

The argument after the first colon is a config file in `configs`, with its argument after another
colon: `lung_masks.py:cpu` (the default), `skin_masks.py:cpu` or `brain3d.py:cpu`. Nothing is tuned,
because the seed draws the test images as well. A run takes some minutes on one core. The results
are in docs/results.md.
"""

from pathlib import Path

from fedhelp_jax.experiments.study import Study


def get_study(config: str = "lung_masks.py:cpu") -> Study:
    """Returns the study; `config` is a file in `configs`, with its argument after a colon."""
    return Study(
        datasets={Path(config.split(":")[0]).stem: f"../{config}"},
        methods={
            "local": {},
            "centralized": {},
            "fedavg": {},
            "fml": {},
            "fedhelp": {},
            "fedhelp nothing public": {"algorithm.name": "fedhelp", "public.name": "none"},
        },
        seeds=range(3),
    )
