"""`import fedhelp_jax.losses` is cheap and brings nothing else along, in a fresh process."""

import json
import subprocess
import sys

# All that the import adds to jax and optax counts, chex too.
PROBE = """
import json, sys, time
import jax, optax
start = time.perf_counter()
import fedhelp_jax.losses
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""
REPEATS = 5
BUDGET = 0.050  # seconds


def probe() -> dict:
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(result.stdout)


def test_losses_bring_nothing_else_of_ours_and_nothing_heavy():
    loaded = set(probe()["modules"])
    ours = {name for name in loaded if name.split(".")[0] == "fedhelp_jax"}
    assert {".".join(name.split(".")[:2]) for name in ours} == {"fedhelp_jax", "fedhelp_jax.losses"}
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {
        "tensorflow_datasets",
        "torch",
        "flax",
        "orbax",
        "ml_collections",
        "PIL",
        "rich",
    }


def test_losses_cost_little_over_jax_and_optax():
    # The least of a few: other processes on the machine can only make an import look slower.
    seconds = min(probe()["seconds"] for _ in range(REPEATS))
    print(f"import fedhelp_jax.losses: {1e3 * seconds:.0f} ms over jax and optax")
    assert seconds <= BUDGET
