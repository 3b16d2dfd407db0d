"""What a run is about to do, in lines of at most 80 columns, before its first round."""

import textwrap
from collections.abc import Iterator

import jax

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.experiments.experiment import Experiment
from fedhelp_jax.models.model import multiplied_in
from fedhelp_jax.report.console import amount, marked_synthetic

_WIDTH = 80
_INDENT = 10
_GLUE = "\0"


def plan_lines(experiment: Experiment, done: int) -> list[str]:
    """Returns the method, the data, the clients and their networks, and the devices.

    Args:
      experiment: The run.
      done: The number of rounds that are done.
    """
    config, dataset = experiment.config, experiment.dataset
    name = marked_synthetic(dataset.name, dataset.synthetic)
    after = f", from round {done + 1}" if done else ""
    rounds = f"{config.rounds} round{'s' if config.rounds > 1 else ''}"
    rows = [
        ("method", f"{config.algorithm.name}, {rounds}{after}, seed {config.seed}"),
        ("data", f"{name}: {_images(experiment)}"),
        ("clients", ", ".join(_clients(experiment))),
    ]
    if experiment.public is not None:
        public = marked_synthetic(experiment.public.name, experiment.public.synthetic)
        rows.append(("public", f"{len(experiment.public.images):,} images of {public}"))
    if experiment.answers is not None:
        rows.append(("teacher", str(experiment.answers.fingerprint)))
    mapping = experiment.simulation.mapping
    kind = mapping.mesh.devices.flat[0].device_kind
    devices = f"{mapping.num_devices} x {kind}"
    if mapping.chunk_size:
        plural = "s" if mapping.chunk_size > 1 else ""
        devices += f", {mapping.chunk_size} client{plural} of each at a time"
    model = config.model
    products = multiplied_in(model.compute_dtype, model.precision, mapping.platform)
    rows.append(("devices", f"{devices}, products in {products}"))
    return [line for head, text in rows for line in _wrapped(head, text)]


def payload_line(experiment: Experiment) -> str:
    """Returns the bytes that a client of each role exchanges in a round."""
    parts = [
        f"a {role} client sends {_whole(amount(up))} and receives {_whole(amount(down))}"
        for role, (up, down) in experiment.simulation.payload_bytes().items()
    ]
    return "\n".join(_wrapped("a round", ", ".join(parts)))


def _images(experiment: Experiment) -> str:
    counts = {
        split: sum(len(getattr(client, split)) for client in experiment.dataset.clients)
        for split in ("train", "validation", "test")
    }
    return ", ".join(f"{count:,} {split}" for split, count in counts.items()) + " images"


def _clients(experiment: Experiment) -> Iterator[str]:
    config, simulation = experiment.config, experiment.simulation
    shape = experiment.dataset.images.shape[1:]
    for group in simulation.groups:
        model = next(iter(simulation.phases.algorithm.clients[group.role].models.values()))
        variables = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), shape))
        size = _whole(amount(sum(x.size for x in jax.tree.leaves(variables["params"])), ""))
        one_network = ALGORITHMS[config.algorithm.name].ignores("model.large")
        network = config.model.small if one_network else getattr(config.model, group.role)
        yield f"{len(group.names)} {group.role} ({network}, {size}{_GLUE}parameters)"


def _whole(text: str) -> str:
    """Returns a text that no line break may divide; `_wrapped` gives it its spaces back."""
    return text.replace(" ", _GLUE)


def _wrapped(head: str, text: str) -> list[str]:
    lines = [line.replace(_GLUE, " ") for line in textwrap.wrap(text, _WIDTH - _INDENT)] or [""]
    return [f"{head if i == 0 else '':<{_INDENT}}{line}" for i, line in enumerate(lines)]
