"""What every method must do: one set of tests for all entries of ``ALGORITHMS``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
    BATCH,
    CLASSES,
    PUBLIC,
    assert_trees_equal,
    build,
    differs,
    on_host,
    row,
    simulate,
    tiny_dataset,
    tiny_federation,
    tiny_model,
    tiny_public,
    tiny_setup,
)

from fedhelp_jax.algorithms import ALGORITHMS, client
from fedhelp_jax.algorithms.client import adam_l2
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.core.tree import num_bytes
from fedhelp_jax.data.federation import ClientData
from fedhelp_jax.experiments.checkpoint import Checkpointer
from fedhelp_jax.models.model import apply_model

ROUNDS, RESUMED = 4, 2
ONE_WIDTH = ("fedproto", "fedgh")  # their architectures share features, or a head
MEASURE = ("fedproto", "fedgh", "fedtype")
DEVICES = min(2, len(jax.devices()))

# Each method compiles for seconds, so that quick tests are of one only.
every_method = pytest.mark.parametrize(
    "name",
    [n if n == "fedhelp" else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS],
)


def make(name):
    """A method as a run would build it, over two devices where there are two."""
    uses_public = ALGORITHMS[name].uses_public
    setup = tiny_setup(tx=adam_l2(1e-3, 1e-4), public=PUBLIC if uses_public else None)
    if name in ONE_WIDTH:
        setup = setup._replace(models=dict.fromkeys(setup.models, tiny_model(CLASSES)))
    data = tiny_federation(public=tiny_public() if uses_public else None)
    return simulate(build(name, setup), data, num_devices=DEVICES)


class Batches:
    """Notes the private images of each batch of training, as they come."""

    def __init__(self):
        self.seen: set[tuple[int, ...]] = set()
        self._gather = client._gather

    def gather(self, data, order, start, batch_size):
        index = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
        batch = self._gather(data, order, start, batch_size)
        jax.debug.callback(self._note, index, batch.mask)
        return batch

    def _note(self, index, mask):
        self.seen.add(tuple(np.asarray(index)[np.asarray(mask)].tolist()))

    def of_the_round(self):
        jax.effects_barrier()
        seen, self.seen = self.seen - {()}, set()
        return seen


class Run:
    """Some rounds of a method with an evaluation after each, and all that can be told of them."""

    def __init__(self, name):
        jax.clear_caches()  # so that whatever is dispatched in the first round compiles in it
        self.simulation = simulation = make(name)
        self.calls, self.compiled, self.uploads = [], [], {}
        self.states, self.infos, self.results, self.batches = [], [], [], []
        batches = Batches()
        programs: Any = simulation  # not the types of JAX that it holds
        for phases, phase in ((programs._train, "train"), (programs._evaluate, "evaluate")):
            for role, program in list(phases.items()):
                phases[role] = self._counted(f"{phase} {role}", program)
        programs._aggregate = self._counted("aggregate", programs._aggregate)
        state = simulation.init()
        self.first = on_host(state)
        for round in range(ROUNDS):
            self.calls.append([])
            before = compile_totals().programs
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(client, "_gather", batches.gather)
                state, info = simulation.round(state, round)
                self.batches.append(batches.of_the_round())
            results = {split: simulation.evaluate(state, split) for split in ("validation", "test")}
            self.compiled.append(compile_totals().programs - before)
            self.states.append(on_host(state))
            self.infos.append(on_host(info))
            self.results.append(results)

    def _counted(self, what, program):
        def call(*arguments):
            self.calls[-1].append(what)
            result = program(*arguments)
            if what.startswith("train"):
                self.uploads[what.removeprefix("train ")] = on_host(result.upload)
            return result

        return call


@functools.cache
def run_of(name):
    compile_totals()
    return Run(name)


@every_method
def test_states_are_finite_and_change(name):
    run = run_of(name)
    for state in run.states:
        leaves = jax.tree.leaves(state)
        assert leaves
        assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert jax.tree.structure(run.states[-1]) == jax.tree.structure(run.first)
    parts = [(run.first.server, run.states[0].server)]
    parts += [(run.first.clients[role], run.states[0].clients[role]) for role in run.first.clients]
    for before, after in parts:  # local training has no server, centralized training no clients
        assert differs(after, before) or not jax.tree.leaves(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, m in ALGORITHMS.items() if not (m.pools_data or m.ignores("batch_size"))]
)
def test_clients_train_on_the_same_batches_whatever_the_method(name):
    trains = [split.train.tolist() for split in tiny_dataset().clients]
    for batches, others in zip(run_of(name).batches, run_of("local").batches, strict=True):
        assert len(others) == sum(-(-len(train) // BATCH) for train in trains)
        assert sorted(i for batch in others for i in batch) == sorted(sum(trains, []))
        assert batches >= others
        if name == "lp_ft":  # fine-tuning takes further passes
            continue
        # Class means and conformal sets take a further pass, which trains nothing.
        extra = [i for batch in batches - others for i in batch]
        assert len(set(extra)) == len(extra)
        assert not extra or name in MEASURE
    assert len({frozenset(batches) for batches in run_of(name).batches}) == ROUNDS


@every_method
def test_every_client_reports_its_loss(name):
    run = run_of(name)
    for info in run.infos:
        for group in run.simulation.groups:
            loss = info.info[group.role]["loss"]
            present = info.participants[group.role] < len(group.names)
            assert present.sum() == len(group.names)
            assert np.isfinite(loss).all()
            # Class means of all training images may answer each of them without any doubt.
            assert (loss[present] > 0).all() or (name == "fedncm" and (loss[present] >= 0).all())


@every_method
def test_what_is_deployed_are_the_models_with_the_headline_first(name):
    run, simulation = run_of(name), run_of(name).simulation
    state, headlines = run.states[-1], {}
    x = jnp.zeros((2, *tiny_setup().sample_shape))
    for group in simulation.groups:
        client = simulation.phases.algorithm.clients[group.role]
        download = simulation.phases.algorithm.download(state.server, group.role)
        pool, public = simulation.federation.pool, simulation.federation.public
        data = ClientData(pool, public, *row(group.train, 0))
        deployed = client.deploy(download, row(state.clients[group.role], 0), data)
        assert set(deployed) == set(client.models)
        for model_name, variables in deployed.items():
            logits, _ = apply_model(client.models[model_name], variables, x)
            assert logits.shape == (2, tiny_setup().num_classes)
        for results in run.results[-1].values():
            assert list(results[group.role]) == list(client.models)
        headlines[group.role] = next(iter(run.results[-1]["test"][group.role]))
    private = {"small": "personal", "large": "large"}
    expected = {
        **dict.fromkeys(("fedhelp", "fml", "fedmd", "fedproto", "fedgh", "fedkd"), private),
        **dict.fromkeys(("local", "fedtype", "pixel_probe", "foundation_probe"), private),
        **dict.fromkeys(("fedavg", "fedprox", "scaffold", "centralized", "feddf"), "global"),
        **dict.fromkeys(("federated_probe", "fedncm", "fedpft"), "global"),
        **dict.fromkeys(("fedbn", "ditto", "per_fedavg", "pfedme", "lp_ft"), "personal"),
    }[name]
    assert headlines == (
        dict.fromkeys(headlines, expected) if isinstance(expected, str) else expected
    )


@every_method
def test_nothing_compiles_after_the_first_round(name):
    assert run_of(name).compiled[1:] == [0] * (ROUNDS - 1)


@every_method
def test_a_round_is_one_dispatch_per_group_and_phase(name):
    """As many programs compile as are called, so nothing is dispatched besides them."""
    run = run_of(name)
    evaluated = ["evaluate large", "evaluate small"] * 2  # two splits, by one program
    for calls in run.calls:
        assert sorted(calls) == sorted(["aggregate", "train large", "train small", *evaluated])
    assert run.compiled[0] == len(set(run.calls[0]))


@every_method
def test_what_comes_to_the_host_is_a_row_of_scalars_per_client(name):
    simulation = make(name)
    state = simulation.state_shapes()
    for group in simulation.groups:
        slots = -(-len(group.names) // DEVICES) * DEVICES
        trained = simulation.train_shapes(group, state)
        federation = simulation.federation
        evaluated = simulation._evaluate[group.role].eval_shape(
            state.clients[group.role],
            state.server,
            federation,
            simulation.phases.everyone(group.role, federation, "validation"),
        )
        for leaf in jax.tree.leaves((trained.slot, trained.info, evaluated.metrics)):
            assert leaf.shape == (slots,) and leaf.dtype.itemsize == 4
        for model in run_of(name).results[0]["validation"][group.role].values():
            for values in model.values():
                assert isinstance(values, np.ndarray) and values.shape == (len(group.names),)


@every_method
def test_resumed_is_uninterrupted_bit_for_bit(name, tmp_path):
    """A checkpoint of the state is all that a run needs to go on with."""
    simulation = make(name)
    state = simulation.init()
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for round in range(ROUNDS):
        state, _ = simulation.round(state, round)
        if round == RESUMED - 1:
            checkpointer.save(RESUMED, state, {})
            checkpointer.close()
    whole = on_host(state)
    simulation = make(name)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    found = checkpointer.restore_latest(simulation.state_shapes())
    checkpointer.close()
    assert found is not None
    done, state, _ = found
    state = jax.device_put(state, simulation.mapping.replicated)
    for round in range(done, ROUNDS):
        state, _ = simulation.round(state, round)
    assert_trees_equal(on_host(state), whole)


@every_method
def test_only_what_a_method_shares_travels(name):
    """Bytes of one client a round; a round counter of 4 bytes may come with the broadcast."""
    simulation = make(name)
    models = tiny_setup().models
    variables = {
        role: jax.eval_shape(lambda role=role: models[role].init(jax.random.key(0), (8, 8, 3)))
        for role in models
    }
    w, params = num_bytes(variables["small"]), num_bytes(variables["small"]["params"])
    logits = 4 * PUBLIC.num_images * CLASSES
    prototypes = 4 * CLASSES * (4 + 1)  # means of four features, and counts
    head = num_bytes(variables["small"]["params"]["head"])
    linear = 4 * CLASSES * (8 * 8 * 3 + 1)
    expected = {
        **dict.fromkeys(
            ("fedavg", "lp_ft", "fedprox", "ditto", "per_fedavg", "pfedme", "fml", "fedtype"),
            {"small": (w, w)},
        ),
        "fedhelp": {"small": (w, w + 4)},
        "fedkd": {"small": (w, w + 8)},  # at most: it says itself what its factors come to
        "fedbn": {"small": (params, params)},  # its normalisation has statistics only
        "scaffold": {"small": (w + params, w + params)},  # the control variates come with it
        **dict.fromkeys(("local", "pixel_probe", "foundation_probe"), {"small": (0, 0)}),
        "federated_probe": {"small": (linear, linear)},
        "fedncm": {"small": (linear, linear)},  # means of pixels, and counts
        "fedpft": {"small": (2 * linear - 4 * CLASSES, linear)},  # and means of squares
        "fedmd": {"small": (logits, logits + 1)},  # and whether there are any
        "feddf": {role: (num_bytes(variables[role]),) * 2 for role in variables},
        "fedproto": {"small": (prototypes, prototypes)},
        "fedgh": {"small": (prototypes, head)},
        "centralized": {"small": (0, w), "large": (0, num_bytes(variables["large"]))},
    }[name]
    small = expected["small"]
    assert simulation.payload_bytes() == {"small": small, "large": expected.get("large", small)}


def serialised(tree):
    """Bytes of a tree's arrays in a file, without its header, whose length stands in front."""
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    content = safetensors.numpy.save(leaves)
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@every_method
def test_bytes_are_those_of_the_serialised_payloads(name):
    run = run_of(name)
    for role, (up, down) in make(name).payload_bytes().items():
        download = run.simulation.phases.algorithm.download(run.states[-1].server, role)
        assert (serialised(row(run.uploads[role], 0)), serialised(download)) == (up, down)


def test_local_can_train_the_small_model_everywhere():
    simulation = simulate(build("local", tiny_setup(), small_only=True), tiny_federation())
    states = simulation.state_shapes().clients
    models = {role: list(c.models) for role, c in simulation.phases.algorithm.clients.items()}
    assert models == {"small": ["personal"], "large": ["personal"]}
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], states)
    assert shapes["large"] == shapes["small"]
