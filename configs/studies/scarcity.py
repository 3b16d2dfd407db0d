"""Asks how the gain of joining depends on a hospital's size, among sixteen that are alike.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/scarcity.py
    fedhelp compare --study=configs/studies/scarcity.py --workdir=runs/scarcity
    fedhelp verdict runs/scarcity

The argument names the images and, after another colon, the networks. `scarcity.py:chest:cnn` is the
default: hospitals with 52 to 1,570 X-rays (`pneumonia.py:sixteen`). `scarcity.py:skin` is for skin
lesions of all sources, shared out at random (`fed_isic2019.py:sixteen`). The networks are `cnn`,
for two CPU cores, or `resnet`, for a GPU. The public images are PathMNIST's and the foundation
model is a MobileNetV2 trained on ImageNet. The results are in docs/results.md.
"""

from fedhelp_jax.experiments.study import Study

_CONFIGS = {"chest": "../pneumonia.py:sixteen", "skin": "../fed_isic2019.py:sixteen"}
_NETWORKS = {"cnn": ("cnn_small", "cnn_large"), "resnet": ("resnet20", "resnet110")}


def get_study(wanted: str = "chest") -> Study:
    """Returns the study; `wanted` is "chest" or "skin", and ":cnn" or ":resnet" may follow."""
    data, _, networks = wanted.partition(":")
    networks = networks or "cnn"
    for name, known in ((data, _CONFIGS), (networks, _NETWORKS)):
        if name not in known:
            raise ValueError(f"{name!r} must be {' or '.join(known)}")
    small, large = _NETWORKS[networks]
    methods = ("local", "pixel_probe", "foundation_probe", "federated_probe", "fedncm", "fedpft")
    methods += ("fedavg", "lp_ft", "ditto", "fml", "fedmd", "fedhelp", "centralized")
    return Study(
        datasets={data: _CONFIGS[data]},
        methods={name: {} for name in methods}
        | {
            "fedhelp_no_labels": {"algorithm.name": "fedhelp", "algorithm.public_labels": False},
            "fedhelp_nothing_public": {"algorithm.name": "fedhelp", "public.name": "none"},
        },
        seeds=range(10),
        budgets={"": {"model.small": small, "model.large": large}},
    )
