"""Settings of a teacher on a real inference server, asked about all images in a file."""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Returns the settings; the test sets the images, the labels and the server."""
    config = default_config()
    config.data.image_size = 16
    config.data.num_examples = 48
    config.data.fractions = (0.6, 0.4)
    config.roles.top_n = 1
    config.public.name = "npz"
    config.teacher.name = "open_inference"
    config.teacher.scale = "uint8"
    config.teacher.batch_size = 16
    config.teacher.concurrency = 4
    return config
