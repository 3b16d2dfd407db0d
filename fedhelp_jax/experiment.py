"""From settings to what runs: data, roles, teacher, models and method put together."""

import dataclasses

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.algorithms.base import PublicSpec, Setup
from fedhelp_jax.client import adam_l2
from fedhelp_jax.config import RunConfig
from fedhelp_jax.data.load import load_federated, load_public
from fedhelp_jax.data.types import FederatedDataset, PublicDataset
from fedhelp_jax.errors import UserError
from fedhelp_jax.federation import assign_roles, make_federation
from fedhelp_jax.mapping import make_mapping
from fedhelp_jax.models.resnet import RESNET_DEPTHS, resnet
from fedhelp_jax.simulation import Simulation
from fedhelp_jax.task import Task, classification
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.teachers.resolve import resolve_answers


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run ready to start, and what its report says of it."""

    config: RunConfig
    task: Task
    dataset: FederatedDataset
    roles: tuple[str, ...]
    public: PublicDataset | None
    answers: Answers | None
    simulation: Simulation


def build_experiment(config: RunConfig) -> Experiment:
    """Loads the data and puts the run together.

    Raises:
      UserError: If the data cannot be read or do not fit the settings.
    """
    method = ALGORITHMS[config.algorithm.name]
    task = classification
    dataset = load_federated(config.data, config.seed)
    roles = assign_roles(dataset, top_n=config.roles.top_n, large=config.roles.large)
    public, answers, logits = None, None, None
    if method.uses_public and config.public.name != "none":
        public = load_public(config.public, config.data.image_size, config.seed)
        answers = resolve_answers(config.teacher, public)
        logits = None if answers is None else answers.logits
        if logits is not None and logits.ndim != 2:
            raise UserError(
                f"teacher: its answers about {public.name} are masks {list(logits.shape[1:])}, but "
                f"{task.name} needs one row of logits for each image"
            )
        if logits is None and public.labels is None:
            raise UserError(f"teacher.name: {public.name} has no labels, so a teacher is needed")
    num_classes = len(dataset.label_names)
    setup = Setup(
        task=task,
        num_classes=num_classes,
        sample_shape=dataset.images.shape[1:],
        models={
            "small": resnet(RESNET_DEPTHS[config.model.small], num_classes),
            "large": resnet(RESNET_DEPTHS[config.model.large], num_classes),
        },
        tx=adam_l2(config.learning_rate, config.weight_decay),
        batch_size=config.batch_size,
        public_batch_size=config.public_batch_size,
        local_epochs=config.local_epochs,
        public=None if public is None else _public_spec(public, answers),
    )
    simulation = Simulation(
        method.build(setup, config.algorithm.settings),
        make_federation(dataset, roles, public, logits),
        task,
        make_mapping(config.mapping.chunk_size),
        seed=config.seed,
        participation=config.participation,
        client_weights=config.client_weights,
    )
    return Experiment(config, task, dataset, roles, public, answers, simulation)


def _public_spec(public: PublicDataset, answers: Answers | None) -> PublicSpec:
    labels = None if public.label_names is None else len(public.label_names)
    return PublicSpec(
        num_labels=labels,
        num_answers=None if answers is None else len(answers.label_names),
        shared=answers is not None
        and labels is not None
        and answers.label_names == public.label_names,
    )
