"""``fedhelp teach``: asks the foundation model about each public image once."""

from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.compilation import jit
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import harmonized, read_data
from fedhelp_jax.metrics import classification_metrics
from fedhelp_jax.report.teaching import AskingProgress, print_agreement, print_plan, print_stored
from fedhelp_jax.settings.schema import FoundationConfig, TeacherConfig
from fedhelp_jax.tasks import segmentation
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.teachers.base import (
    FoundationModel,
    Images,
    PublicImages,
    clear_public,
    own_images,
)
from fedhelp_jax.teachers.heads import linear_probe_logits
from fedhelp_jax.teachers.query import Plan, QueryLimits, execute, make_plan
from fedhelp_jax.teachers.resolve import (
    foundation_model,
    is_asked,
    members,
    model_at_the_client,
    open_store,
    resolve_answers,
)
from fedhelp_jax.typing import JsonObject

# Limits that show within seconds whether a teacher is useful.
_MOST_PROBED = 1000  # images
_PROBE_ITERATIONS = 30


def teach(config: RunConfig, *, dry_run: bool = False, done: set[Any] | None = None) -> JsonObject:
    """Stores the teacher's answers about all public images, and reports how good they are.

    Every public image is first compared with all private images; nothing is sent if any is equal.
    For a method that reads the answers about the clients' own images, the model, which must run
    here, is asked about those instead.

    Args:
      config: The settings of the run that will train on the answers.
      dry_run: Whether to only print what would be asked.
      done: What earlier calls have asked which model about. It is not asked again, and this call is
        added.

    Returns:
      The result of `agreement`; empty for a dry run, or if this was done before.

    Raises:
      UserError: If a client has a public image, a budget is too small, or a model does not answer.
    """
    if ALGORITHMS[config.algorithm.name].reads_answers:
        return _teach_own(config, dry_run, done)
    if config.public.name == "none" or config.teacher.name == "none":
        raise UserError(
            "teach needs public images and a teacher: config.public.name and config.teacher.name "
            "must not be none"
        )
    private, public = read_data(config, with_public=True)
    assert public is not None
    images = clear_public(public, private)
    if _is_done(config, images, done):
        return {}
    public = harmonized(public, config.data.harmonize)
    _check_same_classes(config.teacher, public)
    for member in members(config.teacher):
        if is_asked(member):
            _ask_one(member, public, images, dry_run)
        else:
            print_stored(member.name)
    if dry_run:
        return {}
    answers = resolve_answers(config.teacher, public)
    assert answers is not None
    found = agreement(answers, public)
    print_agreement(answers.fingerprint, public.name, found)
    return found


def _teach_own(config: RunConfig, dry_run: bool, done: set[Any] | None) -> JsonObject:
    """Stores the answers about the clients' own images, of a model that runs here."""
    model = model_at_the_client(config.teacher)
    private, _ = read_data(config, with_public=False)
    images = own_images(private)
    if not _is_done(config, images, done):
        _ask(config.teacher, model, images, len(private.images), dry_run)
    return {}


def _is_done(config: RunConfig, images: Images, done: set[Any] | None) -> bool:
    """Returns whether `done` holds these images with this model, and adds them."""
    if done is None:
        return False
    key = (config.public.name, config.teacher, images.sha256)
    known = key in done
    done.add(key)
    return known


def agreement(answers: Answers, public: PublicDataset) -> JsonObject:
    """Measures how well answers agree with the public labels, to spot a bad teacher early.

    If the teacher's classes are the public ones, the top-1 accuracy, calibration error (15 bins)
    and cross-entropy of the answers themselves are measured. Otherwise, the same metrics of a
    cross-fitted linear probe on the answers (`linear_probe_logits`, 30 iterations, at most 1,000
    images) show how much the answers reveal about the labels. ``chance`` is the share of the most
    frequent label.

    Returns:
      ``images``, ``classes``, ``look_like_probabilities``; with public labels also ``probed``,
      ``chance``, ``top_1``, ``ece`` and ``loss``, or ``note`` if they cannot be measured. For masks
      with the same classes, ``dice`` instead.
    """
    found: JsonObject = {
        "images": len(public.sha256),
        "classes": answers.logits.shape[-1],
        "look_like_probabilities": bool(
            answers.logits.min() >= 0
            and np.allclose(answers.logits.sum(axis=-1), 1, atol=0.02)
            and answers.logits.shape[-1] > 1
        ),
    }
    if public.labels is None or public.label_names is None:
        return found | {"note": f"{public.name} has no labels to compare with"}
    if answers.logits.ndim != public.labels.ndim + 1:
        return found | {"note": "masks are not compared with labels of whole images"}
    if public.labels.ndim > 1:
        return found | _mask_agreement(answers, public.labels, public.label_names)
    logits, labels, sha256 = answers.logits, public.labels, public.sha256
    probed = answers.label_names != public.label_names
    if probed:
        # Images are chosen by hash, since a file may be sorted by class.
        some = np.argsort(sha256)[:_MOST_PROBED]
        labels, sha256 = labels[some], tuple(sha256[row] for row in some)
        try:
            logits = linear_probe_logits(
                logits[some],
                labels,
                len(public.label_names),
                sha256,
                max_iterations=_PROBE_ITERATIONS,
            )
        except ValueError as error:
            return found | {"note": str(error)}
    metrics = jit(classification_metrics)(
        jnp.asarray(logits), jnp.asarray(labels), jnp.ones(len(labels), bool)
    )
    return found | {
        "probed": probed,
        "chance": float(np.bincount(labels).max() / len(labels)),
        "top_1": float(metrics["accuracy"]),
        "ece": float(metrics["ece"]),
        "loss": float(metrics["loss"]),
    }


def _mask_agreement(
    answers: Answers, masks: np.ndarray, label_names: tuple[str, ...]
) -> JsonObject:
    if answers.label_names != label_names:
        return {"note": "its masks are of other classes than the public ones"}
    metrics = jit(segmentation(label_names).metrics)
    found = metrics(jnp.asarray(answers.logits), jnp.asarray(masks), jnp.ones(len(masks), bool))
    return {"dice": float(found["dice"])}


def _ask_one(
    config: FoundationConfig, public: PublicDataset, images: PublicImages, dry_run: bool
) -> None:
    _ask(config, foundation_model(config, public), images, len(public.sha256), dry_run)


def _ask(
    config: FoundationConfig,
    model: FoundationModel,
    images: Images,
    count: int,
    dry_run: bool,
) -> None:
    """Asks a model about the images that have no stored answer; ``count`` includes equal ones."""
    if find_spec("tenacity") is None or find_spec("filelock") is None:
        raise UserError("fedhelp teach needs pip install 'fedhelp_jax[teach]'")
    pace = QueryLimits(**{field: getattr(config, field) for field in QueryLimits._fields})
    try:
        with open_store(config, model, write=False) as store:
            plan = make_plan(model, images, store, pace)
        print_plan(model.fingerprint, config, plan, count)
        if plan.batches:
            _check_budget(plan, pace)
            model.open()
        if dry_run:
            return
        if plan.batches:
            with open_store(config, model, write=True) as store:
                with store.exclusive_lock(lambda: AskingProgress.note_waiting(config.store)):
                    # Plan again, since another process may have asked in the meantime.
                    plan = make_plan(model, images, store, pace)
                    _check_budget(plan, pace)
                    with AskingProgress(plan.to_ask) as progress:
                        execute(plan, model, images, store, pace, progress.advance)
    finally:
        model.close()
    with open_store(config, model, write=False) as store:
        lost = list(store.truncation_kl(images.sha256).values())
        print_stored(config.name, config.store, store.sent, float(np.mean(lost)))


def _check_same_classes(config: TeacherConfig, public: PublicDataset) -> None:
    """Refuses, before asking, an ensemble whose answers could not be averaged."""
    asked = [m for m in members(config) if is_asked(m) and m.head is None]
    if len(asked) < 2:
        return
    spaces = [foundation_model(member, public).fingerprint.label_names for member in asked]
    if len(set(spaces)) > 1:
        raise UserError(
            "teacher.members: an ensemble needs the same classes in the same order; "
            f"{asked[0].name} has {len(spaces[0])}, others have other ones. Nothing was asked"
        )


def _check_budget(plan: Plan, pace: QueryLimits) -> None:
    limit = pace.max_queries
    if limit is not None and plan.sent_before + plan.to_ask > limit:
        raise UserError(
            f"teacher.max_queries = {limit} does not suffice: {plan.to_ask} images are to be asked "
            f"and {plan.sent_before} were sent before; nothing was sent. Raise it, or lower "
            "public.num_examples"
        )
