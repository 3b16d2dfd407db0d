"""The package as Python users meet it: `fh.Simulation`, data and teachers out of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refusal

import fedhelp_jax as fh
from fedhelp_jax.experiments.experiment import build_experiment


@pytest.fixture(scope="module")
def data():
    return fh.data.load("phantoms", num_examples=120, image_size=8)


@pytest.fixture(scope="module")
def public():
    return fh.data.load_public("phantoms", num_examples=12, image_size=8)


def network(num_classes):
    return fh.models.cnn((4, 8), num_classes)


def test_the_package_completes_its_names():
    assert {"losses", "Simulation", "run", "load_run", "algorithms", "data"} <= set(dir(fh))
    assert all(hasattr(fh, name) for name in dir(fh))
    with pytest.raises(AttributeError):
        fh.nothing_of_that_name  # noqa: B018


@pytest.mark.slow
def test_a_simulation_is_what_a_config_runs():
    """To the bit: the same data, networks, optimizer and key."""
    config = fh.default_config()
    config.batch_size = config.public_batch_size = 16
    config.data.num_examples, config.data.image_size, config.public.num_examples = 120, 8, 12
    config.model.small, config.model.large, config.seed = "cnn_small", "cnn_large", 3
    from fedhelp_jax.experiments.config import validate

    settings = validate(config)
    compiled = build_experiment(settings).simulation
    theirs = compiled.init()
    for number in range(2):
        theirs, _ = compiled.round(theirs, number)

    data = fh.data.load("phantoms", seed=3, num_examples=120, image_size=8)
    public = fh.data.load_public("phantoms", seed=3, num_examples=12, image_size=8)
    algorithm = fh.algorithms.fedhelp(
        small=fh.models.cnn((8, 32), data.num_classes),
        large=fh.models.cnn((32, 32), data.num_classes),
        weight_decay=settings.weight_decay,
    )
    teacher = fh.teachers.simulated(public, accuracy=settings.teacher.accuracy)
    sim = fh.Simulation(algorithm, data, public=public, teacher=teacher, batch_size=16)
    state = sim.init(jax.random.key(3))
    for _ in range(2):
        state, _ = sim.step(state)
    assert state.round == 2
    for ours, other in zip(jax.tree.leaves(state.run), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(other))


@pytest.mark.slow
def test_a_state_can_be_kept(data):
    sim = fh.Simulation(
        fh.algorithms.fedavg(small=network(data.num_classes)), data, batch_size=16, donate=False
    )
    first = sim.init(jax.random.key(0))
    one, _ = sim.step(first)
    two, _ = sim.step(first)
    assert first.round == 0 and one.round == two.round == 1
    for a, b in zip(jax.tree.leaves(one.run), jax.tree.leaves(two.run), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert set(sim.clients(first)) == {client.name for client in data.clients}


@pytest.mark.slow
def test_a_learning_rate_may_be_a_schedule_over_rounds(data):
    """A rate of 0 in the second round leaves the server's parameters as they are."""
    algorithm = fh.algorithms.fedavg(
        small=network(data.num_classes),
        optimizer=optax.sgd,
        learning_rate=lambda round: jnp.where(round == 0, 0.1, 0.0),
    )
    sim = fh.Simulation(algorithm, data, batch_size=16, donate=False)
    states = [sim.init(jax.random.key(0))]
    for _ in range(2):
        states.append(sim.step(states[-1])[0])
    params = [jax.tree.leaves(s.run.server.variables["params"]) for s in states]
    assert any(not np.array_equal(a, b) for a, b in zip(params[0], params[1], strict=True))
    for a, b in zip(params[1], params[2], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_a_loss_of_ones_own_is_the_one_that_is_trained_on(data):
    def nothing(logits, labels, *, where=None):
        del labels, where
        return 0.0 * logits.sum(axis=-1)

    task = fh.tasks.classification._replace(loss=nothing)
    algorithm = fh.algorithms.fedavg(small=network(data.num_classes), optimizer=optax.sgd(1.0))
    sim = fh.Simulation(algorithm, data, task=task, batch_size=16, donate=False)
    first = sim.init(jax.random.key(0))
    second, info = sim.step(first)
    assert float(np.max(info.info["small"]["loss"])) == 0.0
    for a, b in zip(
        jax.tree.leaves(first.run.server.variables["params"]),
        jax.tree.leaves(second.run.server.variables["params"]),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_what_does_not_go_together_is_named(data, public):
    small = network(data.num_classes)
    make = fh.algorithms
    for call, words in (
        (
            lambda: make.fedprox(small=small, mue=1.0),
            "fedprox.mue is not a setting; did you mean mu",
        ),
        (lambda: make.fedprox(small=small, mu=-1.0), "fedprox.mu = -1.0 must be at least 0"),
        (lambda: make.scaffold(small=small, optimizer=optax.adam(1.0)), "takes plain SGD"),
        (
            lambda: make.fedavg(small=small, optimizer=optax.adam(1.0), weight_decay=0.1),
            "weight_decay is for optimizer=None",
        ),
        (
            lambda: make.fedavg(small=small, optimizer=optax.adam(1.0), learning_rate=0.1),
            "learning_rate is in the optimizer already",
        ),
        (
            lambda: fh.Simulation(make.fedmd(small=small), data),
            "fedmd learns from public images: give public=...",
        ),
        (
            lambda: fh.Simulation(
                make.fedhelp(small=small), data, teacher=fh.teachers.simulated(public)
            ),
            "give public=...",
        ),
        (lambda: fh.Simulation(make.fedavg(small=small), data, large=["nowhere"]), "no client"),
    ):
        assert words in refusal(call), words


# --- arrays -------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(60) % 4
CLIENTS = np.array(["b", "a", "c"])[np.arange(60) % 3]


def test_examples_go_to_whom_they_are_said_to_belong():
    data = fh.data.from_arrays(IMAGES, LABELS, clients=CLIENTS, label_names=list("wxyz"))
    assert [client.name for client in data.clients] == ["a", "b", "c"]
    for client in data.clients:
        assert set(CLIENTS[np.concatenate(client[1:])]) == {client.name}
        assert len(client.test) == 5 and len(client.validation) == 1
    assert (data.num_classes, data.synthetic) == (4, False)


def test_a_split_is_taken_as_it_is():
    split = np.array(["train", "test", "validation", "train"])[np.arange(60) % 4]
    data = fh.data.from_arrays(IMAGES, LABELS, clients=CLIENTS, split=split)
    for client in data.clients:
        for side in ("train", "validation", "test"):
            assert set(split[getattr(client, side)]) == {side}


def test_patients_stay_on_one_side_and_partitions_share_out():
    patients = np.arange(60) // 3
    data = fh.data.from_arrays(IMAGES, LABELS, clients=patients % 2, groups=patients)
    for client in data.clients:
        sides = [set(patients[members]) for members in client[1:]]
        assert not sides[0] & sides[1] and not (sides[0] | sides[1]) & sides[2]
    how = fh.data.Sharing("dirichlet", num_clients=3, dirichlet_alpha=5.0)
    assert len(fh.data.from_arrays(IMAGES, LABELS, partition=how).clients) == 3


def test_grey_images_floats_and_masks():
    grey = fh.data.from_arrays(IMAGES[..., 0], LABELS, clients=CLIENTS)
    np.testing.assert_array_equal(grey.images, np.repeat(IMAGES[..., :1], 3, axis=-1))
    floats = fh.data.from_arrays(IMAGES.astype(float), LABELS, clients=CLIENTS)
    assert floats.images.dtype == np.float32
    masks = RNG.integers(0, 2, (60, 6, 6))
    data = fh.data.from_arrays(IMAGES, masks, clients=CLIENTS)
    assert data.label_names == ("foreground",) and data.labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("images", "labels", "options", "words"),
    [
        (IMAGES, LABELS[:-1], {}, "labels has 59 entries, but there are 60 images"),
        (IMAGES, LABELS, {"clients": ["a"]}, "clients has 1 entries"),
        (IMAGES, LABELS + 0.5, {}, "labels must be integers"),
        (IMAGES.astype(int), LABELS, {}, "must be uint8 pixels or floats"),
        (IMAGES[0, 0], LABELS, {}, "must be [N, H, W, C]"),
        (IMAGES * np.nan, LABELS, {}, "must be finite"),
        (IMAGES, LABELS, {"clients": CLIENTS, "split": ["dev"] * 60}, "split has 'dev'"),
        (IMAGES, LABELS, {"clients": CLIENTS, "split": ["train"] * 60}, "no test example"),
        (IMAGES, LABELS, {"clients": CLIENTS, "label_names": ["a"]}, "not in 0..0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(images, labels, options, words):
    assert words in refusal(lambda: fh.data.from_arrays(images, labels, **options))


def test_answers_out_of_an_array(public):
    logits = np.zeros((len(public.images), 3))
    answers = fh.teachers.from_logits(public, logits, label_names="abc", name="zeros")
    np.testing.assert_array_equal(answers.about(public), logits)
    assert "12 public images and 2 label names" in refusal(
        lambda: fh.teachers.from_logits(public, logits, label_names="ab", name="zeros")
    )
    assert "finite" in refusal(
        lambda: fh.teachers.from_logits(public, logits + np.inf, label_names="abc", name="x")
    )
