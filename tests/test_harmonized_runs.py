"""Harmonised images and augmented batches, in runs."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fedhelp, read, refusal, train
from helpers import (
    PUBLIC,
    assert_trees_close,
    build,
    differs,
    run,
    simulate,
    tiny_dataset,
    tiny_federation,
    tiny_public,
    tiny_setup,
    use_tiny_networks,
)

from fedhelp_jax import transforms
from fedhelp_jax.algorithms.local_training import local_epochs
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.random import Purpose, for_purpose
from fedhelp_jax.data.federation import ClientData, normalize_images
from fedhelp_jax.experiments import experiment
from fedhelp_jax.experiments.config import default_config, validate
from fedhelp_jax.experiments.experiment import load_data
from fedhelp_jax.settings import schema

MASKS = Path(__file__).parent / "mask_config.py"


def test_settings_name_what_there_is():
    assert tuple(transforms.HARMONIZATIONS) == schema.HARMONIZATIONS
    assert transforms.AUGMENTATIONS == schema.AUGMENTATIONS


@pytest.mark.slow
def test_each_batch_is_augmented_by_a_key_of_its_step():
    federation = tiny_federation()
    setup = tiny_setup(augment=("flip", "affine"), local_epochs=2)
    group = federation.groups[1]
    data = ClientData(federation.pool, None, group.train.index[0], group.train.size[0])
    key = jax.random.key(4)

    def images_of(setup: Any) -> list[tuple[np.ndarray, np.ndarray, int]]:
        seen = []

        def step(carry, batch, number):
            jax.debug.callback(
                lambda *batch: seen.append(batch), batch.images, batch.mask, number, ordered=True
            )
            return carry, {"loss": jnp.zeros(())}

        jax.block_until_ready(jax.jit(lambda: local_epochs(setup, key, step, 0, data))())
        jax.effects_barrier()
        return [(np.asarray(x), np.asarray(m), int(i)) for x, m, i in seen]

    plain, changed = (images_of(s) for s in (setup._replace(augment=()), setup))
    assert len(plain) == len(changed) > 2
    augmentation = for_purpose(key, Purpose.AUGMENTATION)
    for (before, mask, number), (after, other_mask, other) in zip(plain, changed, strict=True):
        assert number == other
        np.testing.assert_array_equal(mask, other_mask)
        own = jax.random.fold_in(augmentation, number)
        labels = jnp.zeros(len(before), int)
        expected, _ = transforms.augment(own, jnp.asarray(before), labels, ("flip", "affine"))
        np.testing.assert_allclose(after, expected, atol=1e-6)
        assert differs(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fedhelp"])
def test_augmentation_does_not_depend_on_how_clients_are_grouped(name):
    """Neither on chunks, nor on where the images lie."""
    setup = tiny_setup(augment=("flip", "affine", "brightness"), public=PUBLIC)
    states = []
    for way in ({}, {"chunk_size": 2, "max_device_bytes": 60 * 200}):
        given = tiny_federation(public=tiny_public(), on_host="max_device_bytes" in way)
        states.append(run(simulate(build(name, setup), given, **way), 1))
    assert_trees_close(states[1], states[0], 1e-5)


def test_float_images_reach_networks_as_they_are():
    floats = jnp.array([[-3.0, 250.0]], jnp.float32)
    np.testing.assert_array_equal(normalize_images(floats), floats)
    pixels = jnp.array([0, 255], jnp.uint8)
    np.testing.assert_array_equal(normalize_images(pixels), [-1, 1])


def settings(**changes: Any) -> Any:
    config = default_config()
    config.data.num_examples, config.data.image_size = 100, 8
    config.public.num_examples = 12
    for key, value in changes.items():
        config.data[key] = value
    return validate(config)


@pytest.mark.slow
def test_private_and_public_images_are_harmonised_alike():
    plain, public = load_data(settings(), with_public=True)
    names = ("colour_constancy", "percentile_clip", "z_score")
    for used in (names[:1], names[:2], names):
        mine, theirs = load_data(settings(harmonize=used), with_public=True)
        assert public is not None and theirs is not None
        for after, before in ((mine, plain), (theirs, public)):
            expected = transforms.harmonize(before.images, used)
            np.testing.assert_array_equal(after.images, expected)
            assert after.name == "_".join((before.name, *used))
            assert after.images.dtype == (np.float32 if "z_score" in used else np.uint8)
        assert theirs.sha256 == public.sha256  # what a foundation model is asked about


def test_floats_far_from_normal_are_warned_about(monkeypatch, caplog):
    raw = tiny_dataset()
    ct = raw._replace(images=(raw.images * np.float32(10) - 1000))
    monkeypatch.setattr(experiment, "load_federated", lambda *args, **options: ct)
    with caplog.at_level(logging.WARNING):
        load_data(settings(), with_public=False)
    assert "holds values from -1000" in caplog.text and "data.harmonize=" in caplog.text
    caplog.clear()
    data, _ = load_data(settings(harmonize=("percentile_clip", "z_score")), with_public=False)
    assert not caplog.text and abs(data.images).max() < 10


@pytest.mark.slow
def test_runs_on_harmonised_and_augmented_images(tmp_path, monkeypatch):
    use_tiny_networks(monkeypatch)
    flags = {
        "plain": "",
        "both": "--config.data.harmonize=colour_constancy,z_score "
        "--config.data.augment=flip,affine,brightness",
    }
    losses = {}
    for name, rest in flags.items():
        assert train(tmp_path / name, f"--config.rounds=2 {rest}") == 0
        losses[name] = [row["loss"] for row in read(tmp_path / name / "metrics.jsonl")]
    assert all(0 < loss < 10 for loss in losses["both"]) and losses["both"] != losses["plain"]
    summary = read(tmp_path / "both" / "summary.json")
    assert summary["dataset"] == "phantoms_colour_constancy_z_score" and summary["synthetic"]


@pytest.mark.slow
def test_masks_are_learned_from_augmented_floats_and_drawn(tmp_path):
    flags = (
        "--config.data.harmonize=percentile_clip,z_score "
        "--config.data.augment=flip,affine,brightness "
        "--config.algorithm.name=fedavg --config.rounds=1"
    )
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    folder = tmp_path / "run"
    command = f"train --config={MASKS}:3d --workdir={folder} {devices} {flags}"
    assert fedhelp(command) == 0
    assert all(0 < row["loss"] < 10 for row in read(folder / "metrics.jsonl"))
    assert (folder / "pictures" / "small.png").exists()
    # What each client has, of masks too.
    assert "train" in (folder / "shares.csv").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("harmonize=z_score,percentile_clip", "z_score must be the last"),
        ("harmonize=zscore", "some of colour_constancy, percentile_clip, z_score"),
        ("augment=flip,flip", "some of flip, flip_all, affine, brightness, each"),
    ],
)
def test_what_does_not_go_is_refused(flags, words, tmp_path, capsys):
    assert words in refusal(capsys, train(tmp_path / "run", f"--config.data.{flags}"))


@pytest.mark.slow
def test_images_are_compared_before_they_are_harmonised(monkeypatch, capsys):
    """Any two constant images have the same z-scores, and are two pictures all the same."""
    raw, shown = tiny_dataset(), tiny_public()
    raw.images[0], shown.images[0] = 0, 255
    monkeypatch.setattr(experiment, "load_federated", lambda *args, **options: raw)
    monkeypatch.setattr(experiment, "load_public", lambda *args, **options: shown)
    rest = "--config.data.harmonize=z_score"
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    config = f"--config={Path(__file__).parent / 'tiny_config.py'}"
    assert fedhelp(f"teach {config} {devices} {rest}") == 0
    shown.images[0] = raw.images[5]
    code = fedhelp(f"teach {config} {devices} {rest}")
    assert "public image 0 of tiny_public" in refusal(capsys, code)


def test_floats_and_pixels_do_not_mix(monkeypatch):
    raw = tiny_dataset()
    floats = raw._replace(images=raw.images.astype(np.float32))
    monkeypatch.setattr(experiment, "load_federated", lambda *args, **options: floats)
    with pytest.raises(UserError, match="phantoms holds uint8 values, tiny float32; .*z_score"):
        load_data(settings(), with_public=True)
    load_data(settings(harmonize=("z_score",)), with_public=True)


def test_simulated_scanners_are_for_files_of_volumes(tmp_path, capsys):
    code = train(tmp_path / "run", "--config.data.scanner_shift=True")
    assert "scanner_shift = True is for data npz_masks, not phantoms" in refusal(capsys, code)


def test_volumes_have_no_colours(tmp_path, capsys):
    devices = f"--config.mapping.cpu_devices={jax.device_count()}"
    code = fedhelp(
        f"train --config={MASKS}:3d --workdir={tmp_path / 'run'} {devices} "
        "--config.data.harmonize=colour_constancy"
    )
    assert "config.data.harmonize: phantom_volumes: colour_constancy" in refusal(capsys, code)
