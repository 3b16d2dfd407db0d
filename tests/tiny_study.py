"""A study that takes seconds: the tiny run with two methods, two seeds and two budgets."""

from fedhelp_jax.experiments.study import Study


def get_study(tuned: str = "") -> Study:
    """Returns the study; ``tiny_study.py:tuned`` tunes learning rates."""
    methods = {"fedhelp": {}, "plain": {"algorithm.name": "fedavg", "optimizer": "sgd"}}
    rates = {"learning_rate": (1e-3, 1e-2, 1e-1)}
    return Study(
        datasets={"tiny": "tiny_config.py"},
        methods=methods,
        seeds=(0, 1),
        budgets={"": {"rounds": 2}, "long": {"rounds": 3}},
        grids=dict.fromkeys(methods, rates) if tuned else {},
        trials=3,
    )
