"""Asks whether FedHelp helps larger networks, or networks that see augmented images, any more.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/capacity.py
    fedhelp compare --study=configs/studies/capacity.py --workdir=runs/capacity
    fedhelp verdict runs/capacity

Everything is as in `pneumonia.py:sixteen`, except that the small network is as large as the large
one (`larger`), or that all private training images are shifted, rotated, scaled and made brighter
or darker at random (`augmented`), or that both networks are residual ones (`resnet`, ResNet-20 and
ResNet-32). Nothing is tuned. The results are in docs/results.md.

The argument after the colon names those wanted, with commas: the default, `larger,augmented`, has
five seeds and takes 15 minutes on two cores; with `resnet` there are three, since each of its runs
takes minutes.
"""

from pathlib import Path
from typing import Any

from fedhelp_jax.experiments.config_files import load_config
from fedhelp_jax.experiments.study import Study

_PNEUMONIA = Path(__file__).parents[1] / "pneumonia.py"
_CHANGES = {
    "larger": {"model.small": "cnn_large"},
    "augmented": {"data.augment": ("affine", "brightness")},
    "resnet": {"model.small": "resnet20", "model.large": "resnet32"},
}


def _changed(name: str) -> Any:
    if name not in _CHANGES:
        raise ValueError(f"{name!r} must be {', '.join(_CHANGES)}")
    config = load_config(f"{_PNEUMONIA}:sixteen")
    config.update_from_flattened_dict(_CHANGES[name])
    return config


def get_study(names: str = "larger,augmented") -> Study:
    """Returns the study; `names` are some of "larger", "augmented" and "resnet", with commas."""
    wanted = names.split(",")
    return Study(
        datasets={name: _changed(name) for name in wanted},
        methods={
            "local": {},
            "fedavg": {},
            "fedhelp": {},
            "fedhelp_nothing_public": {"algorithm.name": "fedhelp", "public.name": "none"},
            "centralized": {},
        },
        seeds=range(3 if "resnet" in wanted else 5),
    )
