"""Segments the two parts of the hippocampus in 3D brain MRI, on three clients with own scanners.

Paper: arXiv:2412.19654, sec. 4 (Fed-IXI, 48x60x48, three centres, two large). Here the volumes
are hippocampus crops of the Medical Segmentation Decathlon, task 4 (Antonelli et al., 2022). They
come from a single site, so the three clients are a random split, and the differences between their
scanners (bias field, contrast, noise) are SIMULATED. The public data are synthetic volumes with
masks ("phantoms"), and a network trained on them replaces the foundation model.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --config=configs/brain3d.py:cpu                               # once
    fedhelp train --config=configs/brain3d.py:cpu --workdir=runs/brain          # two CPU cores
    fedhelp train --config=configs/brain3d.py --workdir=runs/brain_paper        # a GPU

`:cpu` trains at 24x32x24 with U-Nets of three levels; Dice is still computed at 48x64x48.
The public phantoms depend on the seed, so run `fedhelp teach` once for each seed.

File, in FEDHELP_DATA_DIR or given by --config.data.path: `hippocampus_3d_48x64x48.npz`.
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
    config.data.name = "npz_masks"
    config.data.volume_size = (48, 64, 48)
    config.data.fractions = (0.45, 0.45, 0.10)
    config.data.scanner_shift = True
    config.public.name = "phantom_volumes"
    config.teacher.name = "self_trained"
    config.batch_size = 2
    config.public_batch_size = 2
    config.model.small = "unet_small"
    config.model.large = "unet_large"
    config.model.remat = True
    folder = os.environ.get("FEDHELP_DATA_DIR")
    if folder:
        config.data.path = os.path.join(folder, "hippocampus_3d_48x64x48.npz")

    if scale == "cpu":
        config.rounds = 15
        config.learning_rate_schedule = "cosine"
        config.teacher.epochs = 40
        config.data.volume_size = (24, 32, 24)
        config.model.small = "unet_small_cpu"
        config.model.large = "unet_large_cpu"
        config.model.small_widths = (8, 16, 32)
        config.model.large_widths = (12, 24, 48)
        config.model.remat = False
    return config
