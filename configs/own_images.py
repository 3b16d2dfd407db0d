"""Runs FedHelp on a folder of your own images (docs/own-images.md), small enough for two CPU cores.

    fedhelp train --config=configs/own_images.py --workdir=runs/mine --config.data.path=FOLDER

The public images are synthetic and the foundation model is simulated, so that this runs without
other files. Set real ones in `public` and `teacher` before you draw conclusions.
"""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Returns the settings."""
    config = default_config()
    config.data.name = "folder"
    config.data.image_size = 32
    config.model.small = "cnn_small"
    config.model.large = "cnn_large"
    config.rounds = 10
    config.batch_size = 16
    config.public_batch_size = 16
    config.learning_rate = 3e-3
    return config
