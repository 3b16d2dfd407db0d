"""Compares all methods in miniature: two-layer networks, synthetic images, two seeds, two rounds.

    fedhelp compare --study=configs/studies/miniature.py --workdir=runs/miniature

In minutes, it shows that the whole comparison works, but not which method is better. The images are
synthetic and the foundation model is simulated.
"""

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.experiments.config import default_config
from fedhelp_jax.experiments.study import Study


def get_study() -> Study:
    """Returns the study."""
    config = default_config()
    config.rounds = 2
    config.batch_size = 8
    config.public_batch_size = 8
    config.learning_rate = 1e-2
    config.data.num_examples = 800
    config.data.image_size = 16
    config.public.num_examples = 64
    config.roles.top_n = 2
    config.model.small = "cnn_small"
    config.model.large = "cnn_large"
    # The others ask the foundation model about private images; a simulated one cannot be asked.
    names = [name for name, method in ALGORITHMS.items() if not method.reads_answers]
    return Study(
        datasets={"phantoms": config},
        methods=dict.fromkeys(names, {}),
        seeds=(0, 1),
    )
