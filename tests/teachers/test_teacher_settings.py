"""Settings of a teacher that do not go together, and members of ensembles in config files."""

import dataclasses
import json

import pytest
from commands import fedhelp
from commands import refusal as refusal_of_command
from helpers import refusal

from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments.config import default_config, from_dict, to_dict, validate
from fedhelp_jax.experiments.identity import differences
from fedhelp_jax.settings.schema import FoundationConfig

# --- settings that do not go together ---

KEY = "hf_Zq8Xw3Lr7Tn5Vb2Kd9Hf4"
SIMULATED = {"name": "simulated"}
ENDPOINT = {"url": "https://models.example.org", "model": "m"}


def changed(**settings):
    """The default settings with some of the teacher's changed."""
    config = default_config()
    for key, value in settings.items():
        setattr(config.teacher, key, value)
    return config


def refused(**settings) -> str:
    message = refusal(lambda: validate(changed(**settings)))
    assert not [start for start in range(len(KEY) - 5) if KEY[start : start + 6] in message]
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ensemble"}, ["config.teacher.members", "'ensemble'", "0 of them"]),
        ({"members": (SIMULATED,)}, ["config.teacher.members", "'simulated'", "1 of them"]),
        ({"name": "none", "members": (SIMULATED,)}, ["config.teacher.members"]),
        ({"name": "ensemble", "members": ("simulated",)}, ["members[0]", "dict of settings"]),
        (
            {"name": "ensemble", "members": (SIMULATED, {"naem": "x"})},
            ["config.teacher.members[1].naem", "did you mean name?"],
        ),
        (
            {"name": "ensemble", "members": (SIMULATED, SIMULATED | {"batch_size": 0})},
            ["config.teacher.members[1].batch_size = 0", "at least 1"],
        ),
        ({"name": "ensemble", "members": ({"accuracy": 1},)}, ["members[0].name is missing"]),
        (
            {"name": "ensemble", "members": ({"members": (SIMULATED,)},)},
            ["config.teacher.members[0].members is not a setting"],
        ),
    ],
    ids=lambda value: "",
)
def test_an_ensemble_has_members_and_no_other_has(settings, words):
    message = refused(**settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (2.0, -1.0), (1.0, float("nan"))]
)
def test_weights_are_positive_and_as_many_as_members(weights):
    members = (SIMULATED, SIMULATED)
    message = refused(name="ensemble", members=members, weights=weights)
    assert message.startswith("config.teacher.weights")
    validate(changed(name="ensemble", members=members, weights=(2.0, 0.5)))


def test_weights_belong_to_an_ensemble():
    assert refused(weights=(1.0,)).startswith("config.teacher.weights")


@pytest.mark.parametrize("name", ["ensemble", "none"])
def test_a_member_is_a_model_of_its_own(name):
    message = refused(name="ensemble", members=(SIMULATED, {"name": name}))
    assert message.startswith("config.teacher.members[1].name")


SERVED = {"name": "open_inference", "labels": "labels.txt"} | ENDPOINT
MISSING = [
    (SERVED | {"url": None}, "url"),
    (SERVED | {"model": None}, "model"),
    (SERVED | {"url": ""}, "url"),
    ({"name": "hf_zero_shot", "model": "m"}, "url"),
    ({"name": "hf_zero_shot", "url": "https://models.example.org"}, "model"),
    ({"name": "litert", "labels": "labels.txt"}, "path"),
    ({"name": "onnx", "labels": "labels.txt"}, "path"),
    ({"name": "stored"}, "path"),
]


@pytest.mark.parametrize(("settings", "key"), MISSING)
def test_what_a_back_end_needs_is_named(settings, key):
    words = f".{key} is not set, but teacher {settings['name']} needs "
    assert refused(**settings).startswith(f"config.teacher{words}")
    message = refused(name="ensemble", members=(SIMULATED, settings))
    assert message.startswith(f"config.teacher.members[1]{words}")
    validate(changed(**settings | {key: "https://models.example.org" if key == "url" else "m"}))


@pytest.mark.parametrize(
    "settings", [SERVED, {"name": "litert", "path": "m.tflite"}, {"name": "onnx", "path": "m.onnx"}]
)
def test_logits_need_names_of_their_classes(settings):
    settings = settings | {"labels": None}
    for message, path in (
        (refused(**settings), "config.teacher"),
        (refused(name="ensemble", members=(settings,)), "config.teacher.members[0]"),
    ):
        assert message.startswith(f"{path}.labels is not set") and f"{path}.head" in message
    for rest in ({"labels": "labels.txt"}, {"head": "probe"}):
        validate(changed(**settings | rest))


def test_zero_shot_and_files_of_answers_bring_their_classes():
    validate(changed(name="hf_zero_shot", **ENDPOINT))
    validate(changed(name="stored", path="answers.npz"))


def test_embeddings_are_kept_whole():
    message = refused(**SERVED, head="probe", top_k=5)
    assert message.startswith("config.teacher.top_k") and "config.teacher.head" in message
    validate(changed(**SERVED, head="probe", dtype="float16"))
    validate(changed(**SERVED, top_k=5))


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/models/m/infer", "/serving/v2/models/m"])
def test_an_address_ends_before_the_protocols_own_path(path):
    message = refused(**SERVED | {"url": f"https://models.example.org{path}"})
    assert message.startswith("config.teacher.url must be what stands before /v2")


@pytest.mark.parametrize("url", ["https://v2.example.org", "https://example.org/v2beta/serving"])
def test_a_host_or_folder_may_be_called_like_the_protocol(url):
    assert validate(changed(**SERVED | {"url": url})).teacher.url == url


@pytest.mark.parametrize(
    "value",
    [KEY, f"Bearer {KEY}", f"{KEY}=", "hf-token", "my_token", "7TOKEN", "A B", "HF_TOKEN\n"],
)
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown(value):
    settings = {"name": "hf_zero_shot", **ENDPOINT, "api_key_env": value}
    words = ".api_key_env must be the name of an environment variable"
    message = refused(**settings)
    assert message.startswith(f"config.teacher{words}") and value.strip() not in message
    message = refused(name="ensemble", members=(settings,))
    assert message.startswith(f"config.teacher.members[0]{words}") and value.strip() not in message
    validate(changed(**settings | {"api_key_env": "HF_TOKEN_2"}))


def test_a_key_that_no_member_takes_over_is_refused_too():
    """It would be written to config.json all the same."""
    member = {"name": "hf_zero_shot", **ENDPOINT, "api_key_env": "HF_TOKEN"}
    refused(name="ensemble", members=(member,), api_key_env=KEY)


def test_a_key_on_the_command_line_is_not_shown(tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text("from fedhelp_jax.experiments.config import default_config as get_config\n")
    command = f"teach --config={file} --config.teacher.api_key_env={KEY}"
    for rest in ("", "--config.rounds=x", "--config.teacher.members=x", "--config.nothing=1"):
        line = refusal_of_command(capsys, fedhelp(f"{command} {rest}"))
        assert not [start for start in range(len(KEY) - 5) if KEY[start : start + 6] in line]


def test_a_key_has_one_place():
    settings = {"name": "hf_zero_shot", **ENDPOINT, "api_key_env": "A", "api_key_file": "key.txt"}
    assert "api_key_env and api_key_file are both set" in refused(**settings)
    message = refused(name="ensemble", members=(SIMULATED, settings))
    assert message.startswith("config.teacher.members[1].api_key_env and api_key_file")
    for key in ("api_key_env", "api_key_file"):
        validate(changed(**settings | {key: None}))


@pytest.mark.parametrize("template", ["a photo", "a photo of {label}", "{", ""])
def test_a_template_has_a_place_for_the_label(template):
    settings = {"name": "hf_zero_shot", **ENDPOINT, "template": template}
    assert refused(**settings).startswith(f"config.teacher.template = {template!r} must hold {{}}")
    message = refused(name="ensemble", members=(settings,))
    assert message.startswith("config.teacher.members[0].template")
    validate(changed(**settings | {"template": "a photo of {}."}))


@pytest.fixture
def whole():
    """An ensemble whose members have a setting of each type."""
    members = (
        {"name": "hf_zero_shot", **ENDPOINT, "template": "a {}", "api_key_env": "HF_TOKEN"},
        {"name": "onnx", "path": "m.onnx", "labels": "l.txt", "image_size": 224, "timeout": 7},
        {"name": "simulated", "store": "elsewhere"},
    )
    settings = {"name": "ensemble", "members": members, "weights": (1, 2, 3.5)}
    return validate(changed(**settings, store="shared", top_k=5))


def test_members_have_the_settings_that_they_leave_out_from_their_teacher(whole):
    assert whole.teacher.weights == (1.0, 2.0, 3.5)
    same = {"labels": "l.txt", "image_size": 224, "store": "shared", "top_k": 5}
    onnx = FoundationConfig(name="onnx", path="m.onnx", timeout=7.0, **same)
    simulated = FoundationConfig(name="simulated", store="elsewhere", top_k=5)
    assert whole.teacher.members[1:] == (onnx, simulated)
    assert isinstance(whole.teacher.members[1].timeout, float)
    assert whole.teacher.members[0].template == "a {}"


def test_members_survive_config_json(tmp_path, whole):
    written = json.dumps(to_dict(whole), allow_nan=False)
    assert from_dict(json.loads(written)) == whole
    path = tmp_path / "config.json"
    path.write_text(written)
    assert config_lib.load(path) == whole
    (difference,) = differences(
        whole,
        dataclasses.replace(
            whole, teacher=dataclasses.replace(whole.teacher, weights=(1.0, 2.0, 4.0))
        ),
    )
    assert difference == "teacher.weights: [1.0, 2.0, 3.5] -> [1.0, 2.0, 4.0]"


def test_members_in_a_config_json_are_checked(tmp_path, whole):
    values = to_dict(whole)
    values["teacher"]["members"][1]["path"] = None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    message = refusal(lambda: config_lib.load(path))
    assert message.startswith(f"{path}: config.teacher.members[1].path is not set")
