"""How many small clients of FedHelp are vectorised at a time on a device with so much memory.

    python -m benchmarks.clients_at_once --clients=10000 --memory_gib=80

The programs are compiled for this machine's first device, but not run; the data is that of
`benchmarks.absent`. On CPU the plan of memory differs from that of a GPU, and only the procedure
can be seen.
"""

import logging

import jax
from absl import app, flags

from benchmarks.absent import config_of, loaded_for
from fedhelp_jax.core.memory import gib
from fedhelp_jax.experiments.experiment import make_phases
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.memory import fit, needs_of
from fedhelp_jax.simulation.vectorize import make_mapping

_CLIENTS = flags.DEFINE_integer("clients", 10_000, "clients")
_MEMORY = flags.DEFINE_float("memory_gib", 80, "memory of the pretended device")
_METHOD = flags.DEFINE_string("method", "fedhelp", "such as fedhelp, or fedhelp-cnn")


def show(rounds: CompiledRounds) -> None:
    """Prints what the programs need."""
    for need in needs_of(rounds):
        parts = f"{gib(need.fixed)} fixed, {gib(need.temporary)} temporary"
        print(f"{need.clients} at a time: {parts}", flush=True)


def main(_: list[str]) -> None:
    """Prints what the programs need with all clients at once, and with what is chosen."""
    logging.basicConfig(format="%(message)s")
    config = config_of(_METHOD.value)
    loaded = loaded_for(config, _CLIENTS.value, large=0)
    phases = make_phases(config, loaded, make_mapping(0, 1))
    rounds = CompiledRounds(phases, loaded.federation)
    show(rounds)
    chosen = fit(rounds, memory=int(_MEMORY.value * 2**30))
    if chosen is not rounds:
        show(chosen)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    app.run(main)
