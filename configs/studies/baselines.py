"""Compares FedHelp and every baseline on the data of any config, tuned alike, over three seeds.

    fedhelp compare --study=configs/studies/baselines.py --workdir=runs/baselines
    fedhelp compare --study=configs/studies/baselines.py:fed_isic2019.py:cpu --workdir=runs/isic

The argument after the first colon is a config file in `configs`; the default is the quickstart with
its synthetic images. With masks, FedProto and FedGH are refused, because U-Nets of two sizes have
heads of two widths; the table then shows the other methods.

Four trials per method, on validation images, choose its learning rate and, if it has one, the
weight of what it adds to FedAvg or local training. A method without such a weight gets the finer
grid of rates. Then every method runs three times. That makes 126 runs per data set, which take
hours on an accelerator and days on two cores. `miniature.py` takes minutes.
"""

from pathlib import Path

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.experiments.study import Study

_RATES = {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2)}
_SGD_RATES = {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1)}
_TWO_RATES = {"learning_rate": (1e-3, 3e-3)}

# The others ask a foundation model about private images, so it must run at the clients.
_METHODS = [name for name, method in ALGORITHMS.items() if not method.reads_answers]
_GRIDS = {
    **dict.fromkeys(_METHODS, _RATES),
    **dict.fromkeys(("scaffold", "per_fedavg"), _SGD_RATES),
    "pixel_probe": {"algorithm.l2": (1e-3, 1e-2, 1e-1, 1.0)},
    "pfedme": {"learning_rate": (1e-2, 1e-1), "algorithm.lam": (1.0, 15.0)},
    "fedhelp": {**_TWO_RATES, "algorithm.lambda_f": (0.5, 1.0)},
    "fedprox": {**_TWO_RATES, "algorithm.mu": (0.01, 0.1)},
    "ditto": {**_TWO_RATES, "algorithm.lam": (0.1, 1.0)},
    "fedproto": {**_TWO_RATES, "algorithm.lam": (0.1, 1.0)},
    "fml": {**_TWO_RATES, "algorithm.alpha": (0.5, 0.9)},
}


def get_study(config: str = "quickstart.py") -> Study:
    """Returns the study; `config` is a file in `configs`, with its argument after a colon."""
    return Study(
        datasets={Path(config.split(":")[0]).stem: f"../{config}"},
        methods=dict.fromkeys(_METHODS, {}),
        seeds=(0, 1, 2),
        grids=_GRIDS,
        trials=4,
    )
