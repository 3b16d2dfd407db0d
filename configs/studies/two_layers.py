"""Compares all methods on two real data sets, with two-layer networks, in minutes on two cores.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/two_layers.py
    fedhelp compare --study=configs/studies/two_layers.py --workdir=runs/two_layers

The data are skin lesions of four centres and chest X-rays of six simulated ones, as in
`fed_isic2019.py:cpu` and `pneumonia.py:cpu`, but with networks of two layers, twenty rounds and a
learning rate of 3e-3. Methods that require plain SGD keep its default of 1e-2. Nothing is tuned;
the results are in docs/results.md.
"""

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.experiments.study import Study


def get_study() -> Study:
    """Returns the study."""
    return Study(
        datasets={"skin": "../fed_isic2019.py:cpu", "chest": "../pneumonia.py:cpu"},
        methods={
            name: {"learning_rate": None} if method.plain_sgd else {}
            for name, method in ALGORITHMS.items()
        },
        seeds=(0, 1, 2),
        budgets={
            "": {
                "rounds": 20,
                "learning_rate": 3e-3,
                "model.small": "cnn_small",
                "model.large": "cnn_large",
            }
        },
    )
