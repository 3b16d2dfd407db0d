import json
import logging
import re
import shlex
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import jax
import pytest

from fedhelp_jax.cli.main import main
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import result
from fedhelp_jax.experiments import runner as experiments_runner
from fedhelp_jax.experiments.config import default_config, to_dict, validate
from fedhelp_jax.experiments.config_files import read_settings
from fedhelp_jax.experiments.stopping import Interrupted

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def runner(monkeypatch):
    """A runner that remembers its calls and does nothing."""
    calls = []

    def run(config, workdir, *, overwrite):
        calls.append((config, workdir, overwrite))
        return types.SimpleNamespace(summary={"algorithm": config.algorithm.name, "per_client": []})

    def evaluate(workdir, config):
        calls.append((workdir, config))
        return {"algorithm": "fedhelp", "per_client": []}

    def becomes(other):
        monkeypatch.setattr(result, "run", other)

    becomes(run)
    monkeypatch.setattr(experiments_runner, "evaluate", evaluate)
    return types.SimpleNamespace(calls=calls, becomes=becomes)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("FEDHELP_DATA_DIR", raising=False)


def fedhelp(command: str) -> int:
    return main(["fedhelp", *shlex.split(command)])


def train(tmp_path: Path, rest: str = "", *, config: str = "quickstart.py") -> int:
    return fedhelp(f"train --config={CONFIGS / config} --workdir={tmp_path / 'run'} {rest}")


def refusal(capsys, code: int) -> str:
    """Returns the one line on stderr of a command that ended with exit code 2."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("fedhelp: ")
    return lines[0]


def test_help_is_quick_and_shows_each_command():
    script = (
        "import sys; from fedhelp_jax.cli.main import main; sys.exit(main(['fedhelp', '--help']))"
    )
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert time.perf_counter() - start < 5
    for word in ("fedhelp train --config", "fedhelp evaluate --workdir", "fedhelp show runs"):
        assert word in result.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "absl" in imported
    assert not imported & {"jax", "numpy", "flax", "orbax", "rich"}


def test_help_of_train_lists_the_settings(capsys):
    assert fedhelp("train --help") == 0
    out = capsys.readouterr().out
    assert "--config.rounds=50" in out and "--config.algorithm.lambda_b=0.2" in out


def test_overrides_reach_the_runner(tmp_path, runner):
    rest = (
        "--config.algorithm.name=fedhelp --config.seed=3 --config.learning_rate=1 "
        "--config.algorithm.k=2 --config.algorithm.joint --config.algorithm.temperature=2 "
        "--config.data.max_train=40 --config.data.fractions='(0.5, 0.5)' "
        "--config.roles.large=a --config.roles.large=b "
        "--config.data.name=medmnist --config.data.path=2019 --overwrite"
    )
    assert train(tmp_path, rest) == 0
    config, workdir, overwrite = runner.calls[0]
    assert (workdir, overwrite) == (tmp_path / "run", True)
    assert config.algorithm.name == "fedhelp"
    assert (config.seed, config.learning_rate) == (3, 1.0)
    assert config.algorithm.settings.k == 2
    assert config.algorithm.settings.joint is True
    assert config.algorithm.settings.temperature == 2.0
    assert config.data.max_train == 40
    assert config.data.fractions == (0.5, 0.5)
    assert config.roles.large == ("a", "b")
    assert config.data.path == "2019"


def test_an_optional_setting_can_be_unset_again(tmp_path, runner, monkeypatch):
    monkeypatch.setenv("FEDHELP_DATA_DIR", "/data")
    assert train(tmp_path, "--config.data.max_train=None", config="fed_isic2019.py:cpu") == 0
    assert runner.calls[0][0].data.max_train is None


def test_calls_share_no_state(tmp_path, runner):
    assert train(tmp_path, "--config.seed=3 --overwrite") == 0
    assert train(tmp_path) == 0
    assert (runner.calls[1][0].seed, runner.calls[1][2]) == (0, False)


@pytest.fixture
def programs_are_kept_nowhere():
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", -1)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("programs_are_kept_nowhere")
@pytest.mark.parametrize("chosen", [None, "elsewhere"])
def test_programs_are_kept_in_the_users_cache_folder(tmp_path, runner, monkeypatch, chosen):
    """Unless the user chose another place, by JAX's own setting."""
    monkeypatch.setenv("FEDHELP_CACHE_DIR", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", chosen)
    assert train(tmp_path) == 0
    folder = chosen or str(tmp_path / "cache" / "compiled")
    assert jax.config.jax_compilation_cache_dir == folder
    assert (jax.config.jax_compilation_cache_max_size == 2 * 2**30) == (chosen is None)


@pytest.mark.usefixtures("programs_are_kept_nowhere")
def test_a_program_that_was_kept_by_half_is_removed(tmp_path, runner, monkeypatch):
    """JAX writes a program and then the time of its use; in between the process may be killed."""
    monkeypatch.setenv("FEDHELP_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"12345678")
    assert train(tmp_path) == 0
    assert {path.name for path in folder.iterdir()} == {"whole-cache", "whole-atime"}


@pytest.mark.parametrize(
    ("config", "name", "large"),
    [
        ("quickstart.py", "phantoms", "cnn_large"),
        ("fed_isic2019.py", "folder", "resnet110"),
        ("fed_isic2019.py:cpu", "folder", "resnet32"),
        ("pneumonia.py", "medmnist", "resnet110"),
    ],
)
def test_each_config_is_valid(tmp_path, runner, monkeypatch, config, name, large):
    monkeypatch.setenv("FEDHELP_DATA_DIR", "/data")
    assert train(tmp_path, config=config) == 0
    got = runner.calls[0][0]
    assert (got.data.name, got.model.large) == (name, large)


@pytest.mark.parametrize("config", ["fed_isic2019.py", "pneumonia.py"])
def test_configs_without_a_data_folder_say_what_to_set(tmp_path, runner, capsys, config):
    message = refusal(capsys, train(tmp_path, config=config))
    for key in ("data.path", "public.path", "teacher.path", "teacher.labels"):
        assert f"config.{key} is not set" in message and f"--config.{key}=" in message
    assert "set FEDHELP_DATA_DIR" in message
    assert not runner.calls


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mean_kl", ("mean_kl",)),
        ("mean_kl,raw_answers", ("mean_kl", "raw_answers")),
        ("(mean_kl, raw_answers)", ("mean_kl", "raw_answers")),
        ("('mean_kl', 'raw_answers')", ("mean_kl", "raw_answers")),
        ("()", ()),
        ("", ()),
    ],
)
def test_names_are_taken_with_and_without_brackets_and_quotes(text, names):
    def read(key):
        return read_settings(str(CONFIGS / "quickstart.py"), [f"--config.{key}={text}"])

    assert read("roles.large").roles.large == names
    assert read("algorithm.released_code").algorithm.settings.released_code == names


@pytest.mark.parametrize("name", ["site 2, ward (B)", "2019"])
def test_a_name_may_hold_what_else_parts_names(name):
    config = read_settings(str(CONFIGS / "quickstart.py"), [f"--config.roles.large={(name,)!r}"])
    assert config.roles.large == (name,)
    if "," not in name:
        assert read_settings(
            str(CONFIGS / "quickstart.py"), [f"--config.roles.large={name}"]
        ).roles.large == (name,)


def test_a_config_file_imports_what_lies_beside_it(tmp_path):
    for folder, rounds in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_settings.py").write_text(f"ROUNDS = {rounds}\n")
        (tmp_path / folder / "config.py").write_text(
            "from fedhelp_jax.experiments.config import default_config\n"
            "def get_config():\n"
            "    from shared_settings import ROUNDS\n"
            "    config = default_config()\n"
            "    config.rounds = ROUNDS\n"
            "    return config\n"
        )
    path, modules = list(sys.path), set(sys.modules)
    rounds = [read_settings(str(tmp_path / name / "config.py"), []).rounds for name in ("a", "b")]
    assert rounds == [3, 4]
    assert sys.path == path and set(sys.modules) == modules


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("--config.roundz=3", ["--config.roundz", "--config.rounds"]),
        ("--config.sgd_learning_rate=1", ["--config.sgd_learning_rate", "--config.learning_rate"]),
        ("--config.data.nam=x", ["--config.data.nam", "--config.data.name"]),
        ("--wrkdir=x", ["--wrkdir", "--workdir"]),
        ("--config.data=3", ["--config.data"]),
        ("--config.rounds=many", ["--config.rounds=many", "int"]),
        ("--config.rounds=1.5", ["--config.rounds=1.5", "int"]),
        ("--config.rounds=true", ["--config.rounds=true", "int"]),
        ("--config.learning_rate=fast", ["config.learning_rate", "fast", "finite number"]),
        ("--config.data.fractions='(0.5,'", ["--config.data.fractions"]),
        ("--config.data.max_train=few", ["config.data.max_train", "few", "integer or None"]),
        ("--config.algorithm.joint=perhaps", ["config.algorithm.joint", "True or False"]),
        ("--config.rounds", ["--config.rounds", "alue"]),
        ("--config.rounds=0", ["config.rounds", "at least 1"]),
        ("--config.algorithm.temperature=-1", ["config.algorithm.temperature", "more than 0"]),
        ("--config.algorithm.name=fedhlp", ["config.algorithm.name", "fedhelp"]),
        (
            "--config.algorithm.name=fedavg --config.algorithm.lambda_f=1",
            ["config.algorithm.lambda_f", "fedavg"],
        ),
        (
            "--config.data.dirichlet_alpha=0.1",
            ["config.data.dirichlet_alpha", "data.split_by = dirichlet or quantity"],
        ),
        (
            "--config.data.path=x.npz",
            ["config.data.path changes nothing", "data.name = folder"],
        ),
        (
            "--config.server.optimizer=sgd --config.server.eps=1e-2",
            ["server.eps", "it is for server.optimizer = adam or yogi"],
        ),
        (
            "--config.algorithm.backward=kl --config.algorithm.margin=1",
            ["config.algorithm.margin", "it is for algorithm.backward = ranking"],
        ),
        (
            "--config.public.name=none --config.teacher.accuracy=0.9",
            ["config.teacher.accuracy", "it is for public.name other than none"],
        ),
        ("--config.seed=1 stray", ["stray"]),
        ("--overwrite=perhaps", ["overwrite", "perhaps"]),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, runner, capsys, rest, words):
    message = refusal(capsys, train(tmp_path, rest))
    for word in words:
        assert word in message
    assert not runner.calls


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("", "train, teach, evaluate, show"),
        ("tran", "tran"),
        ("train", "--config"),
        ("train --config=nowhere.py --workdir=x", "nowhere.py"),
        ("train --config= --workdir=x", "--config"),
        (f"train --config={CONFIGS} --workdir=x", "configs"),
        (f"train --config={CONFIGS / 'quickstart.py'}", "--workdir"),
        (f"train --config={CONFIGS / 'quickstart.py'}:cpu --workdir=x", "quickstart.py:cpu"),
        (f"train --config={CONFIGS / 'fed_isic2019.py'}:gpu --workdir=x", "'gpu'"),
        (f"train --config={CONFIGS / 'quickstart.py'} --workdir=s3://b/run", "mount what lies in"),
        (
            f"sweep --config={CONFIGS / 'quickstart.py'} --workdir=gs://b",
            "--workdir=gs://b must be",
        ),
        ("data prepare msd/heart --data_dir=s3://b", "--data_dir=s3://b must be a path of this"),
        ("evaluate --workdir=s3://b/run", "--workdir=s3://b/run must be"),
        ("evaluate", "--workdir"),
        ("evaluate --workdir=nowhere", "config.json"),
        ("evaluate --workdir=x --config.rounds=3", "x/config.json: cannot be read"),
        ("evaluate --workdir=x y", "y"),
        ("show", "run folder"),
        ("show nowhere", "summary.json"),
        ("show --all", "all"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, command, word):
    monkeypatch.chdir(tmp_path)
    assert word in refusal(capsys, fedhelp(command))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(:", ["SyntaxError"]),
        ("x = 3", ["get_config"]),
        ("raise RuntimeError('two\\nlines')", ["RuntimeError", "two lines"]),
        ("import nonsuch_module", ["nonsuch_module"]),
        ("def get_config(): return {'rounds': 3}", ["default_config", "dict"]),
        ("def get_config(): return None", ["default_config"]),
        (
            """
            from fedhelp_jax.experiments.config import default_config
            def get_config():
                config = default_config()
                config.roundz = 3
                return config
            """,
            ["roundz", "rounds"],
        ),
        (
            """
            from fedhelp_jax.experiments.config import default_config
            def get_config():
                config = default_config()
                config.rounds = "many"
                return config
            """,
            ["TypeError", "many"],
        ),
        (
            """
            from ml_collections import ConfigDict
            def get_config():
                return ConfigDict({"rounds": 3})
            """,
            ["config.", "default_config"],
        ),
    ],
)
def test_a_bad_config_file_is_one_line_and_exit_code_2(tmp_path, runner, capsys, source, words):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(source))
    message = refusal(capsys, fedhelp(f"train --config={file} --workdir={tmp_path / 'run'}"))
    for word in words:
        assert word in message
    assert not runner.calls


def test_an_unwritable_workdir_is_named(tmp_path, runner, capsys):
    (tmp_path / "file").write_text("")
    code = fedhelp(f"train --config={CONFIGS / 'quickstart.py'} --workdir={tmp_path / 'file/run'}")
    assert "file/run" in refusal(capsys, code)
    assert not runner.calls


def test_what_the_runner_finds_wrong_is_one_line(tmp_path, runner, capsys):
    def failing(config, workdir, *, overwrite):
        raise UserError("data.path: there is\nno folder")

    runner.becomes(failing)
    assert refusal(capsys, train(tmp_path)) == "fedhelp: data.path: there is no folder"


def test_an_interrupted_run_ends_with_130(tmp_path, runner, capsys):
    def failing(config, workdir, *, overwrite):
        raise Interrupted("saved after round 3")

    runner.becomes(failing)
    assert train(tmp_path) == 130
    assert capsys.readouterr().err == "fedhelp: saved after round 3\n"


def test_interrupted_before_anything_could_be_saved_ends_with_130(tmp_path, runner):
    def failing(config, workdir, *, overwrite):
        raise KeyboardInterrupt

    runner.becomes(failing)
    assert train(tmp_path) == 130


def test_our_own_failure_shows_its_traceback(tmp_path, runner, capsys):
    def failing(config, workdir, *, overwrite):
        raise AssertionError("ours")

    runner.becomes(failing)
    assert train(tmp_path) == 1
    assert "Traceback" in capsys.readouterr().err


def test_evaluate_reads_the_settings_of_the_run(tmp_path, runner, capsys):
    settings = default_config()
    settings.data.name, settings.data.path = "medmnist", "here.npz"
    settings.teacher.name, settings.teacher.path = "litert", "model.tflite"
    settings.teacher.labels = "labels.txt"
    begun = validate(settings)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(begun)))
    assert fedhelp(f"evaluate --workdir={tmp_path}") == 0
    assert runner.calls == [(tmp_path, begun)]
    moved = (
        "--config.data.path=elsewhere --config.teacher.store=there --config.mapping.cpu_devices=3"
    )
    assert fedhelp(f"evaluate --workdir={tmp_path} {moved}") == 0
    config = runner.calls[1][1]
    assert (config.data.path, config.teacher.store) == ("elsewhere", "there")
    assert config.mapping.cpu_devices == 3
    code = fedhelp(f"evaluate --workdir={tmp_path} --config.learning_rate=0.1")
    message = refusal(capsys, code)
    assert "learning_rate: 0.001 -> 0.1: would be another run" in message
    assert "--config.data.path" in message
    (tmp_path / "config.json").write_text(json.dumps(to_dict(begun) | {"rounds": "all"}))
    assert "config.rounds" in refusal(capsys, fedhelp(f"evaluate --workdir={tmp_path}"))


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_a_quiet_run_prints_nothing_but_warnings(tmp_path, runner, capfd, caplog, flag):
    def warns(config, workdir, *, overwrite):
        print("the progress")
        logging.getLogger("fedhelp_jax.experiments").warning("a client diverged")
        logging.getLogger("fedhelp_jax.experiments").info("round 1 saved")
        return types.SimpleNamespace(summary={"algorithm": "fedhelp", "per_client": []})

    runner.becomes(warns)
    assert train(tmp_path, flag) == 0
    assert capfd.readouterr().out == ""
    assert caplog.messages == ["a client diverged"]
    assert train(tmp_path) == 0
    assert "the progress" in capfd.readouterr().out


def test_a_warning_is_printed_once_though_a_library_sets_up_logging(
    tmp_path, runner, capfd, monkeypatch
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest, as in a shell

    def warns(config, workdir, *, overwrite):
        logging.basicConfig()
        logging.getLogger("fedhelp_jax.data").warning("a client diverged")
        return types.SimpleNamespace(summary={"algorithm": "fedhelp", "per_client": []})

    runner.becomes(warns)
    assert train(tmp_path) == 0
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "diverged" in line] == ["a client diverged"]


@pytest.mark.parametrize("flag", ["--verbose", "-v"])
def test_a_verbose_run_tells_what_it_reads_and_where_an_error_arose(tmp_path, runner, capfd, flag):
    def fails(config, workdir, *, overwrite):
        logging.getLogger("fedhelp_jax.data").info("data lungs: 8 images")
        raise UserError("data.path: is empty")

    runner.becomes(fails)
    assert train(tmp_path, flag) == 2
    err = capfd.readouterr().err
    assert re.search(r"^\d\d:\d\d:\d\d  data lungs: 8 images$", err, re.MULTILINE)
    assert "in fails" in err
    assert err.endswith("\nfedhelp: data.path: is empty\n")
    assert train(tmp_path) == 2
    assert capfd.readouterr().err == "fedhelp: data.path: is empty\n"


@pytest.mark.parametrize("flag", ["--no_report", "--no-report"])
def test_a_flag_may_be_written_with_hyphens(tmp_path, runner, capfd, flag):
    assert train(tmp_path, flag) == 0
    assert "report" not in capfd.readouterr().out


def test_quiet_and_verbose_together_are_refused(tmp_path, runner, capsys):
    assert "leave one out" in refusal(capsys, train(tmp_path, "-q -v"))
    assert not runner.calls


@pytest.mark.parametrize("line", ["--help", "verdict --help", "data --help", "sweep --help"])
def test_help_fits_the_terminal(line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["fedhelp", *line.split()]) == 0
    said = capsys.readouterr().out
    # Choices of a flag are one word, and so are settings.
    wide = [text for text in said.splitlines() if len(text) > 80 and "|" not in text]
    assert not [text for text in wide if not text.lstrip().startswith("--config.")]
    if line == "--help":
        command = "fedhelp compare --study=configs/studies/miniature.py --workdir=runs/miniature"
        assert command in " ".join(said.replace("\\\n", " ").split())
