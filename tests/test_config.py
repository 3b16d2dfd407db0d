import dataclasses
import json

import pytest
from ml_collections import config_dict

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments.config import (
    RunConfig,
    default_config,
    flat,
    from_dict,
    to_dict,
    validate,
)
from fedhelp_jax.experiments.identity import differences
from fedhelp_jax.experiments.unused import needed_for, warn_unused


def changed(**changes):
    """Returns the default config with keys like data__name changed."""
    config = default_config()
    with config.unlocked():  # as a config file of its own making might be
        for key, value in changes.items():
            *owners, last = key.split("__")
            owner = config
            for name in owners:
                owner = owner[name]
            with owner.ignore_type():
                owner[last] = value
    return config


def all_uses():
    own = [f for method in ALGORITHMS.values() for f in dataclasses.fields(method.settings)]
    found = [use for field in own for use in field.metadata["only"]]
    for field in dataclasses.fields(RunConfig):
        found += field.metadata.get("only", ())
        if dataclasses.is_dataclass(field.type):
            for inner in dataclasses.fields(field.type):
                found += inner.metadata.get("only", ())
    return list(dict.fromkeys(use for one in found for use in getattr(one, "uses", (one,))))


def refusal(config) -> str:
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_of_the_schema():
    assert validate(default_config()) == from_dict(to_dict(RunConfig()))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_gets_its_own_defaults(name):
    config = validate(changed(algorithm__name=name))
    assert config.algorithm.settings == ALGORITHMS[name].settings()


def test_settings_of_the_method_are_filled_in_and_converted():
    config = validate(changed(algorithm__k=3, algorithm__temperature=2))
    assert config.algorithm.settings == ALGORITHMS["fedhelp"].settings(k=3, temperature=2.0)
    assert isinstance(config.algorithm.settings.temperature, float)


def test_an_int_stands_for_a_float_and_a_list_for_a_tuple():
    config = validate(changed(learning_rate=1, data__fractions=[0.5, 0.5]))
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.data.fractions == (0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "optimizer", "rate"),
    [
        ({}, "adam", 1e-3),
        ({"optimizer": "sgd"}, "sgd", 1e-2),
        ({"algorithm__name": "scaffold"}, "sgd", 1e-2),
        ({"algorithm__name": "per_fedavg", "optimizer": "sgd"}, "sgd", 1e-2),
        ({"algorithm__name": "pfedme", "learning_rate": 0.5}, "sgd", 0.5),
        ({"optimizer": "None", "learning_rate": "None"}, "adam", 1e-3),
    ],
)
def test_the_learning_rate_follows_the_optimizer_that_the_method_takes(changes, optimizer, rate):
    config = validate(changed(**changes))
    assert (config.optimizer, config.learning_rate) == (optimizer, rate)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("none", None), ("sgd", 1.0), ("adam", 0.01), ("yogi", 0.01)]
)
def test_so_does_the_servers(optimizer, rate):
    assert validate(changed(server__optimizer=optimizer)).server.learning_rate == rate


def test_a_locked_config_refuses_unknown_keys_at_once():
    with pytest.raises(AttributeError, match="rounds"):
        default_config().roundz = 3


REFUSED = [
    ({"rounds": 0}, ["config.rounds", "0", "at least 1"]),
    ({"rounds": True}, ["config.rounds", "True", "integer"]),
    ({"rounds": 2**31}, ["config.rounds = 2147483648", "less than 2**31"]),
    ({"learning_rate": 10**400}, ["config.learning_rate", "finite number of 32 bits"]),
    ({"learning_rate": 1e39}, ["config.learning_rate = 1e+39", "finite number of 32 bits"]),
    ({"mapping__cpu_devices": 2000}, ["config.mapping.cpu_devices", "at most 1024"]),
    ({"rounds": 1.5}, ["config.rounds", "integer"]),
    ({"rounds": None}, ["config.rounds", "integer"]),
    ({"roundz": 3}, ["config.roundz", "rounds"]),
    ({"data__naem": "x"}, ["config.data.naem", "name"]),
    ({"data": 3}, ["config.data", "settings"]),
    ({"seed": -1}, ["config.seed"]),
    ({"batch_size": 0}, ["config.batch_size", "at least 1"]),
    ({"public_batch_size": 0}, ["config.public_batch_size"]),
    ({"learning_rate": 0}, ["config.learning_rate", "more than 0"]),
    ({"learning_rate": "fast"}, ["config.learning_rate", "number"]),
    ({"learning_rate": float("nan")}, ["config.learning_rate", "finite"]),
    ({"sgd_learning_rate": 0.1}, ["config.sgd_learning_rate", "did you mean learning_rate"]),
    (
        {"algorithm__name": "scaffold", "optimizer": "adam"},
        ["config.optimizer = 'adam'", "scaffold always takes plain SGD", "leave it None"],
    ),
    ({"weight_decay": -1e-4}, ["config.weight_decay"]),
    ({"participation_rate": 0}, ["config.participation_rate"]),
    ({"participation_rate": 1.01}, ["config.participation_rate", "at most 1"]),
    ({"client_weights": "exmples"}, ["config.client_weights", "did you mean examples"]),
    ({"data__name": "phantom"}, ["config.data.name", "did you mean phantoms"]),
    ({"data__fractions": (0.5, 0.4)}, ["config.data.fractions", "add up to 1"]),
    ({"data__fractions": (1.5, -0.5)}, ["config.data.fractions", "positive"]),
    ({"data__fractions": ("a",)}, ["config.data.fractions", "number"]),
    ({"data__fractions": ()}, ["config.data.fractions"]),
    ({"data__name": "medmnist", "data__path": "gs://b/x.npz"}, ["config.data.path", "mount"]),
    ({"data__cache_dir": "s3://bucket"}, ["config.data.cache_dir", "a path of this machine"]),
    ({"teacher__store": "s3://bucket"}, ["config.teacher.store = 's3://bucket'"]),
    ({"data__max_train": 0}, ["config.data.max_train"]),
    ({"data__name": "folder"}, ["config.data.path", "--config.data.path"]),
    ({"data__name": "medmnist"}, ["config.data.path", ".npz"]),
    ({"public__name": "npz"}, ["config.public.path"]),
    ({"teacher__name": "stored"}, ["config.teacher.path"]),
    ({"teacher__accuracy": 1.2}, ["config.teacher.accuracy"]),
    ({"roles__top_n": -1}, ["config.roles.top_n"]),
    ({"roles__large": "clinic-1"}, ["config.roles.large", "tuple"]),
    ({"model__large": "resnet111"}, ["config.model.large", "did you mean resnet110"]),
    (
        {"model__compute_dtype": "float16"},
        ["config.model.compute_dtype", "one of float32, bfloat16"],
    ),
    ({"mapping__chunk_size": -1}, ["config.mapping.chunk_size", "at least 0"]),
    ({"mapping__max_device_bytes": -1}, ["config.mapping.max_device_bytes", "at least 0"]),
    ({"algorithm__name": "fedhlp"}, ["config.algorithm.name", "did you mean fedhelp"]),
    ({"algorithm__name": 3}, ["config.algorithm.name", "string"]),
    ({"algorithm__tempreature": 1.0}, ["config.algorithm.tempreature", "temperature"]),
    ({"algorithm__temperature": -1.0}, ["config.algorithm.temperature", "more than 0"]),
    ({"algorithm__lambda_b": -0.1}, ["config.algorithm.lambda_b", "at least 0"]),
    ({"algorithm__margin": -1}, ["config.algorithm.margin"]),
    ({"algorithm__k": 0}, ["config.algorithm.k", "at least 1"]),
    ({"algorithm__k": 2.0}, ["config.algorithm.k", "integer or None"]),
    ({"algorithm__kd_warmup_rounds": -1}, ["config.algorithm.kd_warmup_rounds"]),
    ({"algorithm__public_batch_stats": "share"}, ["public_batch_stats", "did you mean shared"]),
    ({"algorithm__joint": 1}, ["config.algorithm.joint", "True or False"]),
    (
        {"algorithm__name": "fedavg", "algorithm__k": 2},
        ["config.algorithm.k", "fedavg", "fedhelp has"],
    ),
    ({"algorithm__small_only": True}, ["config.algorithm.small_only", "local has"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named_with_what_would_be_right(changes, words):
    message = refusal(changed(**changes))
    for word in words:
        assert word in message


def test_a_config_with_a_missing_key_is_refused():
    config = default_config()
    with config.unlocked():
        del config["seed"]
    assert "config.seed is missing" in refusal(config)


def test_a_config_file_of_its_own_making_is_told_where_to_start():
    assert "default_config" in refusal(config_dict.ConfigDict({"rounds": 3}))


@pytest.mark.slow
def test_whole_numbers_that_32_bits_do_not_hold_are_refused_wherever_they_stand():
    """But for seeds, which are unsigned, and bytes, which no program counts."""
    wider = {"seed", "mapping.max_device_bytes"}
    tried: set[str] = set()
    asked: set[str] = set()
    for name in ALGORITHMS:
        fields = {field.name for field in dataclasses.fields(ALGORITHMS[name].settings)}
        for key, *_ in config_lib.describe():
            own = key.startswith("algorithm.")
            if (own and key.removeprefix("algorithm.") not in fields) or key in asked:
                continue
            flag = key.replace(".", "__")
            base = {"algorithm__name": name}
            try:
                validate(changed(**base, **{flag: 7}))
            except UserError:
                continue  # no whole number, or one that needs more
            if not own:
                asked.add(key)  # it is the same for all methods
            try:
                config = validate(changed(**base, **{flag: 2**31}))
            except UserError:
                tried.add(key)
                continue
            # What a float holds, or one of the two.
            assert key in wider or isinstance(dict(flat(to_dict(config)))[dotted(key)], float), key
    assert {"rounds", "batch_size", "roles.top_n", "algorithm.k", "teacher.top_k"} <= tried


def dotted(key: str) -> str:
    own = key.startswith("algorithm.") and key != "algorithm.name"
    return key.replace("algorithm.", "algorithm.settings.") if own else key


def test_config_json_gives_the_same_run_back():
    config = validate(changed(rounds=7, algorithm__k=3, roles__large=("a", "b"), data__max_train=9))
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


def test_every_setting_in_config_json_is_needed():
    """Takes each key out, one at a time, wherever it stands."""

    def paths(values, prefix=()):
        for key, value in values.items():
            yield (*prefix, key)
            if isinstance(value, dict):
                yield from paths(value, (*prefix, key))

    whole = to_dict(RunConfig())
    for path in paths(whole):
        edited = json.loads(json.dumps(whole))
        owner = edited
        for key in path[:-1]:
            owner = owner[key]
        del owner[path[-1]]
        with pytest.raises(UserError, match=path[-1]):
            from_dict(edited)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "settings by name"),
        ('{"round": 3}', "config.round "),
        (json.dumps(to_dict(RunConfig()) | {"rounds": "50"}), "config.rounds = '50'"),
        (json.dumps(to_dict(RunConfig()) | {"more": 1}), "config.more"),
        (
            json.dumps(to_dict(RunConfig()) | {"sgd_learning_rate": 0.01}),
            "run is of another version",
        ),
    ],
)
def test_a_config_json_edited_by_hand_is_refused_by_the_key(tmp_path, content, word):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        config_lib.load(path)
    assert str(path) in str(error.value) and word in str(error.value)


def test_differences_name_the_keys():
    ours, theirs = validate(changed(rounds=3)), validate(changed(algorithm__name="local"))
    keys = [line.split(":")[0] for line in differences(ours, theirs)]
    assert keys == ["rounds", "algorithm.name"]  # another method has other settings anyway
    hotter = validate(changed(rounds=3, algorithm__temperature=9.0))
    assert [line.split(":")[0] for line in differences(ours, hotter)] == [
        "algorithm.settings.temperature"
    ]
    assert differences(ours, ours) == ()


def test_a_config_file_may_set_what_a_run_does_not_use_and_is_told(caplog):
    config = validate(changed(data__shards_per_client=3, server__beta2=0.5, teacher__accuracy=0.5))
    warn_unused(config)
    assert [record.getMessage().split(" in this run")[0] for record in caplog.records] == [
        "config.data.shards_per_client changes nothing",
        "config.server.beta2 changes nothing",
    ]


def test_what_own_code_reads_is_not_known(caplog):
    own = changed(
        public__name="benchmarks.public_images:noise", public__path="x.npz", data__path="x"
    )
    warn_unused(validate(own))
    assert [record.getMessage().split(" in this run")[0] for record in caplog.records] == [
        "config.data.path changes nothing"
    ]
    prepared = validate(changed(public__name="tfds:x"))
    assert needed_for(prepared, "public.table") == "public.name = folder"


@pytest.mark.parametrize("use", all_uses(), ids=str)
def test_what_a_setting_is_for_is_a_value_that_another_can_have(use):
    """Or else a misspelt condition would never hold."""
    owner, _, name = use.key.replace(".settings", "").rpartition(".")
    for value in use.values:
        if owner == "algorithm":
            settings = ALGORITHMS["fedhelp"].settings
            check = next(f for f in dataclasses.fields(settings) if f.name == name).metadata[
                "check"
            ]
        else:
            part = next(f.type for f in dataclasses.fields(RunConfig) if f.name == owner)
            check = next(f for f in dataclasses.fields(part) if f.name == name).metadata["check"]
        text = f"{value}x" if str(value).endswith(":") else value
        assert check is None or value is None or check.passes(text)


def test_every_setting_is_described():
    described = {key: about for key, _, about in config_lib.describe()}
    assert {"rounds", "data.name", "algorithm.name", "algorithm.k"} <= set(described)
    assert all(about and not about.endswith(": ") for about in described.values())
