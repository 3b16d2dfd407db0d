"""Training on a prepared set is training on the raw files."""

import numpy as np
import pytest
from commands import CONFIG, fedhelp, read, refusal, train
from helpers import use_tiny_networks
from isic_files import FLAGS, IsicFiles, isic_config

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.prepare import prepare
from fedhelp_jax.data.sources import load_federated
from fedhelp_jax.settings.schema import DataConfig


@pytest.fixture
def files(tmp_path):
    """Raw files, and the same prepared in ``data``."""
    (tmp_path / "download").mkdir()
    files = IsicFiles(tmp_path / "download")
    files.write_table()
    files.table.rename(files.path / "train_test_split.csv")
    prepare("fed_isic2019", str(files.path), str(tmp_path / "data"), say=lambda text: None)
    return files


def both(files, seed=0, **settings):
    """The data from the raw files and from the prepared set."""
    folder = files.path.parent
    common = {"image_size": 8, "cache_dir": str(folder / "cache")} | settings
    raw = isic_config(files.zip, files.path / "train_test_split.csv", **common)
    made = DataConfig(name="tfds:fed_isic2019", path=str(folder / "data"), **common)
    return load_federated(raw, seed), load_federated(made, seed)


def assert_equal(raw, made):
    assert made.label_names == raw.label_names and not made.synthetic
    assert [client.name for client in made.clients] == [client.name for client in raw.clients]
    for ours, theirs in zip(made.clients, raw.clients, strict=True):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(made.images[mine], raw.images[other])
            np.testing.assert_array_equal(made.labels[mine], raw.labels[other])


@pytest.mark.parametrize("split", ["official", "grouped"])
@pytest.mark.parametrize("settings", [{}, {"max_train": 5, "seed": 3}])
def test_a_prepared_set_gives_what_the_raw_files_give(files, split, settings):
    for _ in range(2):  # the second time from the cache
        assert_equal(*both(files, split=split, **settings))


@pytest.mark.slow
def test_a_run_on_a_prepared_set_is_the_run_on_the_raw_files(files, monkeypatch):
    use_tiny_networks(monkeypatch)
    folder, sums = files.path.parent, []
    for name, rest in [
        (
            "raw",
            f"{FLAGS} --config.data.path={files.zip} "
            f"--config.data.table={files.path / 'train_test_split.csv'}",
        ),
        (
            "prepared",
            f"--config.data.name=tfds:fed_isic2019 --config.data.path={folder / 'data'}",
        ),
    ]:
        workdir = folder / name
        settings = f"{rest} --config.data.split=official"
        own = f"--config.rounds=2 --config.roles.top_n=1 --config.data.cache_dir={folder / 'cache'}"
        public = "--config.algorithm.name=fedavg"
        assert train(workdir, f"{settings} {own} {public}") == 0
        summary = read(workdir / "summary.json")
        assert summary["synthetic"] is False
        losses = [row["loss"] for row in read(workdir / "metrics.jsonl")]
        sums.append(((workdir / "clients.csv").read_text(), losses))
    assert sums[0] == sums[1]


def test_what_cannot_be_read_is_one_line(files, tmp_path):
    def load(masks=False, **settings):
        return load_federated(DataConfig(**settings), 0, masks=masks)

    with pytest.raises(UserError, match="fed_isic2019 is not prepared in .*: fedhelp data prepare"):
        load(name="tfds:fed_isic2019", path=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="none of fedhelp data list; did you mean fed_isic2019"):
        load(name="tfds:fed_isic2018")
    data = str(files.path.parent / "data")
    with pytest.raises(UserError, match="fed_isic2019 has no masks to learn.*it has .*label"):
        load(name="tfds:fed_isic2019", path=data, masks=True)


def test_a_name_without_a_set_is_refused(capsys, tmp_path):
    code = fedhelp(f"train --config={CONFIG} --workdir={tmp_path} --config.data.name=tfds:")
    assert "it is tfds:NAME" in refusal(capsys, code)


def test_the_real_data(real, tmp_path):
    """Centres 1, 2, 3 and 5 of Fed-ISIC2019, from HAM10000."""
    (tmp_path / "download").mkdir()
    zip_, table = tmp_path / "download/images.zip", tmp_path / "download/train_test_split.csv"
    zip_.symlink_to(real / "ham10000_200x150.zip")
    table.symlink_to(real / "fed_isic2019_ham_split.csv")
    prepare("fed_isic2019", str(zip_.parent), str(tmp_path / "data"), say=lambda text: None)
    common = {"image_size": 32}
    raw = isic_config(zip_, table, **common)
    made = DataConfig(name="tfds:fed_isic2019", path=str(tmp_path / "data"), **common)
    assert_equal(load_federated(raw, 0), load_federated(made, 0))
