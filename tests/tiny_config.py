"""Settings of a run that takes seconds, with four clinics, one with a single training image."""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Returns the settings."""
    config = default_config()
    config.rounds = 6
    config.checkpoint_every = 2
    config.batch_size = 16  # two of the clinics have fewer training images
    config.public_batch_size = 8
    config.data.image_size = 8
    config.data.num_examples = 100
    config.data.fractions = (0.52, 0.30, 0.16, 0.02)
    config.public.num_examples = 12
    config.roles.top_n = 1
    config.model.large = "resnet32"
    return config
