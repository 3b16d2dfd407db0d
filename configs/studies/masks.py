"""Compares FedHelp with FedAvg, FML, pooled data and staying alone on masks, over three seeds.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/masks.py
    fedhelp compare --study=configs/studies/masks.py --workdir=runs/lung_masks
    fedhelp verdict runs/lung_masks

The argument after the first colon is a config file in `configs`, with its argument after another
colon: `lung_masks.py:cpu` (the default), `skin_masks.py:cpu` or `brain3d.py:cpu`. Nothing is tuned,
because the seed draws the test images as well. The results on lungs are in docs/results.md.
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
