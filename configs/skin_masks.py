"""Segments skin lesions of real centres, a task on which hospitals truly differ.

Paper: arXiv:2412.19654, sec. 4, has skin masks as public data only. Here they are private, at those
centres of Fed-ISIC2019 whose images are HAM10000's (Tschandl et al., 2018 and 2020). The public
data are chest X-rays with lung masks, and a network trained on them replaces the foundation model.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --config=configs/skin_masks.py:cpu                               # once
    fedhelp train --config=configs/skin_masks.py:cpu --workdir=runs/skin           # two CPU cores
    fedhelp train --config=configs/skin_masks.py --workdir=runs/skin_paper         # a GPU

`:cpu` trains at 64x64 with U-Nets of 8..64 and 16..128 channels, on at most 150 images per client;
Dice is still computed at 200x150.

Files, in FEDHELP_DATA_DIR or given by --config.data.path and so on: `ham10000_200x150.zip` (images/
and masks/), `fed_isic2019_ham_split.csv` (official split), `lung_cxr_seg_128.npz` (public).
"""

import os

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config(scale: str = "paper") -> config_dict.ConfigDict:
    """Returns the settings; `scale` is "paper" or "cpu"."""
    if scale not in ("paper", "cpu"):
        raise ValueError(f"{scale!r} must be paper or cpu")
    config = default_config()
    config.task = "segmentation"
    config.data.name = "folder"
    config.data.columns.update(
        image="image_id", label="target", site="center", group="lesion_id", split="fold"
    )
    config.data.label_names = ("lesion",)
    config.data.image_size = 128
    config.public.name = "npz"
    config.teacher.name = "self_trained"
    config.model.small = "unet_small"
    config.model.large = "unet_large"
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if folder:
        config.data.path = os.path.join(folder, "ham10000_200x150.zip")
        config.data.table = os.path.join(folder, "fed_isic2019_ham_split.csv")
        config.public.path = os.path.join(folder, "lung_cxr_seg_128.npz")

    if scale == "cpu":
        config.rounds = 20
        config.learning_rate_schedule = "cosine"
        config.data.image_size = 64
        config.data.max_train = 150
        config.public.num_examples = 400
        config.roles.large = ("center_1", "center_2")  # named, as the cap makes others as large
        config.model.small = "unet_small_cpu"
        config.model.large = "unet_large_cpu"
    return config
