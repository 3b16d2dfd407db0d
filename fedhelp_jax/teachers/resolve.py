"""Turns settings into a foundation model, or into its answers, which are all training needs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.registry import Registry
from fedhelp_jax.data.readers.npz import read_npz
from fedhelp_jax.data.types import FederatedDataset, PublicDataset, content_sha256
from fedhelp_jax.settings.schema import FoundationConfig, TeacherConfig
from fedhelp_jax.teachers.answers import Answers, join_answers, load_answers, log_probabilities
from fedhelp_jax.teachers.backends.hf_zero_shot import HuggingFaceZeroShot
from fedhelp_jax.teachers.backends.litert import LiteRTModel
from fedhelp_jax.teachers.backends.onnx import OnnxModel
from fedhelp_jax.teachers.backends.open_inference import OpenInferenceModel
from fedhelp_jax.teachers.backends.self_trained import SelfTrained
from fedhelp_jax.teachers.backends.simulated import simulated
from fedhelp_jax.teachers.base import FoundationModel, own_sha256
from fedhelp_jax.teachers.heads import class_vector_logits, linear_probe_logits
from fedhelp_jax.teachers.http import Transport
from fedhelp_jax.teachers.preprocessing import Preprocessing
from fedhelp_jax.teachers.store import AnswerStore, Precision


class AnswersMissing(UserError):
    """Answers are missing from the store; ``fedhelp teach`` would get them."""


def members(config: TeacherConfig) -> tuple[FoundationConfig, ...]:
    """Returns the foundation models of a teacher: the ensemble's members, or the teacher itself."""
    return config.members if config.name == "ensemble" else (config,)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A registered kind of teacher: a foundation model or a stand-in for one.

    Attributes:
      make: A function of ``(config, public)``, where ``config`` holds the settings of ``teacher``
        and ``public`` is None for a model that answers about the clients' own images.
        If the teacher is asked, it returns the `FoundationModel` that ``fedhelp teach`` asks;
        otherwise it returns `Answers`, or None for no teacher.
      about: A one-line description.
      asked: Whether ``fedhelp teach`` asks it and stores its answers, rather than ``make``
        returning them directly.
      at_the_client: Whether it runs where the images are, so that it may see private ones too.
    """

    make: Callable[[FoundationConfig, Any], Any]
    about: str
    asked: bool = False
    at_the_client: bool = False


def teacher(name: str, key: str = "config.teacher.name") -> Teacher:
    """Returns the teacher named ``name``, as given by the setting ``key``.

    A user's own function ``(config, public) -> Answers`` is a teacher that is not asked.

    Raises:
      UserError: If there is no such teacher.
    """
    found = TEACHERS.find(name, key)
    if isinstance(found, Teacher):
        return found
    return Teacher(found, (getattr(found, "__doc__", None) or "").strip().split("\n", 1)[0])


def is_asked(config: FoundationConfig) -> bool:
    """Returns whether ``fedhelp teach`` must get the model's answers."""
    return teacher(config.name).asked


def model_at_the_client(config: TeacherConfig) -> FoundationModel:
    """Returns the teacher's model, which may see private images.

    Raises:
      UserError: If the model does not run where the images are.
    """
    if not teacher(config.name).at_the_client:
        able = ", ".join(name for name, found in TEACHERS.items() if found.at_the_client)
        raise UserError(
            f"teacher.name = {config.name!r}, but the method asks the foundation model about "
            f"private images, which must not be sent: it needs a model that runs here ({able})"
        )
    return teacher(config.name).make(config, None)


def own_answers(config: TeacherConfig, private: FederatedDataset) -> Answers:
    """Returns a model's stored answers about all clients' own images, in the order of the data.

    Raises:
      AnswersMissing: If ``fedhelp teach`` has not been run.
      UserError: If the model does not run where the images are.
    """
    model = model_at_the_client(config)
    answers = _read_store(
        config, model, own_sha256(private), private.name, ", and sends nothing anywhere"
    )
    return _with_sha256(answers._replace(fingerprint=f"{answers.fingerprint}, at the clients"))


def foundation_model(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    """Returns the model that the settings name, without connecting to anything.

    Raises:
      UserError: If a file or a setting is missing.
    """
    return teacher(config.name).make(config, public)


def open_store(config: FoundationConfig, model: FoundationModel, *, write: bool) -> AnswerStore:
    """Returns the store of a model's answers, a context manager."""
    precision = Precision(config.dtype, config.top_k)
    return AnswerStore(Path(config.store), model.fingerprint, precision, write=write)


def resolve_answers(config: TeacherConfig, public: PublicDataset) -> Answers | None:
    """Returns the teacher's answers about all public images, without querying any model.

    An ensemble answers with its members' averaged probabilities, ``log sum_m a_m softmax(z_m)``. If
    masks have one foreground class, it answers with the logit of the averaged ``sigmoid(z_m)``.

    Returns:
      Answers in the order of ``public``, or None for no teacher.

    Raises:
      AnswersMissing: If ``fedhelp teach`` has not been run.
      UserError: If a file is unusable, or members differ in their classes.
    """
    found = [_one(member, public) for member in members(config)]
    answers = [one for one in found if one is not None]
    if config.name != "ensemble":
        return answers[0] if answers else None
    names = answers[0].label_names
    for number, other in enumerate(answers[1:], start=1):
        if other.label_names != names or other.logits.shape != answers[0].logits.shape:
            raise UserError(
                f"teacher.members: member {number} has other classes than member 0; an ensemble "
                "needs the same ones in the same order"
            )
    weights = np.array(config.weights or [1.0] * len(answers))
    weights = weights / weights.sum()
    log_probs = np.stack([log_probabilities(a.logits) for a in answers])
    shape = (-1,) + (1,) * answers[0].logits.ndim
    logits = np.logaddexp.reduce(log_probs + np.log(weights).reshape(shape), axis=0)
    if len(names) == 1:
        logits = logits[..., 1:] - logits[..., :1]
    shares = " + ".join(f"{w:.2g} {a.fingerprint}" for w, a in zip(weights, answers, strict=True))
    return Answers(
        logits.astype(np.float32),
        tuple(public.sha256),
        names,
        f"ensemble of {shares}",
        content_sha256(*(a.content_sha256 for a in answers)),
    )


def _one(config: FoundationConfig, public: PublicDataset) -> Answers | None:
    found = teacher(config.name)
    answers = _from_store(config, public) if found.asked else found.make(config, public)
    if answers is None:
        return None
    if not isinstance(answers, Answers):
        raise UserError(
            f"teacher.name: {config.name} returned a {type(answers).__name__}, and no Answers "
            "(fh.teachers.from_logits makes them)"
        )
    return _with_head(config, _with_sha256(answers), public)


def _with_sha256(answers: Answers) -> Answers:
    sha256 = content_sha256(answers.logits, repr(answers.label_names))
    return answers._replace(content_sha256=sha256)


def _from_store(config: FoundationConfig, public: PublicDataset) -> Answers:
    return _read_store(config, foundation_model(config, public), public.sha256, public.name)


def _read_store(
    config: FoundationConfig,
    model: FoundationModel,
    sha256: Sequence[str],
    name: str,
    note: str = "",
) -> Answers:
    """Returns a model's stored answers about the images of these hashes, in their order."""
    wanted = set(sha256)
    with open_store(config, model, write=False) as store:
        stored = store.read(sorted(wanted))
    if len(stored) < len(wanted):
        folder, lacking = Path(config.store).resolve(), len(wanted) - len(stored)
        raise AnswersMissing(
            f"teacher.store: {folder} lacks {lacking} of the {len(wanted)} answers of "
            f"{model.fingerprint} about {name}; fedhelp teach gets them{note}"
        )
    logits = np.stack([stored[sha].answer for sha in sha256])
    fingerprint = model.fingerprint
    kept = Precision(config.dtype, config.top_k)
    how = "" if kept == Precision() else f", kept as {kept.dtype}"
    if kept.top_k is not None:
        how += f", top {kept.top_k}"
    return Answers(logits, tuple(sha256), fingerprint.label_names, f"{fingerprint}{how}")


def _with_head(config: FoundationConfig, answers: Answers, public: PublicDataset) -> Answers:
    if config.head is None:
        if not answers.label_names:
            raise UserError(
                f"teacher.head is not set, but {answers.fingerprint} gives embeddings: set it to "
                "probe, or to an .npz file of class_vectors; or name its classes in teacher.labels"
            )
        return answers
    if answers.logits.ndim != 2:
        raise UserError("teacher.head is for one vector an image, not for masks")
    if config.head == "probe":
        if public.labels is None or public.label_names is None:
            raise UserError(f"teacher.head: a probe is fitted on labels, {public.name} has none")
        try:
            logits = linear_probe_logits(
                answers.logits, public.labels, len(public.label_names), public.sha256
            )
        except ValueError as error:
            raise UserError(f"teacher.head: {error}") from None
        said = f"{answers.fingerprint}, linear probe on the labels of {public.name}"
        sha256 = content_sha256(answers.content_sha256, "probe")
        return Answers(logits, answers.sha256, public.label_names, said, sha256)
    vectors, names, scale = _class_vectors(Path(config.head))
    if vectors.shape[1] != answers.logits.shape[1]:
        raise UserError(
            f"teacher.head: {config.head} has class vectors of length {vectors.shape[1]}, the "
            f"embeddings have {answers.logits.shape[1]}"
        )
    logits = class_vector_logits(answers.logits, vectors, scale)
    said = f"{answers.fingerprint}, class vectors of {Path(config.head).name}"
    sha256 = content_sha256(answers.content_sha256, vectors, repr(names), repr(scale))
    return Answers(logits, answers.sha256, names, said, sha256)


def _class_vectors(path: Path) -> tuple[np.ndarray, tuple[str, ...], float]:
    if not path.is_file():
        raise UserError(f"teacher.head must be probe, or an .npz file; there is no file {path}")
    arrays = read_npz(path, "teacher.head", ("class_vectors", "label_names", "logit_scale"))
    for name in ("class_vectors", "label_names"):
        if name not in arrays:
            raise UserError(f"teacher.head: {path} lacks the array {name!r}")
    vectors, names = arrays["class_vectors"], arrays["label_names"]
    right = vectors.ndim == 2 and np.issubdtype(vectors.dtype, np.floating)
    if not right or not np.isfinite(vectors).all() or names.shape != vectors.shape[:1]:
        raise UserError(
            f"teacher.head: {path} must hold class_vectors, finite floats [P, D], and label_names "
            f"[P]; got {vectors.dtype} {list(vectors.shape)} and {list(names.shape)}"
        )
    scale = arrays.get("logit_scale", np.array(100.0))
    if scale.ndim or scale.dtype.kind not in "iuf" or not np.isfinite(scale):
        raise UserError(f"teacher.head: logit_scale in {path} must be one finite number")
    return vectors, tuple(str(n) for n in names.tolist()), float(scale)


def _labels(config: FoundationConfig, public: PublicDataset) -> tuple[str, ...]:
    """Returns the model's classes, read from the labels file if there is one.

    Without a file, a zero-shot model takes the public set's classes, and others have none.
    """
    if config.labels is None:
        if config.name != "hf_zero_shot":
            return ()
        if public.label_names is None:
            raise UserError(
                f"teacher.labels is not set, and {public.name} has no label names either: give "
                "a text file of candidate labels, one a line"
            )
        return public.label_names
    path = Path(config.labels).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"teacher.labels: {path} cannot be read as a text file ({error})") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"teacher.labels: {path} is empty; it must name a class a line")
    return names


def _transport(config: FoundationConfig) -> Transport:
    return Transport(str(config.url), config.timeout, config.api_key_env, config.api_key_file)


def _preprocessing(config: FoundationConfig) -> Preprocessing:
    return Preprocessing(config.image_size, config.scale, config.layout)


def _open_inference(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    return OpenInferenceModel(
        _transport(config),
        str(config.model),
        config.version,
        _labels(config, public),
        config.input or "input",
        config.output,
        _preprocessing(config),
    )


def _hf_zero_shot(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    return HuggingFaceZeroShot(
        _transport(config),
        str(config.model),
        config.version,
        _labels(config, public),
        config.template,
        config.scores,
    )


def _litert(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    labels = _labels(config, public)
    return LiteRTModel(Path(str(config.path)), labels, config.output, _preprocessing(config))


def _onnx(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    path, labels = Path(str(config.path)), _labels(config, public)
    return OnnxModel(path, labels, config.input, config.output, _preprocessing(config))


def _self_trained(config: FoundationConfig, public: PublicDataset) -> FoundationModel:
    return SelfTrained(public, config.epochs, seed=0)


def _simulated(config: FoundationConfig, public: PublicDataset) -> Answers:
    return simulated(public, config.accuracy)


def _stored(config: FoundationConfig, public: PublicDataset) -> Answers:
    loaded = load_answers(Path(str(config.path)), config.array)
    return loaded._replace(logits=join_answers(loaded, public), sha256=tuple(public.sha256))


def _none(config: FoundationConfig, public: PublicDataset) -> None:
    del config, public


def _ensemble(config: FoundationConfig, public: PublicDataset) -> None:
    raise AssertionError("its members are resolved one by one")


def _lacks(found: Any) -> str:
    if isinstance(found, Teacher) or callable(found):
        return ""
    return "is no teacher; it must be a function (config, public) -> Answers"


TEACHERS = Registry(
    "teachers",
    {
        "simulated": Teacher(_simulated, "knows the public labels, and errs at a set rate"),
        "stored": Teacher(_stored, "a file of answers: .npz, .npy or .safetensors"),
        "open_inference": Teacher(
            _open_inference, "an endpoint of the Open Inference Protocol (Triton, KServe)", True
        ),
        "hf_zero_shot": Teacher(
            _hf_zero_shot, "a zero-shot image classification endpoint of Hugging Face", True
        ),
        "litert": Teacher(_litert, "a LiteRT (TensorFlow Lite) file, run here", True, True),
        "onnx": Teacher(_onnx, "an ONNX file, run here", True, True),
        "self_trained": Teacher(
            _self_trained, "a stand-in: a network trained on the public labels", True
        ),
        "ensemble": Teacher(_ensemble, "the mean of several"),
        "none": Teacher(_none, "no teacher"),
    },
    _lacks,
)
