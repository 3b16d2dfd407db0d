"""`config.tracking`: what a tool gets, and that a tool that fails stops nothing."""

import logging

import pytest
import tiny_config
from helpers import refusal

import fedhelp_jax as fh
from fedhelp_jax.experiments import tracking

ROW = {
    "round": 3,
    "loss": 0.5,
    "train": {"small": {"loss": 0.25}},
    "metric": "dice",
    "worst_small": None,
    "clients": {"small": [0.1, 0.2]},
}
VALUES = {"loss": 0.5, "train/small/loss": 0.25}


class Fake:
    """A tool that fails when it is asked to."""

    def __init__(self, *fails):
        self.fails, self.calls = fails, []

    def open(self, workdir, settings):
        self._call("open", settings["algorithm.name"])
        return tracking._Tool(
            lambda values, round: self._call("log", (values, round)), lambda: self._call("close")
        )

    def _call(self, what, value=None):
        self.calls.append((what, value))
        if what in self.fails:
            raise OSError(f"{what} failed")


def run_with(monkeypatch, tmp_path, *fakes):
    names = [f"tool{i}" for i in range(len(fakes))]
    tools = {name: ("json", fake.open) for name, fake in zip(names, fakes, strict=True)}
    monkeypatch.setattr(tracking, "TOOLS", tools)
    with tracking.Tracking(names, tmp_path, {"algorithm.name": "fedhelp"}) as tracked:
        tracked.log(ROW)
        tracked.log(ROW)


def test_a_tool_gets_the_numbers_of_every_round(monkeypatch, tmp_path):
    fake = Fake()
    run_with(monkeypatch, tmp_path, fake)
    logged = ("log", (VALUES, 3))
    assert fake.calls == [("open", "fedhelp"), logged, logged, ("close", None)]


@pytest.mark.parametrize("what", ["open", "log", "close"])
def test_a_tool_that_fails_is_left_out_and_the_other_goes_on(monkeypatch, tmp_path, caplog, what):
    failing, whole = Fake(what), Fake()
    with caplog.at_level(logging.WARNING):
        run_with(monkeypatch, tmp_path, failing, whole)
    assert caplog.text.count(f"tool0: OSError: {what} failed") == 1
    assert [call for call, _ in failing.calls].count(what) == 1
    assert [call for call, _ in whole.calls] == ["open", "log", "log", "close"]


def test_a_tool_that_is_not_installed_is_refused_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "TOOLS", {"wandb": ("no_such_package", Fake().open)})
    message = refusal(lambda: tracking.Tracking(("wandb",), tmp_path, {}))
    assert "config.tracking" in message and "fedhelp_jax[wandb]" in message


@pytest.mark.parametrize("name", tracking.TOOLS)
def test_the_tools_themselves(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it looks when it is imported
    pytest.importorskip(tracking.TOOLS[name][0], reason=f"{name} is not installed")
    with tracking.Tracking((name,), tmp_path, {"algorithm.name": "fedhelp"}) as tracked:
        tracked.log(ROW)
        assert name in tracked._tools  # it has not failed
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_run_is_tracked(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(tracking, "TOOLS", {"tensorboard": ("json", fake.open)})
    config = tiny_config.get_config()
    config.model.small = config.model.large = "cnn_small"
    config.rounds, config.tracking = 2, ("tensorboard",)
    result = fh.run(config, tmp_path / "run")
    _, first, second, _ = fake.calls
    assert [call for call, _ in fake.calls] == ["open", "log", "log", "close"]
    assert (first[1][1], second[1][1]) == (1, 2)
    assert first[1][0]["loss"] == result.history["loss"][0]
    assert second[1][0]["small_mean"] == result.history["small_mean"][1]
