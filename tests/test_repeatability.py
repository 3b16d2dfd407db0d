"""The same state gives the same bits, on any number of devices and beside other work.

A few programs by default. With ``-m thorough``, which takes about an hour on two cores, 50
evaluations and 20 rounds of every network, batch size and number of devices, and every method.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repeat_worker import DEFAULTS

from fedhelp_jax.algorithms import ALGORITHMS

TESTS = Path(__file__).parent
RACE = TESTS.parent / "docs" / "xla_race.py"
DEVICES = (1, 2, 4)
CORES = os.cpu_count() or 1
# Wide products on purpose: how wide one must be to go wrong depends on the processor's caches.
WIDE = {"test": 128, "eval_batch": 128}
UNET = {"network": "unet_small_cpu", "task": "segmentation"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user would, without the flags that tests set for XLA."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def repeat(**options: Any) -> dict[str, Any]:
    """What the worker finds."""
    done = python(str(TESTS / "repeat_worker.py"), json.dumps(options))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found, "nothing is repeated"
    return found


def assert_repeats(**options: Any) -> None:
    """Every phase has one outcome; loops in Python agree where they are asked for."""
    for name, value in repeat(**options).items():
        if name.endswith("_error"):
            assert value <= 1e-10, (name, value)
        else:
            assert value == 1, (name, value)


@pytest.mark.slow
def test_the_small_program_of_the_report_is_right_with_the_option():
    done = python(str(RACE), "--safe")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrong 0 of 10") == 3


@pytest.mark.slow
def test_evaluation_repeats():
    assert_repeats(**WIDE, evaluations=4)


@pytest.mark.slow
def test_training_repeats():
    assert_repeats(batch=64, train=64, test=8, rounds=2)


@pytest.mark.slow
def test_phases_equal_loops_in_python():
    assert_repeats(direct=True, float64=True, clients=2, train=12, test=24, busy="none")


# --- thorough ---

thorough = pytest.mark.thorough


@thorough
@pytest.mark.parametrize(
    "options",
    [
        {**WIDE, "evaluations": 6},
        {"batch": 64, "rounds": 3, "network": "resnet32", "test": 8},
        {
            **UNET,
            "evaluations": 2,
            "rounds": 2,
            "predictions": 2,
            "streams": 2,
            "train": 8,
            "test": 24,
        },
    ],
    ids=["evaluation", "training", "segmentation"],
)
def test_phases_repeat_beside_other_work(options):
    assert_repeats(**options, loops=CORES)


def everywhere(devices: int) -> dict[str, int]:
    """Clients on every device, and a busy loop on every core."""
    return {"clients": max(4, 2 * devices), "devices": devices, "loops": CORES}


NETWORKS = {
    "resnet20": {"network": "resnet20"},
    "resnet32": {"network": "resnet32"},
    "unet": UNET,
}


@thorough
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_fifty_evaluations_repeat(name, devices):
    own = everywhere(devices)
    more = {"predictions": 5, "streams": 3} if name == "unet" else {"streams": 3}
    assert_repeats(evaluations=50, train=16, test=64, **own, **more, **NETWORKS[name])


@thorough
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("batch", [4, 16, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_rounds_repeat(name, batch, devices):
    own = everywhere(devices)
    assert_repeats(rounds=20, batch=batch, train=max(16, batch), test=8, **own, **NETWORKS[name])


@thorough
@pytest.mark.parametrize("devices", DEVICES)
def test_a_very_deep_network_repeats(devices):
    own = everywhere(devices)
    assert_repeats(network="resnet110", evaluations=50, rounds=1, train=16, test=16, **own)
    assert_repeats(network="resnet110", rounds=2, batch=64, train=64, test=8, **own)


@thorough
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_repeats(name):
    assert_repeats(method=name, evaluations=5, rounds=5, batch=16, train=32, test=64, loops=CORES)


@thorough
def test_a_sweep_repeats():
    done = python(str(TESTS / "repeat_sweep.py"), "5")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sweeps": 1, "runs": 4}


@thorough
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_equals_loops_in_python(name, devices):
    own = everywhere(devices) | {"clients": 4, "direct": True, "float64": True}
    assert_repeats(train=64, test=64, batch=64, **own, **NETWORKS[name])


@thorough
def test_without_the_option_outcomes_differ():
    """Holds for jaxlib before 0.12; of later ones none has been seen to go wrong."""
    found = repeat(**WIDE, evaluations=6, safe=False, busy=DEFAULTS["busy"])
    assert found["evaluations"] > 1
