"""The tiny study with a foundation model that must be asked first."""

import dataclasses

import tiny_study

from fedhelp_jax.experiments.study import Study


def get_study() -> Study:
    """Returns the study, in which both methods learn from the same answers."""
    study = tiny_study.get_study()
    teacher = {"rounds": 2, "teacher.name": "self_trained", "teacher.epochs": 1}
    methods = {"fedhelp": {}, "cool": {"algorithm.name": "fedhelp", "algorithm.temperature": 1.0}}
    return dataclasses.replace(study, budgets={"": teacher}, methods=methods)
