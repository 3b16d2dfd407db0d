"""Segments lungs in chest X-rays: the paper's 2D segmentation task, on its three clients.

Paper: arXiv:2412.19654, sec. 4 (Shenzhen and Montgomery X-rays, three clients with .45/.45/.10 of
them, two large; public skin-lesion masks). A network trained on the public masks themselves, called
self-trained, replaces the paper's foundation model.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --config=configs/lung_masks.py:cpu                                # once
    fedhelp train --config=configs/lung_masks.py:cpu --workdir=runs/lungs           # two CPU cores
    fedhelp train --config=configs/lung_masks.py --workdir=runs/lungs_paper         # a GPU

`:cpu` trains at 64x64 with U-Nets of 8..64 and 16..128 channels; Dice is still computed at 128x128.
For one client per real site: --config.data.split_by=site --config.roles.top_n=1.

Files, in FEDHELP_DATA_DIR or given by --config.data.path and --config.public.path:
`lung_cxr_seg_128.npz` (images, masks, site) and `ham10000_200x150.zip` (images/ and masks/).
"""

import os

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config(scale: str = "paper") -> config_dict.ConfigDict:
    """Returns the settings; `scale` is "paper" or "cpu". The defaults are the paper's."""
    if scale not in ("paper", "cpu"):
        raise ValueError(f"{scale!r} must be paper or cpu")
    config = default_config()
    config.task = "segmentation"
    config.data.name = "npz_masks"
    config.data.image_size = 128
    config.data.split_by = "fractions"
    config.data.fractions = (0.45, 0.45, 0.10)
    config.public.name = "folder"
    config.public.columns.image = "image_id"  # of the table in the zip file
    config.public.num_examples = 1000
    config.teacher.name = "self_trained"
    config.model.small = "unet_small"
    config.model.large = "unet_large"
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if folder:
        config.data.path = os.path.join(folder, "lung_cxr_seg_128.npz")
        config.public.path = os.path.join(folder, "ham10000_200x150.zip")

    if scale == "cpu":
        config.rounds = 20
        config.learning_rate_schedule = "cosine"
        config.data.image_size = 64
        config.public.num_examples = 400
        config.model.small = "unet_small_cpu"
        config.model.large = "unet_large_cpu"
    return config
