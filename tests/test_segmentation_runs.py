"""Segmentation from the command line, in two and three dimensions."""

import csv
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import fedhelp, read, refusal
from helpers import assert_trees_equal, on_host
from PIL import Image

from fedhelp_jax.data.types import PublicDataset, image_sha256
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments.experiment import build_experiment, load_data
from fedhelp_jax.experiments.reporting import report
from fedhelp_jax.metrics.surface_distance import surface_metrics
from fedhelp_jax.report.dice import DICE, read_dice
from fedhelp_jax.teachers.answers import Answers, save_answers
from fedhelp_jax.teachers.backends.simulated import simulated

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent / "mask_config.py"
OVERLAP = {"dice", "iou", "hd95"}
METRICS = OVERLAP | {"non_finite"}
TWO_LEVELS = " --config.model.small_widths=(2,3) --config.model.large_widths=(3,4)"
PARTS = ("phantom_front", "phantom_back", "foreground")


def command(name: str, rank: str, rest: str) -> str:
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    return f"{name} --config={CONFIG}:{rank} {devices} {rest}"


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The flags of a store with the answers of the self-trained teacher of the volumes."""
    flags = f"--config.teacher.store={tmp_path_factory.mktemp('answers') / 'store'}"
    assert fedhelp(command("teach", "3d", flags)) == 0
    return flags


# Those that treat masks in their own way.
METHODS = ("fedhelp", "fml", "fedmd", "feddf", "fedproto", "fedgh", "fedkd", "fedtype")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_volumes(method, answered, tmp_path):
    flags = f"{answered} --workdir={tmp_path} --config.algorithm.name={method}"
    if method == "fedhelp":
        flags += TWO_LEVELS
    if method in ("fedproto", "fedgh"):  # these need features of one width
        flags += " --config.model.large_widths=(2,)"
    assert fedhelp(command("train", "3d", flags)) == 0
    summary = read(tmp_path / "summary.json")
    assert summary["metric"] == "dice" and summary["synthetic"]
    names = METRICS | {f"{metric}_{part}" for metric in OVERLAP for part in PARTS}
    for client in summary["per_client"]:
        assert set(client["metrics"]) == names
        overlaps = [client["metrics"][name] for name in names if name.startswith(("dice", "iou"))]
        assert all(0 <= value <= 1 for value in overlaps)
        assert client["metrics"]["hd95"] >= 0
    assert_dice_is_that_of_the_examples(tmp_path)
    rounds = read(tmp_path / "metrics.jsonl")
    assert all(0 < row["loss"] < 10 for row in rounds)
    for role in ("small", "large"):
        with Image.open(tmp_path / "pictures" / f"{role}.png") as picture:
            assert min(picture.size) > 200
    if method == "fedhelp":
        assert summary["teacher"].startswith("self-trained unet_small_cpu on phantom_volumes")
        losses = read(tmp_path / "metrics.jsonl")[-1]["train"]
        assert losses["small"]["public_loss"] > 0 and losses["large"]["proxy_loss"] > 0


def assert_dice_is_that_of_the_examples(folder):
    """The means of ``dice.csv`` are what the evaluation on the devices found."""
    saved = {own.client: own for own in read_dice(folder / DICE)}
    clients = read(folder / "summary.json")["per_client"]
    assert set(saved) == {client["name"] for client in clients}
    for client in clients:
        dice = saved[client["name"]].dice
        assert len(dice) == client["n_test"]
        np.testing.assert_allclose(np.nanmean(dice), client["metrics"]["dice"], rtol=1e-4)


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory):
    """A finished FedHelp run on 2D phantoms, with a simulated teacher of masks."""
    folder = tmp_path_factory.mktemp("flat") / "run"
    assert fedhelp(command("train", "2d", f"--workdir={folder}{TWO_LEVELS}")) == 0
    return folder


def test_one_foreground_class_has_no_metrics_by_class(flat_run):
    summary = read(flat_run / "summary.json")
    assert summary["teacher"] == "simulated (accuracy 0.85)"
    assert all(set(client["metrics"]) == METRICS for client in summary["per_client"])
    with (flat_run / "clients.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "hd95"]
    # The surface distance is measured once, on what each client deploys.
    assert {(row["split"], row["model"]) for row in rows} == {
        ("test", "personal"),
        ("test", "large"),
    }


def test_the_report_names_the_worst_images(flat_run, tmp_path):
    assert_dice_is_that_of_the_examples(flat_run)
    page = report([flat_run], tmp_path).read_text()
    rows = [d for own in read_dice(flat_run / DICE) for d in own.dice if np.isfinite(d)]
    assert f"The test images with the lowest Dice, of {len(rows):,}" in page
    assert "95 % interval" in page and f"{min(rows):.3f}" in page


def test_a_damaged_table_of_dice_is_named(flat_run, tmp_path):
    folder = shutil.copytree(flat_run, tmp_path / "run")
    (folder / DICE).write_text("client,role,example,dice\nclient_0,small,3\n")
    assert f"{DICE} is damaged" in report([folder], tmp_path).read_text()


def test_resuming_ends_with_the_same_bits(flat_run, tmp_path):
    config = configs.load(flat_run / "config.json")
    experiment = build_experiment(config)
    simulation = experiment.simulation
    whole = simulation.init()
    for round in range(2):
        whole, _ = simulation.round(whole, round)
    again = simulation.init()
    again, _ = simulation.round(again, 0)
    again, _ = simulation.round(jax.device_put(on_host(again)), 1)
    assert_trees_equal(on_host(again), on_host(whole))

    # And what was reported is what these weights say.
    summary = read(flat_run / "summary.json")
    found = {client["name"]: client["metrics"] for client in summary["per_client"]}
    for group in simulation.groups:
        for row, name in enumerate(group.names):
            predicted = simulation.predictions(whole, group, row, "test")
            index = np.asarray(group.test.index[row])[: int(group.test.size[row])]
            truth = experiment.dataset.labels[index]
            assert predicted.shape == truth.shape and predicted.dtype == np.uint8
            overlap = 2 * ((predicted > 0) & (truth > 0)).sum((1, 2))
            dice = overlap / ((predicted > 0).sum((1, 2)) + (truth > 0).sum((1, 2)))
            assert found[name]["dice"] == pytest.approx(dice.mean(), abs=1e-6)
            hd95 = surface_metrics(predicted, truth, experiment.dataset.label_names)["hd95"]
            assert found[name]["hd95"] == pytest.approx(hd95)


def test_evaluating_anew_gives_the_same(flat_run):
    before = read(flat_run / "summary.json")
    for picture in (flat_run / "pictures").iterdir():
        picture.unlink()
    assert fedhelp(f"evaluate --workdir={flat_run}") == 0
    assert read(flat_run / "summary.json")["per_client"] == before["per_client"]
    assert {path.name for path in (flat_run / "pictures").iterdir()} == {"small.png", "large.png"}


def test_nothing_compiles_from_the_second_round_on(flat_run):
    rows = read(flat_run / "metrics.jsonl")
    assert [row["compile_s"] > 0 for row in rows] == [True, False]


def test_stored_mask_logits_of_another_resolution_and_other_classes(flat_run, tmp_path):
    config = configs.load(flat_run / "config.json")
    _, public = load_data(config, with_public=True)
    assert public is not None
    logits = np.random.default_rng(0).normal(size=(6, 10, 12, 3)).astype(np.float32)
    names = ("background", "cell", "gap")
    file = tmp_path / "answers.npz"
    save_answers(file, Answers(logits, public.sha256, names, "made up"))
    flags = f"--config.teacher.name=stored --config.teacher.path={file} --workdir={tmp_path / 'r'}"
    assert fedhelp(command("train", "2d", f"{flags} --config.rounds=1")) == 0
    assert read(tmp_path / "r" / "summary.json")["teacher"] == "made up"


@pytest.mark.parametrize(
    ("rank", "flags", "words"),
    [
        ("2d", "--config.model.small=resnet20", "config.model.small = 'resnet20'"),
        ("2d", "--config.task=classification", "cannot learn config.task = 'classification'"),
        ("3d", "--config.task=classification", "'phantom_volumes' has no labels"),
        ("2d", "--config.data.name=medmnist --config.data.path=x", "'medmnist' has no masks"),
        ("3d", "--config.public.name=phantoms", "one network sees both"),
        ("3d", "--config.data.volume_size=(8,9)", "three sides of at least 8"),
        ("2d", "--config.model.small_widths=(2,0)", "numbers of at least 1"),
        ("2d", "--config.model.norm=layer", "one of batch, group, none"),
        ("2d", "--config.model.norm=group --config.model.small_widths=(4,12)", "multiples of 8"),
        ("2d", "--config.algorithm.k=2", "algorithm.k: 2 must be less than the 2 classes"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(rank, flags, words, tmp_path, capsys):
    code = fedhelp(command("train", rank, f"--workdir={tmp_path / 'run'} {flags}"))
    assert words in refusal(capsys, code)


def test_answers_that_are_no_masks_are_refused(flat_run, tmp_path, capsys):
    config = configs.load(flat_run / "config.json")
    _, public = load_data(config, with_public=True)
    assert public is not None
    file = tmp_path / "answers.npz"
    logits = np.zeros((6, 2), np.float32)
    save_answers(file, Answers(logits, public.sha256, ("a", "b"), "made up"))
    flags = f"--config.teacher.name=stored --config.teacher.path={file} --workdir={tmp_path / 'r'}"
    assert "needs a map of logits" in refusal(capsys, fedhelp(command("train", "2d", flags)))


@pytest.mark.parametrize("names", [("thing",), ("background", "one", "two")])
def test_simulated_masks_are_wrong_where_they_should_be(names):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    masks = rng.integers(0, max(2, len(names)), (4, 20, 30)).astype(np.uint8)
    sha256 = tuple(image_sha256(image) for image in images)
    public = PublicDataset("p", True, images, masks, names, sha256, images)
    answers = simulated(public, 0.8)
    assert answers.logits.shape == (4, 20, 30, len(names))
    if len(names) == 1:
        said = answers.logits[..., 0] > 0
    else:
        said = answers.logits.argmax(-1)
    wrong = said != masks
    np.testing.assert_allclose(wrong.mean((1, 2)), 0.2, atol=0.01)
    # In blobs: a wrong pixel's neighbour is mostly wrong too.
    assert (wrong[:, 1:] & wrong[:, :-1]).sum() > 0.7 * wrong[:, 1:].sum()
    np.testing.assert_array_equal(simulated(public, 0.8).logits, answers.logits)
