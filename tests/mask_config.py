"""Settings of a segmentation run that takes seconds, on `:2d` phantoms or `:3d` phantom volumes."""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config(rank: str) -> config_dict.ConfigDict:
    """Returns the settings."""
    config = default_config()
    config.task = "segmentation"
    config.rounds = 2
    config.batch_size = 4
    config.public_batch_size = 4
    config.data.num_examples = 24
    config.data.fractions = (0.50, 0.30, 0.20)
    config.public.num_examples = 6
    config.roles.top_n = 1
    config.model.small = "unet_small_cpu"
    config.model.large = "unet_large_cpu"
    config.model.small_widths = (2,)  # one level compiles in a third of the time of two
    config.model.large_widths = (3,)
    if rank == "2d":
        config.data.image_size = 18  # divisible by two but not by four
    else:
        config.data.name = "phantom_volumes"
        config.public.name = "phantom_volumes"
        config.data.volume_size = (8, 9, 8)
        config.teacher.name = "self_trained"
        config.teacher.epochs = 1
    return config
