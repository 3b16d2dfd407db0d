"""Runs FedHelp on synthetic images in less than a minute: six clinics, two of them large.

Paper: arXiv:2412.19654, sec. 4 (six clients with .60/.20/.08/.06/.04/.02 of the data, the two
largest with the large model). Procedural "phantoms" and a simulated teacher replace its images and
its foundation model, so nothing is downloaded. Convolutional networks of two layers replace the
ResNets, which take minutes to compile on a slow machine.

    fedhelp train --config=configs/quickstart.py --workdir=runs/demo/fedhelp

`make demo` runs it and, for comparison, local training of the same clients; the README shows its
output.
"""

from ml_collections import config_dict

from fedhelp_jax.experiments.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Returns the settings of the demo."""
    config = default_config()
    config.rounds = 20
    config.batch_size = 8
    config.public_batch_size = 8

    config.data.name = "phantoms"
    config.data.num_examples = 600
    config.data.image_size = 24
    config.data.fractions = (0.60, 0.20, 0.08, 0.06, 0.04, 0.02)
    config.public.name = "phantoms"
    config.teacher.name = "simulated"

    config.roles.top_n = 2
    config.model.small = "cnn_small"
    config.model.large = "cnn_large"
    return config
