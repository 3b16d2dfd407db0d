"""Studies: which runs there are, what is tuned on what, how they go on, what is refused."""

import csv
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config
from commands import fedhelp, read, refusal
from helpers import refusal as refused
from helpers import use_tiny_networks
from tiny_study import get_study

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments import config as config_lib
from fedhelp_jax.experiments import identity, runner
from fedhelp_jax.experiments import study as studies
from fedhelp_jax.experiments.config_files import load_study
from fedhelp_jax.experiments.study import Failed, compare, grid_points, tune
from fedhelp_jax.simulation.compiled import CompiledRounds

TESTS = Path(__file__).parent
FOLDERS = [
    f"{data}/{method}/seed{seed}"
    for data in ("tiny", "tiny long")
    for method in ("fedhelp", "plain")
    for seed in (0, 1)
]


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        yield


def study(tuned: str = "", **changes):
    """The tiny study with its config read, one budget."""
    small = {"datasets": {"tiny": tiny_config.get_config()}, "budgets": {"": {"rounds": 2}}}
    return dataclasses.replace(get_study(tuned), **small | changes)


def command(workdir: Path, name: str = "compare", source: str = "tiny_study.py") -> str:
    return f"{name} --study={TESTS / source} --workdir={workdir}"


def table(path: Path) -> list[dict]:
    """The rows of a CSV file but for their times."""
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def study_hit_by(signal: str, when: str, workdir: Path) -> subprocess.CompletedProcess:
    """The result of a process that a signal hits in its study."""
    script = [sys.executable, str(TESTS / "tiny_fedhelp.py"), signal, "after-row", when]
    return subprocess.run(
        [*script, *shlex.split(command(workdir))], capture_output=True, text=True, timeout=300
    )


def stamps(workdir: Path) -> dict[str, int]:
    """When each finished run was finished."""
    return {
        str(path.parent.relative_to(workdir)): path.stat().st_mtime_ns
        for path in workdir.rglob("summary.json")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study to its end, on the command line; not to be changed."""
    workdir = tmp_path_factory.mktemp("study")
    assert fedhelp(command(workdir)) == 0
    return workdir


# --- what a study leaves ---


@pytest.mark.slow
def test_there_is_a_run_for_each_method_data_set_budget_and_seed(finished):
    assert sorted(stamps(finished)) == sorted(FOLDERS)
    for folder in FOLDERS:
        config = read(finished / folder / "config.json")
        assert config["seed"] == int(folder[-1])
        assert config["rounds"] == (3 if "long" in folder else 2)
        assert config["optimizer"] == ("sgd" if "plain" in folder else "adam")
        assert config["algorithm"]["name"] == ("fedavg" if "plain" in folder else "fedhelp")


@pytest.mark.slow
def test_the_table_is_of_the_runs(finished):
    runs = table(finished / "runs.csv")
    assert [f"{row['data']}/{row['method']}/seed{row['seed']}" for row in runs] == FOLDERS
    for row, folder in zip(runs, FOLDERS, strict=True):
        summary = read(finished / folder / "summary.json")
        for key in ("small_mean", "worst_small", "large_mean", "gap", "bytes_up_per_round"):
            assert float(row[key]) == summary[key]
    rows = table(finished / "comparison.csv")
    assert [(row["data"], row["method"], row["seeds"]) for row in rows] == [
        (data, method, "2") for data in ("tiny", "tiny long") for method in ("fedhelp", "plain")
    ]
    for i, row in enumerate(rows):
        values = [float(run["small_mean"]) for run in runs[2 * i : 2 * i + 2]]
        assert float(row["small_mean"]) == pytest.approx(sum(values) / 2)
    # Two budgets of one data set are not two data sets.
    assert (finished / "comparison.tex").read_text().count(r"\begin{tabular}") == 2
    assert not list(finished.glob("ranks*"))


# --- going on ---


@pytest.mark.slow
def test_a_finished_study_runs_nothing_and_writes_the_same_table(finished, capsys, monkeypatch):
    before, files = stamps(finished), (finished / "comparison.csv").read_bytes()
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("a run was made"))
    assert fedhelp(command(finished)) == 0
    assert "8 of 8 runs are finished" in capsys.readouterr().out
    assert stamps(finished) == before
    assert (finished / "comparison.csv").read_bytes() == files


@pytest.mark.slow
def test_a_killed_study_does_only_what_is_missing_and_writes_the_same_table(finished, tmp_path):
    killed = study_hit_by("SIGKILL", "2@tiny/plain/seed1", tmp_path)
    assert killed.returncode == -9, killed.stderr
    done = stamps(tmp_path)
    assert sorted(done) == sorted(FOLDERS[:3])
    assert (tmp_path / FOLDERS[3] / "metrics.jsonl").exists()
    assert not (tmp_path / "comparison.csv").exists()

    assert fedhelp(command(tmp_path)) == 0
    assert {folder: stamps(tmp_path)[folder] for folder in done} == done
    assert [row["round"] for row in read(tmp_path / FOLDERS[3] / "metrics.jsonl")] == [1, 2]
    for name in ("runs.csv", "comparison.csv"):
        assert table(tmp_path / name) == table(finished / name)


@pytest.mark.slow
def test_a_study_asked_to_stop_in_a_last_round_stops(tmp_path):
    result = study_hit_by("SIGINT", "2@tiny/fedhelp/seed1", tmp_path)
    assert result.returncode == 130, result.stderr
    assert "is finished" in result.stderr
    assert sorted(stamps(tmp_path)) == sorted(FOLDERS[:2])


@pytest.mark.slow
def test_a_method_added_later_is_all_that_is_run(finished, tmp_path):
    two = study(seeds=(0,))
    compare(two, tmp_path)
    done = stamps(tmp_path)
    compare(dataclasses.replace(two, methods={**two.methods, "local": {}}), tmp_path)
    after = stamps(tmp_path)
    assert set(after) - set(done) == {"tiny/local/seed0"}
    assert {folder: after[folder] for folder in done} == done


@pytest.mark.slow
def test_a_folder_of_other_settings_is_refused(finished):
    message = refused(lambda: compare(study(budgets={"": {"batch_size": 4}}), finished))
    assert "batch_size: 16 -> 4" in message
    assert "tiny/fedhelp/seed0" in message


def test_a_study_goes_on_with_the_devices_of_its_stopped_run(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise UserError("enough")

    folder = tmp_path / "tiny" / "plain" / "seed1"
    (folder / "checkpoints" / "1").mkdir(parents=True)
    program = {"platform": "cpu", "devices": 5, "chunk_size": 1}
    identity.write_provenance(
        folder, {"program": program, "sources": {"data": {"sha256": "0", "path": None}}}
    )
    monkeypatch.setattr(runner, "train", refuse)
    jax.devices()  # now the command cannot change how many this process has
    assert fedhelp(command(tmp_path)) == 2
    assert f"mapping.cpu_devices = 5, with which the run in {folder} was started" in caplog.text


@pytest.mark.slow
def test_runs_of_other_data_are_not_compared(finished, tmp_path, capsys):
    """As where a file was replaced while the study stood still."""
    workdir = Path(shutil.copytree(finished, tmp_path / "study"))
    replaced = workdir / "tiny" / "plain" / "seed1" / "provenance.json"
    recorded = read(replaced)
    recorded["sources"]["data"]["sha256"] = "0" * 64
    replaced.write_text(json.dumps(recorded))
    assert fedhelp(command(workdir)) == 2
    message = capsys.readouterr().err
    assert "tiny/fedhelp/seed1 and " in message and "tiny/plain/seed1: data: other" in message
    replaced.unlink()
    assert fedhelp(command(workdir)) == 2
    assert "tiny/plain/seed1: holds a run of an earlier version" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_refused_does_not_stop_the_others(tmp_path):
    # Prototypes of unequal widths cannot be averaged.
    methods = {"fedproto": {}, **study().methods}
    broken = study(methods=methods, seeds=(0,))
    message = refused(lambda: compare(broken, tmp_path), Failed)
    assert message.startswith("runs failed (1): tiny, fedproto, seed 0: ")
    assert [row["method"] for row in table(tmp_path / "comparison.csv")] == ["fedhelp", "plain"]


@pytest.mark.slow
def test_clients_are_grouped_as_the_reference_groups_them(tmp_path):
    methods = {"fedhelp": {}, "all_small": {"algorithm.name": "fedavg", "roles.top_n": 0}}
    compare(study(methods=methods, seeds=(0,)), tmp_path)
    assert read(tmp_path / "tiny/all_small/seed0/summary.json")["large_mean"] is None
    _, all_small = table(tmp_path / "comparison.csv")
    clients = read(tmp_path / "tiny/all_small/seed0/summary.json")["per_client"]
    values = {c["name"]: c["metrics"]["balanced_accuracy"] for c in clients}
    assert float(all_small["large_mean"]) == values["client_0"]
    small = [values[f"client_{i}"] for i in (1, 2, 3)]
    assert float(all_small["small_mean"]) == pytest.approx(sum(small) / 3)


@pytest.mark.slow
def test_clients_are_grouped_so_where_the_reference_was_refused_too(tmp_path):
    # Prototypes of unequal widths cannot be averaged.
    all_small = {"algorithm.name": "fedavg", "roles.top_n": 0}
    methods = {"all_small": all_small, "fedproto": {}, "fedavg": {}}
    broken = study(methods=methods, seeds=(0,), reference="fedproto")
    refused(lambda: compare(broken, tmp_path), Failed)
    row, _ = table(tmp_path / "comparison.csv")
    clients = read(tmp_path / "tiny/all_small/seed0/summary.json")["per_client"]
    values = {c["name"]: c["metrics"]["balanced_accuracy"] for c in clients}
    assert float(row["large_mean"]) == values["client_0"]
    assert "No run of fedproto is finished" in (tmp_path / "comparison.md").read_text()


# --- tuning ---


@pytest.mark.slow
def test_trials_are_judged_on_validation_and_never_look_at_test(tmp_path, monkeypatch):
    looked_at = []
    measured = CompiledRounds._measured  # every evaluation comes through it

    def watched(self, state, split, **options):
        looked_at.append((split, options["logits"]))
        return measured(self, state, split, **options)

    monkeypatch.setattr(CompiledRounds, "_measured", watched)
    chosen, failures = tune(study("tuned"), tmp_path)
    assert not failures
    # In the rounds without logits, and at the end with them.
    assert set(looked_at) == {("validation", False), ("validation", True)}
    rows = table(tmp_path / "tuning.csv")
    for method in ("fedhelp", "plain"):
        trials = [row for row in rows if row["method"] == method]
        assert [row["trial"] for row in trials] == ["0", "1", "2"]
        scores = []
        for trial in range(3):
            summary = read(tmp_path / f"tiny/{method}/trial{trial}/summary.json")
            assert (summary["split"], summary["seed"]) == ("validation", 1000)
            last = read(tmp_path / f"tiny/{method}/trial{trial}/metrics.jsonl")[-1]
            assert (summary["small_mean"], last["split"]) == (last["small_mean"], "validation")
            scores.append((summary["small_mean"] + summary["large_mean"]) / 2)
        assert [float(row["validation"]) for row in trials] == scores
        best = scores.index(max(scores))
        assert [row["chosen"] for row in trials] == [str(int(i == best)) for i in range(3)]
        config = read(tmp_path / f"tiny/{method}/trial{best}/config.json")
        # Measured again, it is still of the validation images.
        evaluated = runner.evaluate(tmp_path / f"tiny/{method}/trial{best}")
        again = (evaluated["small_mean"] + evaluated["large_mean"]) / 2
        assert (evaluated["split"], again) == ("validation", max(scores))
        assert chosen["tiny", method] == {"learning_rate": config["learning_rate"]}


@pytest.mark.slow
def test_a_method_whose_trial_is_refused_is_left_out(tmp_path):
    # Prototypes of unequal widths cannot be averaged.
    methods = {"fedproto": {}, "fedavg": {}}
    grids = dict.fromkeys(methods, {"learning_rate": (1e-3,)})
    broken = study(methods=methods, grids=grids, trials=1, seeds=(0,), reference="fedavg")
    message = refused(lambda: compare(broken, tmp_path), Failed)
    assert message.startswith("runs failed (1): tiny, fedproto, trial 0: ")
    assert [row["method"] for row in table(tmp_path / "comparison.csv")] == ["fedavg"]
    assert sorted(stamps(tmp_path)) == ["tiny/fedavg/seed0", "tiny/fedavg/trial0"]


def test_what_is_missing_for_many_runs_is_said_once_with_the_command_that_gets_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = command(tmp_path / "out", source="self_taught_study.py")
    assert fedhelp(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    path = TESTS / "self_taught_study.py"
    # Phantoms are drawn by the seed, so each seed's answers are others; both methods share them.
    assert said.startswith("fedhelp: runs failed (4): tiny, fedhelp, seed 0 and 1 more: ")
    assert said.count("lacks 12 of the 12 answers") == 2
    assert said.endswith(f"fedhelp teach --study={path}")
    asked = []
    monkeypatch.setattr(
        "fedhelp_jax.experiments.study.teach_run",
        lambda config, dry_run, done: asked.append(config),
    )
    assert fedhelp(f"teach --study={path} --dry-run") == 0
    assert sorted(config.seed for config in asked) == [0, 1]


@pytest.mark.slow
def test_a_study_asks_about_the_same_images_only_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez("public.npz", images=images, labels=np.arange(12) % 3)
    tiny = load_study(str(TESTS / "self_taught_study.py"))
    public = {"public.name": "npz", "public.path": "public.npz", "public.num_examples": None}
    tiny = dataclasses.replace(tiny, budgets={"": {**tiny.budgets[""], **public}})
    studies.teach(tiny)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("to ask")]) == 1


@pytest.mark.slow
def test_a_failure_of_one_run_does_not_end_the_study(tmp_path, monkeypatch):
    train = runner.train

    def fails_once(config, workdir, **options):
        if (config.algorithm.name, config.seed) == ("fedhelp", 1):
            raise MemoryError("of the accelerator")
        return train(config, workdir, **options)

    monkeypatch.setattr(runner, "train", fails_once)
    message = refused(lambda: compare(study(), tmp_path), Failed)
    assert message == "runs failed (1): tiny, fedhelp, seed 1: MemoryError: of the accelerator"
    assert sorted(stamps(tmp_path)) == [
        "tiny/fedhelp/seed0",
        "tiny/plain/seed0",
        "tiny/plain/seed1",
    ]
    assert len(table(tmp_path / "runs.csv")) == 3


@pytest.mark.slow
def test_runs_take_the_settings_that_were_chosen(tmp_path, monkeypatch):
    # The worst on validation, which nothing but a choice of it would take.
    monkeypatch.setattr(studies, "mean_of_roles", lambda summary: -float(summary["small_mean"]))
    chosen, failures = tune(study("tuned"), tmp_path)
    assert not failures
    compare(study("tuned"), tmp_path)
    for method in ("fedhelp", "plain"):
        for seed in (0, 1):
            config = read(tmp_path / f"tiny/{method}/seed{seed}/config.json")
            assert chosen["tiny", method].items() <= config.items()


def test_a_larger_grid_is_drawn_from_the_same_way_each_time():
    grid = {"a": range(10), "b": range(10)}
    points = grid_points(grid, 5, "x")
    assert points == grid_points(grid, 5, "x")
    assert len({tuple(point.items()) for point in points}) == 5


# --- the studies that come with it ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "runs", "trials"),
    [
        ("miniature.py", 38, 0),
        ("ablations.py", 85, 0),
        ("ablations.py:fed_isic2019.py:cpu", 85, 0),
        ("ablations.py:pneumonia.py:sixteen", 85, 0),
        ("scarcity.py", 150, 0),
        ("scarcity.py:skin:resnet", 150, 0),
        ("cost_to_large.py", 120, 0),
        ("capacity.py", 50, 0),
        ("capacity.py:resnet", 15, 0),
        ("masks.py", 18, 0),
        ("masks.py:brain3d.py:cpu", 18, 0),
        ("relevance.py", 85, 0),
        ("relevance.py:gradients", 12, 0),
        ("baselines.py", 110, 132),
        ("baselines.py:pneumonia.py:sixteen", 130, 150),
        ("baselines.py:fed_isic2019.py:two_layers", 130, 150),
    ],
)
def test_their_runs_are_all_there_and_sound(source, runs, trials, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDHELP_DATA_DIR", str(tmp_path))
    made = []

    def train(config, workdir, split="test", tells_plan=True):
        made.append((config.algorithm, config.public.name, config.learning_rate, split))
        values = {"small_mean": 0.5, "large_mean": 0.5, "worst_small": 0.5, "gap": 0.0}
        clients = [{"name": "a", "role": "small", "metrics": {"balanced_accuracy": 0.5}}]
        (workdir / "summary.json").write_text(
            json.dumps(
                {
                    **values,
                    "algorithm": config.algorithm.name,
                    "metric": "balanced_accuracy",
                    "synthetic": True,
                    "split": split,
                    "rounds": config.rounds,
                    "per_client": clients,
                    **dict.fromkeys(("bytes_up_per_round", "bytes_down_per_round"), 1),
                    **dict.fromkeys(("wall_s", "compile_s"), 1.0),
                }
            )
        )
        (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
        (workdir / "metrics.jsonl").write_text('{"round": 1, "wall_s": 1.0}\n')
        read = {"program": {"devices": 1}, "sources": {"data": {"sha256": "0", "path": None}}}
        identity.write_provenance(workdir, read)

    monkeypatch.setattr(runner, "train", train)
    study = TESTS.parent / "configs" / "studies" / source
    assert fedhelp(f"compare --study={study} --workdir={tmp_path / 'out'}") == 0
    splits = [split for *_, split in made]
    assert (splits.count("test"), splits.count("validation")) == (runs, trials)
    if trials:  # no method is tried twice with the same settings
        assert len(set(made[:trials])) == trials


def test_a_rate_for_all_methods_leaves_plain_sgd_its_own_where_that_is_asked_for(tmp_path):
    methods = {"fedavg": {}, "scaffold": {"learning_rate": None}}
    rates = {
        cell.method: (cell.config.optimizer, cell.config.learning_rate)
        for cell in studies._cells(
            study(methods=methods, reference="fedavg", budgets={"": {"learning_rate": 3e-3}}),
            tmp_path,
            {},
        )
    }
    assert rates == {"fedavg": ("adam", 3e-3), "scaffold": ("sgd", 1e-2)}


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {}}, "methods: the study has none"),
        ({"seeds": (1, 1)}, "must differ"),
        ({"budgets": {"": {}, " ": {}}}, "'tiny' stands for two of them"),
        ({"datasets": {}}, "datasets: the study has none"),
        ({"datasets": {"tiny": 3}}, "datasets['tiny'] must be default_config(), changed"),
        ({"reference": "fedhelpp"}, "did you mean fedhelp"),
        ({"methods": {"fedhelp": {}, "a/b": {}}}, "'a/b' must be a name that a folder can have"),
        ({"methods": {"fedhelp": {"batch_size": 2}}}, "batch_size must be the same for all"),
        ({"methods": {"fedhelp": {}, "fedx": {}}}, "tiny, fedx: config.algorithm.name"),
        ({"methods": {"fedhelp": {"server.momentun": 0.1}}}, "tiny, fedhelp: server.momentun"),
        (
            {"methods": {"fedhelp": {}, "fedavg": {"teacher.accuracy": 0.5}}},
            "tiny, fedavg: config.teacher.accuracy changes nothing in this run: it is for methods",
        ),
        (
            {"grids": dict.fromkeys(("fedhelp", "plain"), {"server.momentum": (0, 0.5, 0.9)})},
            "trial 0: config.server.momentum changes nothing",
        ),
        ({"grids": {"fedhelp": {"learning_rate": (1, 2, 3)}}}, "every method and no other"),
        (
            {"grids": {"fedhelp": {"learning_rate": (1, 2, 3)}, "plain": {}}},
            "grids['plain'] is empty, but fedavg can be tuned",
        ),
        ({"grids": dict.fromkeys(("fedhelp", "plain"), {"rounds": (1, 2, 3)})}, "rounds must be"),
        (
            {"grids": dict.fromkeys(("fedhelp", "plain"), {"learning_rate": (1e-3,)})},
            "grids['fedhelp'] has 1 points, but every method gets 3 trials",
        ),
    ],
)
def test_an_unsound_study_is_refused_before_anything_runs(changes, said, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("a run was made"))
    assert said in refused(lambda: compare(study(**changes), tmp_path))


@pytest.mark.parametrize(
    ("source", "text", "said"),
    [
        ("compare", "", "there is no get_study() in it"),
        (
            "compare",
            "def get_study(): return 3",
            "must return a fedhelp_jax.experiments.study",
        ),
        ("compare", None, "there is no file"),
    ],
)
def test_a_file_that_is_no_study_is_refused(source, text, said, tmp_path, capsys):
    path = tmp_path / "study.py"
    if text is not None:
        path.write_text(text)
    line = f"{source} --study={path} --workdir={tmp_path / 'out'}"
    assert said in refusal(capsys, fedhelp(line))


def test_tuning_a_study_without_grids_is_refused(tmp_path, capsys):
    assert "no grids" in refusal(capsys, fedhelp(command(tmp_path, "tune")))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (f"--study={TESTS / 'tiny_study.py'}", "no run of the study has a foundation model"),
        (f"--study={TESTS / 'tiny_study.py'} --config=a.py", "leave --config out"),
        (f"--study={TESTS / 'tiny_study.py'} --config.seed=1", "too many"),
    ],
)
def test_a_study_to_teach_is_refused_by_the_reason(flags, said, capsys):
    assert said in refusal(capsys, fedhelp(f"teach {flags}"))


def test_flags_that_are_missing_or_too_many_are_named(tmp_path, capsys):
    assert "--study is missing" in refusal(capsys, fedhelp(f"compare --workdir={tmp_path}"))
    line = command(tmp_path) + " more"
    assert "'more' is one argument too many" in refusal(capsys, fedhelp(line))
