"""Checks that a teacher's settings, each valid by itself, are compatible with each other."""

import re
from urllib.parse import urlsplit

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.settings.schema import FoundationConfig, TeacherConfig
from fedhelp_jax.teachers.resolve import teacher

_URL = ("url", "its address")
_SERVED = ("model", "the name of the model there")
_FILE = ("path", "the model file")
_LABELS = (
    "labels",
    "a text file of the model's classes, one a line, or {path}.head if it gives embeddings",
)
_NEEDS = {
    "stored": (("path", "the file of its answers"),),
    "open_inference": (_URL, _SERVED, _LABELS),
    "hf_zero_shot": (_URL, _SERVED),
    "litert": (_FILE, _LABELS),
    "onnx": (_FILE, _LABELS),
}


def check_teacher(config: TeacherConfig) -> None:
    """Checks the settings of a teacher, including those of an ensemble's members.

    Raises:
        UserError: Two settings exclude each other.
    """
    ensemble = config.name == "ensemble"
    if ensemble != bool(config.members):
        raise UserError(
            "config.teacher.members must name the members of a teacher called ensemble, and of no "
            f"other; teacher.name = {config.name!r} has {len(config.members)} of them"
        )
    weights = config.weights
    if weights and (len(weights) != len(config.members) or min(weights) <= 0):
        raise UserError(
            f"config.teacher.weights = {weights} must be {len(config.members)} positive numbers, "
            "one for each member"
        )
    _check_keys(config, "config.teacher")
    if not ensemble:
        _check_foundation(config, "config.teacher")
    for i, member in enumerate(config.members):
        if member.name in ("ensemble", "none"):
            raise UserError(f"config.teacher.members[{i}].name must be a model of its own")
        _check_foundation(member, f"config.teacher.members[{i}]")


def missing_settings(config: TeacherConfig) -> list[tuple[str, str]]:
    """Returns the settings that a teacher or its members need and that have no value.

    Returns:
        Keys, such as "config.teacher.path", and what each must name.
    """
    models: list[tuple[str, FoundationConfig]] = [("config.teacher", config)]
    models += [(f"config.teacher.members[{i}]", one) for i, one in enumerate(config.members)]
    return [
        (f"{path}.{key}", f"teacher {one.name} needs {what.format(path=path)}")
        for path, one in models
        for key, what in _NEEDS.get(one.name, ())
        if not (getattr(one, key) or (key == "labels" and one.head))
    ]


def _check_foundation(config: FoundationConfig, path: str) -> None:
    teacher(config.name, f"{path}.name")
    if config.head is not None and config.top_k is not None:
        raise UserError(f"{path}.top_k is for logits; with {path}.head the store keeps embeddings")
    if config.name == "open_inference" and re.search(r"/v2(/|$)", urlsplit(str(config.url)).path):
        raise UserError(f"{path}.url must be what stands before /v2, such as https://host.example")
    if config.template is not None and "{}" not in config.template:
        raise UserError(f"{path}.template = {config.template!r} must hold {{}} for the label")
    _check_keys(config, path)


def _check_keys(config: FoundationConfig, path: str) -> None:
    # The value is written to config.json, so an API key in its place must be refused and not shown.
    if config.api_key_env and not re.fullmatch(r"[A-Z][A-Z0-9_]*", config.api_key_env):
        raise UserError(
            f"{path}.api_key_env must be the name of an environment variable, in capitals, not "
            "the key itself"
        )
    if config.api_key_env and config.api_key_file:
        raise UserError(f"{path}.api_key_env and api_key_file are both set; one of them holds it")
