"""Asks how the gain of joining depends on a hospital's size: chest X-rays, two-layer networks.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/scarcity.py
    fedhelp compare --study=configs/studies/scarcity.py --workdir=runs/scarcity
    fedhelp verdict runs/scarcity

PneumoniaMNIST is shared out at random among 16 hospitals: two large ones with 1,570 images each,
and small ones with 523 (two), 157 (four) and 52 (eight), of which a fifth is kept for validation.
All are tested on the same 624 test images, since the 6 to 62 of their own would tell nothing. The
public images are PathMNIST's and the foundation model is a MobileNetV2 trained on ImageNet, as in
`pneumonia.py`. The learning rate is 3e-3 for all, and nothing is tuned.

The argument names the networks: `scarcity.py:cnn`, the default, is for two CPU cores and
`scarcity.py:resnet` for a GPU. The results are in docs/results.md.
"""

from fedhelp_jax.experiments.study import Study

_FEDERATION = {
    "data.split_by": "fractions",
    "data.fractions": 2 * (0.3,) + 2 * (0.1,) + 4 * (0.03,) + 8 * (0.01,),
    "data.validation_fraction": 0.2,
    "data.test_on": "all",
    "data.max_train": None,
    "roles.large": ("client_0", "client_1"),
    "rounds": 25,
    "evaluate_every": 5,
    "interpolate": (0.25, 0.5, 0.75),
    "batch_size": 16,
    "public_batch_size": 16,
    "learning_rate": 3e-3,
}
_NETWORKS = {
    "cnn": {"model.small": "cnn_small", "model.large": "cnn_large"},
    "resnet": {"model.small": "resnet20", "model.large": "resnet110"},
}


def get_study(networks: str = "cnn") -> Study:
    """Returns the study; `networks` is "cnn" or "resnet"."""
    if networks not in _NETWORKS:
        raise ValueError(f"{networks!r} must be {' or '.join(_NETWORKS)}")
    methods = ("local", "pixel_probe", "foundation_probe", "federated_probe", "fedncm", "fedavg")
    methods += ("ditto", "fml", "fedmd", "fedhelp", "centralized")
    return Study(
        datasets={"chest": "../pneumonia.py"},
        methods={name: {} for name in methods}
        | {
            "fedhelp_no_labels": {"algorithm.name": "fedhelp", "algorithm.public_labels": False},
            "fedhelp_nothing_public": {"algorithm.name": "fedhelp", "public.name": "none"},
        },
        seeds=range(10),
        budgets={"": _FEDERATION | _NETWORKS[networks]},
    )
