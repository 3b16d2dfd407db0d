"""Asks how the gain of joining depends on a hospital's size: chest X-rays, sixteen hospitals.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/scarcity.py
    fedhelp compare --study=configs/studies/scarcity.py --workdir=runs/scarcity
    fedhelp verdict runs/scarcity

The hospitals have 52 to 1,570 X-rays (`pneumonia.py:sixteen`). The public images are PathMNIST's
and the foundation model is a MobileNetV2 trained on ImageNet.

The argument names the networks: `scarcity.py:cnn`, the default, is for two CPU cores and
`scarcity.py:resnet` for a GPU. The results are in docs/results.md.
"""

from fedhelp_jax.experiments.study import Study

_NETWORKS = {"cnn": ("cnn_small", "cnn_large"), "resnet": ("resnet20", "resnet110")}


def get_study(networks: str = "cnn") -> Study:
    """Returns the study; `networks` is "cnn" or "resnet"."""
    if networks not in _NETWORKS:
        raise ValueError(f"{networks!r} must be {' or '.join(_NETWORKS)}")
    small, large = _NETWORKS[networks]
    methods = ("local", "pixel_probe", "foundation_probe", "federated_probe", "fedncm", "fedpft")
    methods += ("fedavg", "lp_ft", "ditto", "fml", "fedmd", "fedhelp", "centralized")
    return Study(
        datasets={"chest": "../pneumonia.py:sixteen"},
        methods={name: {} for name in methods}
        | {
            "fedhelp_no_labels": {"algorithm.name": "fedhelp", "algorithm.public_labels": False},
            "fedhelp_nothing_public": {"algorithm.name": "fedhelp", "public.name": "none"},
        },
        seeds=range(10),
        budgets={"": {"model.small": small, "model.large": large}},
    )
