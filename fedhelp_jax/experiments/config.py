"""The settings of a run, turned from config files and flags into a checked, frozen `RunConfig`.

`default_config` turns the schema (`fedhelp_jax.settings.schema`) into the `ConfigDict` that config
files and ``--config.a.b=...`` change. `validate` turns that into a `RunConfig`, which is all that
the rest of the package sees: no other module reads a `ConfigDict`.

A method's own settings are defined with the method (`fedhelp_jax.algorithms.Method`). A config
declares the settings of all methods as None (the method's default), because ml_collections refuses
to override a missing key. Settings that the chosen method does not have must not be set.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ml_collections import config_dict

from fedhelp_jax.algorithms import ALGORITHMS, make_settings, settings_of
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.sources import DATA, PUBLIC, source
from fedhelp_jax.experiments.tracking import TOOLS
from fedhelp_jax.models.registry import MODELS, architecture
from fedhelp_jax.settings import (
    COUNT,
    FRACTION,
    SEED,
    Check,
    at_least,
    more_than,
    one_of,
    part,
    setting,
    some_of,
    unless,
)
from fedhelp_jax.settings.schema import (
    DataConfig,
    FoundationConfig,
    MappingConfig,
    ModelConfig,
    PublicConfig,
    RolesConfig,
    ServerConfig,
    TeacherConfig,
)
from fedhelp_jax.settings.values import as_dict, refuse_unknown, value_as
from fedhelp_jax.teachers.settings import check_teacher, missing_settings
from fedhelp_jax.typing import JsonObject, Record


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """The method and its own settings, with the defaults filled in."""

    name: str = setting("fedhelp", "the method; package.module:object is one of your own")
    settings: Any = dataclasses.field(default_factory=lambda: ALGORITHMS["fedhelp"].settings())


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    `validate` and `from_dict` replace None by the default optimizer and learning rates, so the
    settings of a run always hold them.
    """

    task: str = setting(
        "classification",
        "classification of images, or segmentation: of their pixels",
        one_of("classification", "segmentation"),
    )
    seed: int = setting(0, "all randomness of the run follows from it", SEED)
    rounds: int = setting(50, "communication rounds", COUNT)
    batch_size: int = setting(4, "private images a step", COUNT)
    public_batch_size: int = setting(
        4, "public images a step", COUNT, only=unless("public.name", "none")
    )
    local_epochs: int = setting(1, "passes over its images a client makes in a round", COUNT)
    optimizer: str | None = setting(
        None,
        "the clients': adam, or (plain) sgd; if None adam, but sgd for scaffold, per_fedavg and "
        "pfedme, which take no other",
        one_of("adam", "sgd"),
    )
    learning_rate: float | None = setting(
        None, "the clients'; 1e-3 for adam, 1e-2 for sgd if None", more_than(0)
    )
    learning_rate_schedule: str = setting(
        "constant",
        "constant, or cosine: falls over the rounds, to nearly 0 in the last",
        one_of("constant", "cosine"),
    )
    weight_decay: float = setting(1e-4, "L2: added to the gradient, before Adam", at_least(0))
    client_weights: str = setting(
        "uniform",
        "a client's weight in the server's mean: uniform, or its number of examples",
        one_of("uniform", "examples"),
    )
    participation_rate: float = setting(
        1.0, "part of each group that takes part in a round", FRACTION
    )
    interpolate: tuple[float, ...] = setting(
        (),
        "parts of the broadcast model in further models that a client could deploy, between its "
        "own and that one",
        Check(
            lambda parts: all(0 < part < 1 for part in parts) and len(set(parts)) == len(parts),
            "different numbers between 0 and 1",
        ),
    )
    evaluate_every: int = setting(1, "rounds from one evaluation to the next", COUNT)
    checkpoint_every: int = setting(5, "rounds from one checkpoint to the next", COUNT)
    on_divergence: str = setting(
        "stop",
        "where every client of a role has diverged (NaN or infinity): stop with exit code 1, or "
        "continue",
        one_of("stop", "continue"),
        identity=False,
    )
    tracking: tuple[str, ...] = setting(
        (),
        f"tools that get each round's numbers, offline: {', '.join(TOOLS)}, which are extras of "
        "the package",
        some_of(*TOOLS),
        identity=False,
    )
    data: DataConfig = part(DataConfig)
    public: PublicConfig = part(PublicConfig)
    teacher: TeacherConfig = part(TeacherConfig, only=unless("public.name", "none"))
    roles: RolesConfig = part(RolesConfig)
    model: ModelConfig = part(ModelConfig)
    server: ServerConfig = part(ServerConfig)
    mapping: MappingConfig = part(MappingConfig)
    algorithm: AlgorithmConfig = part(AlgorithmConfig)


_FOLDER = ", or set FEDHELP_DATA_DIR to the folder of the files if the config uses it"


# --- config files and their values --------------------------------------------------------------


# Typed as Any, because type checkers refuse `config.data.name = ...` on a ConfigDict.
def default_config() -> Any:
    """Returns a locked `ConfigDict` of all settings at their defaults, for config files to change.

    The settings of a method from outside this package are added by `declare_method`.

    Example:
        >>> config = default_config()
        >>> config.data.name, config.rounds, config.algorithm.lambda_b
        ('phantoms', 50, None)
    """
    return config_dict.ConfigDict(_declare(RunConfig)).lock()


def declare_method(config: Any, name: str) -> None:
    """Chooses a method in a `ConfigDict`, and declares its missing settings as None.

    Raises:
        UserError: There is no such method.

    Example:
        >>> config = default_config()
        >>> declare_method(config, "fedhelp_jax.algorithms:fedprox")
        >>> config.algorithm.mu = 0.01
    """
    config.algorithm.name = name
    with config.unlocked():
        for field in dataclasses.fields(ALGORITHMS.find(name, "config.algorithm.name").settings):
            if field.name not in config.algorithm:
                config.algorithm[field.name] = config_dict.placeholder(object)


def validate(config: config_dict.ConfigDict) -> RunConfig:
    """Returns the settings as a `RunConfig`, checked one by one and together.

    Args:
        config: made by `default_config` and then changed.

    Raises:
        UserError: A key is unknown or missing, a value has the wrong type or is out of range, or
            the chosen method does not have a setting that is set. The message names the key.
    """
    values = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    values = as_dict(values, "config")
    algorithm = as_dict(values.get("algorithm", {}), "config.algorithm")
    name = algorithm.get("name")
    known = {} if not isinstance(name, str) else _settings(name)
    refuse_unknown(algorithm, [*_algorithm_keys(), *known], "config.algorithm")
    chosen = {key: v for key, v in algorithm.items() if key != "name" and v is not None}
    for key in chosen if known is not None and isinstance(name, str) else ():
        if key not in known:
            having = [method for method in ALGORITHMS if key in _settings(method)]
            raise UserError(
                f"config.algorithm.{key} is set, but {name} has no such setting "
                f"({' and '.join(having)} has)"
            )
    chosen = {key: field.default for key, field in known.items()} | chosen
    return _run_config({**values, "algorithm": {"name": name, "settings": chosen}})


def to_dict(config: RunConfig) -> JsonObject:
    """Returns the settings as dicts, lists, numbers and strings, which JSON preserves exactly."""
    values = dataclasses.asdict(config)
    return _listed(values)


def from_dict(values: Any) -> RunConfig:
    """Returns the `RunConfig` that `to_dict` was given; the inverse of `to_dict`.

    Raises:
        UserError: A key is unknown or missing, or `validate` would refuse a value.
    """
    return _run_config(as_dict(values, "config"))


def load(path: Path) -> RunConfig:
    """Returns the settings in the ``config.json`` at `path`.

    Raises:
        UserError: There is no such file, it is not JSON, or `from_dict` refuses it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); is this a run folder?"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); was it edited by hand?") from None
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(
            f"{path}: {error}. If the run is of another version of fedhelp_jax, go on with that, "
            "or train anew in another folder"
        ) from None


def to_config_dict(config: RunConfig) -> Any:
    """Returns the `ConfigDict` that `validate` turns into `config`, for flags to change."""
    values = dataclasses.asdict(config)
    settings = settings_of(config.algorithm.settings)
    changed = default_config()
    declare_method(changed, config.algorithm.name)
    changed.update({**values, "algorithm": {"name": config.algorithm.name, **settings}})
    return changed


def kinds() -> dict[str, Any]:
    """Returns the type of each setting by its key.

    Example:
        >>> kinds()["roles.large"]
        tuple[str, ...]
    """
    found = {key: field.type for key, field in _fields(RunConfig)}
    for method in ALGORITHMS:
        hints = typing.get_type_hints(ALGORITHMS[method].settings)
        found |= {f"algorithm.{key}": kind for key, kind in hints.items()}
    return found


def describe() -> list[tuple[str, Any, str]]:
    """Returns (key, default, help) of each setting, in the order of the schema."""
    rows = [
        (key, field.default, field.metadata["about"])
        for key, field in _fields(RunConfig)
        if not key.startswith("algorithm.")
    ]
    methods = f"{', '.join(ALGORITHMS)}, or package.module:object"
    rows.append(("algorithm.name", "fedhelp", f"the method: {methods}"))
    for method in ALGORITHMS:
        for key, field in _settings(method).items():
            about = field.metadata["about"]
            rows.append((f"algorithm.{key}", field.default, f"{method}: {about}"))
    return rows


# --- implementation -----------------------------------------------------------------------------


def _fields(cls: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field[Any]]]:
    """Yields the dotted key and the field of each setting in a dataclass of the schema."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def _declare(cls: type) -> dict[str, Any]:
    """Returns the entries that a `ConfigDict` declares for a dataclass of the schema."""
    declared: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if cls is AlgorithmConfig and field.name == "settings":
            for key in _algorithm_keys():
                if key != "name":
                    declared[key] = config_dict.placeholder(object)
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            declared[field.name] = _declare(field.type)
        elif field.default is None:
            # `object` for numbers, so that a flag can set None again; `str` for names, so that a
            # folder called 2019 stays a string.
            is_text = str in typing.get_args(field.type)
            declared[field.name] = config_dict.placeholder(str if is_text else object)
        else:
            declared[field.name] = field.default
    return declared


def _settings(method: str) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a method's settings, by name.

    Raises:
        UserError: There is no such method.
    """
    cls = ALGORITHMS.find(method, "config.algorithm.name").settings
    return {field.name: field for field in dataclasses.fields(cls)}


def _algorithm_keys() -> list[str]:
    return ["name", *dict.fromkeys(key for method in ALGORITHMS for key in _settings(method))]


def _run_config(values: Record) -> RunConfig:
    config = cast(RunConfig, _build(RunConfig, values, "config"))
    _check_together(config)
    return _filled_in(config)


_LEARNING_RATES = {"adam": 1e-3, "sgd": 1e-2}
_SERVER_LEARNING_RATES = {"sgd": 1.0, "adam": 0.01, "yogi": 0.01}


def _filled_in(config: RunConfig) -> RunConfig:
    """Returns the settings with None replaced by the default optimizer and learning rates."""
    name, server = config.algorithm.name, config.server
    plain_sgd = ALGORITHMS[name].plain_sgd
    optimizer = config.optimizer or ("sgd" if plain_sgd else "adam")
    if plain_sgd and optimizer != "sgd":
        raise UserError(
            f"config.optimizer = {optimizer!r}, but {name} always takes plain SGD: leave it None"
        )
    rate, server_rate = config.learning_rate, server.learning_rate
    if rate is None:
        rate = _LEARNING_RATES[optimizer]
    if server_rate is None:
        server_rate = _SERVER_LEARNING_RATES.get(server.optimizer)
    server = dataclasses.replace(server, learning_rate=server_rate)
    return dataclasses.replace(config, optimizer=optimizer, learning_rate=rate, server=server)


def _build(cls: type, values: Any, path: str) -> Any:
    """Returns a dataclass of the schema, built from a dict with exactly its keys."""
    values = as_dict(values, path)
    fields = dataclasses.fields(cls)
    refuse_unknown(values, [field.name for field in fields], path)
    built: dict[str, Any] = {}
    for field in fields:
        key = f"{path}.{field.name}"
        if field.name not in values:
            raise UserError(
                f"{key} is missing; start from fedhelp_jax.experiments.config.default_config()"
            )
        value = values[field.name]
        if cls is AlgorithmConfig and field.name == "settings":
            built["settings"] = _build_settings(built["name"], value, path)
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            built[field.name] = _build(field.type, value, key)
        elif field.name == "members":
            built[field.name] = _build_members(value, values, key)
        else:
            built[field.name] = value_as(value, field.type, field.metadata["check"], key)
    return cls(**built)


_KEY_SETTINGS = ("api_key_env", "api_key_file")


def _build_members(values: Any, teacher: Record, path: str) -> tuple[FoundationConfig, ...]:
    """Returns the members of an ensemble; a member inherits what it does not set from the teacher.

    It does not inherit the API key if it sets its own URL or key.
    """
    if not isinstance(values, tuple | list):
        # The value is not shown, here and below, since it may hold an API key by mistake.
        raise UserError(f"{path} must be a tuple of dicts, one for each member")
    names = {field.name for field in dataclasses.fields(FoundationConfig)} - {"name"}
    shared = {name: value for name, value in teacher.items() if name in names}
    # An API key is for one host, and is given in only one of the two settings.
    no_key = dict.fromkeys(_KEY_SETTINGS)
    built = []
    for i, item in enumerate(values):
        if not isinstance(item, Mapping):
            raise UserError(f"{path}[{i}] must be a dict of settings")
        own = shared | no_key if {"url", *_KEY_SETTINGS} & set(item) else shared
        built.append(_build(FoundationConfig, {**own, **item}, f"{path}[{i}]"))
    return tuple(built)


def _build_settings(method: str, values: Any, path: str) -> Any:
    values = as_dict(values, f"{path}.settings")
    for key in _settings(method):
        if key not in values:
            raise UserError(f"{path}.{key} is missing; the method has this setting")
    return make_settings(ALGORITHMS[method].settings, values, path)


def _check_together(config: RunConfig) -> None:
    """Refuses settings that are each valid by themselves but incompatible with each other."""
    missing = []
    for section, registry in (("data", DATA), ("public", PUBLIC)):
        given = getattr(config, section)
        if section == "public" and given.name == "none":
            continue
        found = source(registry, given.name, f"config.{section}.name")
        if config.task not in found.tasks:
            other = "classification" if config.task == "segmentation" else "segmentation"
            lacking = "masks" if config.task == "segmentation" else "labels"
            raise UserError(
                f"config.{section}.name = {given.name!r} has no {lacking} for config.task = "
                f"{config.task!r}; it is for {other}"
            )
        missing += [
            (f"config.{section}.{key}", f"{section} {given.name} needs {what}")
            for key, what in found.needs
            if not getattr(given, key)
        ]
        by = config.data.split_by if section == "data" else None
        if by is not None and found.split_by is not None and by not in found.split_by:
            raise UserError(
                f"config.data.split_by = {by!r} is not for data {given.name}: it must be "
                f"{' or '.join(found.split_by)}"
            )
    if config.data.scanner_shift and config.data.name != "npz_masks":
        raise UserError(
            f"config.data.scanner_shift = True is for data npz_masks, not {config.data.name}"
        )
    if "z_score" in config.data.harmonize[:-1]:
        raise UserError(
            "config.data.harmonize: z_score must be the last, since it leaves no pixels"
        )
    missing += missing_settings(config.teacher)
    if missing:
        said = "; ".join(f"{key} is not set, but {why}" for key, why in missing)
        flags = " ".join(f"--{key}=..." for key, _ in missing)
        folder = "" if "FEDHELP_DATA_DIR" in os.environ else _FOLDER
        raise UserError(f"{said}: give {flags}{folder}")
    _check_task(config)
    check_teacher(config.teacher)


def _check_task(config: RunConfig) -> None:
    segmentation = config.task == "segmentation"
    models = config.model
    roles = (
        ("small", models.small, models.small_widths),
        ("large", models.large, models.large_widths),
    )
    for role, name, widths in roles:
        found = architecture(name, f"config.model.{role}")
        if config.task not in found.tasks:
            right = [one for one in MODELS if config.task in architecture(one, "").tasks]
            raise UserError(
                f"config.model.{role} = {name!r} cannot learn config.task = {config.task!r}; it "
                f"must be one of {', '.join(right)}"
            )
        if widths and "widths" not in found.options:
            raise UserError(f"config.model.{role}_widths is for U-Nets; {name} has its own")
        if models.norm == "group" and any(width > 8 and width % 8 for width in widths):
            raise UserError(
                f"config.model.{role}_widths = {widths} must be at most 8 or multiples of 8 for "
                "config.model.norm = 'group'"
            )
    if not segmentation and (models.norm != "batch" or models.remat):
        raise UserError(
            "config.model.norm and remat are for U-Nets; other networks have batch and False"
        )


def _listed(value: Any) -> Any:
    """Returns `value` with its tuples turned into lists, as JSON does."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    return value


def flat(values: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields the dotted key and the value of each setting in the result of `to_dict`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
