"""Compares FedHelp and every baseline on the data of any config, tuned alike, over five seeds.

    fedhelp teach --study=configs/studies/baselines.py:fed_isic2019.py:two_layers
    fedhelp compare --study=configs/studies/baselines.py:fed_isic2019.py:two_layers \
        --workdir=runs/skin

The argument after the first colon is a config file in `configs`; the default is the quickstart with
its synthetic images, whose simulated model needs no `fedhelp teach`. The methods that learn from a
foundation model's answers about private images take part if it runs at the hospitals. With masks,
FedProto and FedGH are refused, because U-Nets of two sizes have heads of two widths, and so are the
pixel probe and `local_priors`, which are for classification; the table then shows the others.

Six trials per method, on validation images, choose its learning rate and, if it has one, the
weight of what it adds to FedAvg or local training. A method without such a weight gets six rates
instead of three; FedNCM has nothing to tune. Then every method runs five times. FedAvg and FedHelp
are also tuned and run with `local_priors`, and FedHelp with both `local_priors` and nothing public.
That makes 242 to 280 runs per data set: with deep networks, they take hours on an accelerator and
days on two cores. `fed_isic2019.py:two_layers` and `pneumonia.py:sixteen` take two to three hours
on two cores; the study `miniature.py` takes minutes. The results are in docs/results.md.
"""

from pathlib import Path

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.experiments.config_files import load_config
from fedhelp_jax.experiments.study import Study
from fedhelp_jax.teachers.resolve import teacher

_CONFIGS = Path(__file__).parents[1]
_RATES = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
_SGD_RATES = {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
_THREE_RATES = {"learning_rate": (1e-3, 3e-3, 1e-2)}
_FEDHELP = {**_THREE_RATES, "algorithm.lambda_f": (0.5, 1.0)}
_L2 = {"algorithm.l2": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)}
_GRIDS = {
    "scaffold": _SGD_RATES,
    "per_fedavg": _SGD_RATES,
    "pixel_probe": _L2,
    "foundation_probe": _L2,
    "fedncm": {},
    "fedpft": _L2,
    "pfedme": {"learning_rate": (1e-2, 1e-1, 1.0), "algorithm.lam": (1.0, 15.0)},
    "fedhelp": _FEDHELP,
    "fedhelp_priors": _FEDHELP,
    "fedhelp_priors_nothing_public": _FEDHELP,
    "fedprox": {**_THREE_RATES, "algorithm.mu": (0.01, 0.1)},
    "ditto": {**_THREE_RATES, "algorithm.lam": (0.1, 1.0)},
    "fedproto": {**_THREE_RATES, "algorithm.lam": (0.1, 1.0)},
    "fml": {**_THREE_RATES, "algorithm.alpha": (0.5, 0.9)},
}
_PRIORS = {"algorithm.local_priors": True}
_FEDHELP_PRIORS = {"algorithm.name": "fedhelp", **_PRIORS}
_VARIANTS = {
    "fedavg_priors": {"algorithm.name": "fedavg", **_PRIORS},
    "fedhelp_priors": _FEDHELP_PRIORS,
    "fedhelp_priors_nothing_public": {**_FEDHELP_PRIORS, "public.name": "none"},
}


def get_study(config: str = "quickstart.py") -> Study:
    """Returns the study; `config` is a file in `configs`, with its argument after a colon."""
    own_images = teacher(load_config(f"{_CONFIGS / config}").teacher.name).at_the_client
    methods = {
        name: {} for name, method in ALGORITHMS.items() if own_images or not method.reads_answers
    } | _VARIANTS
    return Study(
        datasets={Path(config.split(":")[0]).stem: f"../{config}"},
        methods=methods,
        seeds=range(5),
        grids={name: _GRIDS.get(name, _RATES) for name in methods},
        trials=6,
    )
