"""Builds a run from its settings: data, roles, teacher, models and method."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedhelp_jax import tasks
from fedhelp_jax.algorithms import ALGORITHMS, Algorithm, Given
from fedhelp_jax.algorithms.client import adam_l2, sgd_l2
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.memory import check_fits
from fedhelp_jax.data.federation import Federation, assign_roles, make_federation
from fedhelp_jax.data.sources import load_federated, load_public
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, of_federated, of_public
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.models.model import Model, with_compute_dtype, with_precision
from fedhelp_jax.models.registry import architecture
from fedhelp_jax.settings.schema import ModelConfig, ServerConfig
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.memory import fit
from fedhelp_jax.simulation.round import RoundProgram, make_program, public_spec
from fedhelp_jax.simulation.streaming import StreamedRounds
from fedhelp_jax.simulation.vectorize import Mapping, make_mapping
from fedhelp_jax.tasks import Task
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.teachers.resolve import own_answers, resolve_answers
from fedhelp_jax.transforms import harmonize

MOST_ROUNDS = 1000
# Pixel values beyond this are not normalised.
_LARGE = 100

_log = logging.getLogger(__name__)

_Data = TypeVar("_Data", FederatedDataset, PublicDataset)


class Loaded(NamedTuple):
    """A run's data, and what is derived from it."""

    task: Task
    dataset: FederatedDataset
    roles: tuple[str, ...]
    public: PublicDataset | None
    answers: Answers | None
    federation: Federation


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to start, with the information that its report needs.

    ``compile_s`` says how many seconds `fitted` and `compiled_ahead` took.
    """

    config: RunConfig
    task: Task
    dataset: FederatedDataset
    roles: tuple[str, ...]
    public: PublicDataset | None
    answers: Answers | None
    simulation: CompiledRounds
    compile_s: float = 0.0


def build_experiment(config: RunConfig) -> Experiment:
    """Loads the data and builds the run.

    Raises:
      UserError: If the data cannot be read or does not fit the settings.
    """
    max_device_bytes = config.mapping.max_device_bytes
    if max_device_bytes and ALGORITHMS[config.algorithm.name].pools_data:
        raise UserError(
            f"config.mapping.max_device_bytes = {max_device_bytes}, but {config.algorithm.name} "
            "needs all clients' data on the device at once: it must be 0"
        )
    loaded = load(config)
    # The process may have more CPU devices than the config asks for, if other code chose them.
    alone = jax.process_count() == 1 and jax.default_backend() == "cpu"
    mapping = make_mapping(config.mapping.chunk_size, config.mapping.cpu_devices if alone else None)
    phases = make_phases(config, loaded, mapping)
    if max_device_bytes:
        simulation = StreamedRounds(
            phases, loaded.federation, seed=config.seed, max_device_bytes=max_device_bytes
        )
    else:
        simulation = CompiledRounds(
            phases,
            loaded.federation,
            seed=config.seed,
            rounds_at_once=rounds_at_once(config),
        )
    return Experiment(config, *loaded[:5], simulation)


def fitted(experiment: Experiment, *, training: bool = True) -> Experiment:
    """Returns a run that fits in the memory of its devices, unless its chunk size is set.

    All processes must call it.

    Args:
      experiment: The run.
      training: Whether the run will be trained, or only evaluated.

    Raises:
      UserError: If it does not fit even with one client at a time.
    """
    if experiment.config.mapping.chunk_size is not None:
        return experiment
    return _timed(experiment, lambda: fit(experiment.simulation, training=training))


def compiled_ahead(
    experiment: Experiment,
    *,
    training: bool = True,
    told: Callable[[int, int], None] | None = None,
) -> Experiment:
    """Returns the run after compiling its programs beside each other.

    Several processes compile when they call a program, since each does so at its own pace.

    Args:
      experiment: The run.
      training: Whether the run will be trained, or only evaluated.
      told: Called with how many programs are compiled, and how many there are.
    """

    def compiled() -> CompiledRounds:
        if jax.process_count() == 1:
            experiment.simulation.compile_ahead(training=training, told=told)
        return experiment.simulation

    return _timed(experiment, compiled)


def _timed(experiment: Experiment, compiled: Callable[[], CompiledRounds]) -> Experiment:
    """Returns the run with the rounds of ``compiled``, and the time that this took added."""
    began = time.perf_counter()
    simulation = compiled()
    seconds = experiment.compile_s + time.perf_counter() - began
    return dataclasses.replace(experiment, simulation=simulation, compile_s=seconds)


def rounds_at_once(config: RunConfig) -> int:
    """Returns the most rounds that one dispatch computes; their reports share device memory."""
    return min(config.evaluate_every, config.checkpoint_every, config.rounds, MOST_ROUNDS)


def load(config: RunConfig) -> Loaded:
    """Loads the data that a run learns from.

    Raises:
      UserError: If the data cannot be read or does not fit the settings.
    """
    dataset, public, answers = load_sources(config)
    task = task_of(config, dataset)
    roles = assign_roles(dataset, top_n=config.roles.top_n, large=config.roles.large)
    logits = None if answers is None else answers.logits
    # With several processes, the data stays on the host, so a device gets only its own part.
    on_host = jax.process_count() > 1 or config.mapping.max_device_bytes > 0
    federation = make_federation(dataset, roles, public, logits, on_host=on_host)
    return Loaded(task, dataset, roles, public, answers, federation)


def load_sources(
    config: RunConfig,
) -> tuple[FederatedDataset, PublicDataset | None, Answers | None]:
    """Loads the data, and the public data and the teacher's answers if the method needs them.

    Raises:
      UserError: If they cannot be read or do not fit the settings.
    """
    method = ALGORITHMS[config.algorithm.name]
    with_public = method.uses_public and config.public.name != "none"
    dataset, public = load_data(config, with_public=with_public)
    if method.reads_answers:
        answers = own_answers(config.teacher, dataset)
        return dataset._replace(images=answers.logits), None, answers
    if public is None or not method.uses_teacher:
        return dataset, public, None
    answers = resolve_answers(config.teacher, public)
    if answers is None:
        if public.labels is None:
            raise UserError(f"teacher.name: {public.name} has no labels, so a teacher is needed")
    # A mask has the image's spatial axes; a label has none.
    elif answers.logits.ndim != dataset.labels.ndim + 1:
        needed = "one row of logits" if dataset.labels.ndim == 1 else "a map of logits"
        raise UserError(
            f"teacher: its answers about {public.name} are of shape "
            f"{list(answers.logits.shape[1:])} an image, but config.task = {config.task!r} needs "
            f"{needed}"
        )
    return dataset, public, answers


def make_phases(config: RunConfig, loaded: Loaded, mapping: Mapping) -> RoundProgram:
    """Returns the phases of a round: the method over the clients of the loaded data.

    Args:
      config: The settings; numbers that no shape depends on may be traced.
      loaded: The data.
      mapping: How clients are mapped to devices.

    Returns:
      The phases of a round.
    """
    dataset = loaded.dataset
    num_classes, sample_shape = len(dataset.label_names), dataset.images.shape[1:]
    batches = {"batch_size": config.batch_size}
    if loaded.public is not None:
        batches["public_batch_size"] = config.public_batch_size
    for key, size in batches.items():
        check_fits((size, *sample_shape), "float32", key, "the images of one step")
    algorithm = algorithm_of(config, num_classes)
    given = Given(
        task=loaded.task,
        num_classes=num_classes,
        sample_shape=sample_shape,
        batch_size=config.batch_size,
        public_batch_size=config.public_batch_size,
        local_epochs=config.local_epochs,
        public=public_spec(loaded.public, loaded.answers),
        augment=config.data.augment,
        rounds=config.rounds,
    )
    return make_program(
        algorithm,
        given,
        loaded.federation,
        mapping,
        participation_rate=config.participation_rate,
        client_weights=config.client_weights,
    )


def algorithm_of(config: RunConfig, num_classes: int) -> Algorithm:
    """Returns the method of a run, with its networks and optimizers."""
    assert config.learning_rate is not None, "not validated"
    optimizer = {"adam": adam_l2, "sgd": sgd_l2}[str(config.optimizer)]
    networks = {
        "small": (config.model.small, config.model.small_widths),
        "large": (config.model.large, config.model.large_widths),
    }

    def cosine(round: jax.Array) -> jax.Array:
        return 0.5 * (1 + jnp.cos(jnp.pi * (round.astype(float) / config.rounds)))

    return Algorithm(
        method=ALGORITHMS[config.algorithm.name],
        models={
            role: build_model(*network, config.model, num_classes)
            for role, network in networks.items()
        },
        settings=config.algorithm.settings,
        optimizer=functools.partial(optimizer, weight_decay=config.weight_decay),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=cosine if config.learning_rate_schedule == "cosine" else None,
        server_optimizer=_server_optimizer(config.server),
        interpolate=config.interpolate,
    )


def load_data(
    config: RunConfig, *, with_public: bool
) -> tuple[FederatedDataset, PublicDataset | None]:
    """Returns the private data and, if ``with_public``, the public data, both harmonised.

    ``data.harmonize`` names the steps of the harmonisation.

    Raises:
      UserError: If the data cannot be read or harmonised, or the images differ in shape or dtype.
    """
    names = config.data.harmonize
    dataset, public = read_data(config, with_public=with_public)
    dataset = harmonized(dataset, names)
    if "z_score" not in names and np.issubdtype(dataset.images.dtype, np.floating):
        low, high = float(dataset.images.min()), float(dataset.images.max())
        if max(abs(low), abs(high)) > _LARGE:
            _log.warning(
                "data %s holds values from %g to %g, which networks learn badly from: "
                "data.harmonize=('percentile_clip','z_score') would bring images to one scale",
                dataset.name,
                low,
                high,
            )
    if public is None:
        return dataset, None
    public = harmonized(public, names)
    if public.images.dtype != dataset.images.dtype:
        raise UserError(
            f"public.name: {public.name} holds {public.images.dtype} values, {dataset.name} "
            f"{dataset.images.dtype}; config.data.harmonize=z_score brings both to one scale"
        )
    return dataset, public


def read_data(
    config: RunConfig, *, with_public: bool
) -> tuple[FederatedDataset, PublicDataset | None]:
    """Returns what `load_data` returns, before harmonisation.

    Harmonisation could make different images equal, or equal images different.

    Raises:
      UserError: If the data cannot be read, or the images differ in shape.
    """
    masks = config.task == "segmentation"
    dataset = load_federated(config.data, config.seed, masks=masks)
    dataset = dataset._replace(content_sha256=of_federated(dataset))
    if not with_public:
        return dataset, None
    public = load_public(
        config.public,
        config.data.image_size,
        config.seed,
        masks=masks,
        volume_size=config.data.volume_size,
        cache_dir=config.data.cache_dir,
        skip_bad=config.data.on_bad_example == "skip",
    )
    if public.images.shape[1:] != dataset.images.shape[1:]:
        raise UserError(
            f"public.name: {public.name} holds images {list(public.images.shape[1:])}, but those "
            f"of {dataset.name} are {list(dataset.images.shape[1:])}; one network sees both"
        )
    return dataset, public._replace(content_sha256=of_public(public))


def harmonized(data: _Data, names: tuple[str, ...]) -> _Data:
    """Returns data with harmonised images; the steps are appended to the data's name.

    Raises:
      UserError: If the images do not fit a harmonisation step.
    """
    if not names:
        return data
    try:
        images = harmonize(data.images, names)
    except ValueError as error:
        raise UserError(f"config.data.harmonize: {data.name}: {error}") from None
    # The name records the steps wherever it appears, since answers may depend on them.
    return data._replace(name="_".join((data.name, *names)), images=images)


def task_of(config: RunConfig, dataset: FederatedDataset) -> Task:
    """Returns the task of a run; the data's classes name the masks."""
    if config.task == "segmentation":
        return tasks.segmentation(dataset.label_names)
    return tasks.classification


def build_model(name: str, widths: tuple[int, ...], config: ModelConfig, num_classes: int) -> Model:
    """Returns the network of that name; ``widths``, if any, replace a U-Net's default widths."""
    found = architecture(name, "model")
    given = {"widths": widths, "norm": config.norm, "remat": config.remat}
    model = found.build(num_classes, **{option: given[option] for option in found.options})
    # "float32" leaves the networks unchanged: they compute in the dtype of their parameters.
    if config.compute_dtype != "float32":
        model = with_compute_dtype(model, config.compute_dtype)
    return model if config.precision == "default" else with_precision(model, config.precision)


def _server_optimizer(config: ServerConfig) -> optax.GradientTransformation | None:
    """Returns an optax optimizer of Reddi et al., arXiv:2003.00295, or None for a plain mean."""
    if config.optimizer == "none":
        return None
    assert config.learning_rate is not None, "not validated"
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate, momentum=config.momentum)
    adaptive = {"adam": optax.adam, "yogi": optax.yogi}[config.optimizer]
    return adaptive(config.learning_rate, b1=config.momentum, b2=config.beta2, eps=config.eps)
