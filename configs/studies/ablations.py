"""Compares FedHelp without one part at a time, or with another, on the data of any config.

    fedhelp compare --study=configs/studies/ablations.py --workdir=runs/ablations
    fedhelp compare --study=configs/studies/ablations.py:pneumonia.py:sixteen --workdir=runs/parts

The argument after the first colon is a config file in `configs`; the default is the quickstart with
its synthetic images. Each row has five seeds. Nothing is tuned: all rows have FedHelp's settings.
See docs/method.md, sec. 12, and docs/results.md.
"""

from pathlib import Path

from fedhelp_jax.experiments.study import Study

_FEDHELP = {"algorithm.name": "fedhelp"}


def get_study(config: str = "quickstart.py") -> Study:
    """Returns the study; `config` is a file in `configs`, with its argument after a colon."""
    return Study(
        datasets={Path(config.split(":")[0]).stem: f"../{config}"},
        methods={
            "local": {},
            "fedavg": {},
            "fedavg weighted by examples": {
                "algorithm.name": "fedavg",
                "client_weights": "examples",
            },
            "fedhelp": {},
            "nothing public": {**_FEDHELP, "public.name": "none"},
            "public labels only": {**_FEDHELP, "teacher.name": "none"},
            "foundation logits only": {**_FEDHELP, "algorithm.public_labels": False},
            "no forward": {**_FEDHELP, "algorithm.lambda_f": 0.0},
            "no backward": {**_FEDHELP, "algorithm.lambda_b": 0.0},
            "backward as KL": {**_FEDHELP, "algorithm.backward": "kl"},
            "no warm-up": {**_FEDHELP, "algorithm.kd_warmup_rounds": 0},
            "temperature 4": {**_FEDHELP, "algorithm.temperature": 4.0},
            "one step of both": {**_FEDHELP, "algorithm.joint": True},
            "weighted by examples": {**_FEDHELP, "client_weights": "examples"},
            "no large hospitals": {**_FEDHELP, "roles.top_n": 0, "roles.large": ()},
            "shared public statistics": {**_FEDHELP, "algorithm.public_batch_stats": "shared"},
            "released code": {**_FEDHELP, "algorithm.released_code": ("all",)},
        },
        seeds=range(5),
    )
