"""Settings of a teacher that is asked about 40 tiny images, four at a time."""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Returns the settings; the test sets the public images, the labels and the model."""
    config = default_config()
    config.rounds = 1
    config.data.image_size = 16
    config.data.num_examples = 48
    config.data.fractions = (0.6, 0.4)
    config.data.validation_fraction = 0.2
    config.roles.top_n = 1
    config.model.large = "resnet32"
    config.public.name = "npz"
    config.teacher.name = "open_inference"
    config.teacher.model = "tiny"
    config.teacher.version = "1"
    config.teacher.input = "images"
    config.teacher.output = "logits"
    config.teacher.batch_size = 4
    config.teacher.concurrency = 1
    config.teacher.timeout = 10.0
    config.teacher.max_attempts = 4
    config.teacher.max_backoff = 0.05
    return config
