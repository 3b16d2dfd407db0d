"""Files of a foundation model's answers, logits or embeddings, matched to images by their hash."""

import hashlib
import importlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.readers.npz import take_images
from fedhelp_jax.data.types import PublicDataset, image_sha256

_READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
_NOT_ANSWERS = ("sha256", "images", "label_names", "fingerprint")


class Answers(NamedTuple):
    """A foundation model's answers about a set of images.

    Attributes:
      logits: float32 ``[M, F]`` over the model's own classes, or ``[M, *spatial, F]`` for masks;
        embeddings if there are no label names.
      sha256: ``[M]`` hash of the image that each row is about
        (:func:`fedhelp_jax.data.types.image_sha256`).
      label_names: ``[F]`` class names; empty for embeddings.
      fingerprint: Name, version and preprocessing of the model, for the record.
      content_sha256: Hash of what was read, before a head or an ensemble is applied.
    """

    logits: np.ndarray
    sha256: tuple[str, ...]
    label_names: tuple[str, ...]
    fingerprint: str
    content_sha256: str = ""

    def about(self, public: PublicDataset) -> np.ndarray:
        """Returns the logits in the order of the public images; see `join_answers`."""
        return join_answers(self, public)

    def top_1(self, public: PublicDataset) -> float | None:
        """Returns the share of public images whose label is the answer with the largest logit.

        None if that cannot be said: there are no labels of whole images, or the model's classes are
        not the public ones.
        """
        if public.labels is None or public.labels.ndim > 1:
            return None
        if self.label_names != public.label_names:
            return None
        return float(np.mean(self.about(public).argmax(-1) == public.labels))


class _Stored(NamedTuple):
    """The unchecked content of a file; ``name`` is the name of the array of answers."""

    name: str
    answers: np.ndarray
    sha256: np.ndarray
    label_names: np.ndarray
    fingerprint: str


def from_logits(
    public: PublicDataset, logits: Any, *, label_names: Sequence[str], name: str
) -> Answers:
    """Returns a foundation model's answers, given as an array.

    Args:
      public: The images that the answers are about.
      logits: ``[P, F]``, one row per image, or ``[P, *spatial, F]`` for masks; finite.
      label_names: The model's classes, which need not be those of any data set.
      name: Name and version of the model.

    Raises:
      UserError: If the logits are not finite, or do not fit the images or the label names.
    """
    logits = np.asarray(logits, np.float32)
    if len(logits) != len(public.images) or logits.shape[-1] != len(label_names):
        raise UserError(
            f"logits are of shape {list(logits.shape)}, but there are {len(public.images)} public "
            f"images and {len(label_names)} label names"
        )
    if not np.isfinite(logits).all():
        raise UserError("logits must be finite")
    return Answers(logits, tuple(public.sha256), tuple(label_names), name)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns log-probabilities, float64 ``[..., max(P, 2)]``, of logits ``[..., P]``.

    A single class is the foreground of a mask: its logit ``s`` is read as two logits, ``[0, s]``.
    """
    if logits.shape[-1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
    return log_softmax(logits.astype(np.float64), axis=-1)


def save_answers(path: str | Path, answers: Answers) -> None:
    """Writes answers to a file that :func:`load_answers` reads, without pickle.

    Raises:
      UserError: If the suffix is none of ``.npz``, ``.safetensors`` and ``.npy``.
    """
    path = Path(path)
    name = "logits" if answers.label_names else "embeddings"
    match path.suffix:
        case ".npz":
            arrays: dict[str, Any] = {
                name: answers.logits,
                "sha256": np.array(answers.sha256),
                "label_names": np.array(answers.label_names, str),
                "fingerprint": np.array(answers.fingerprint),
            }
            np.savez_compressed(path, **arrays)
        case ".safetensors":
            digests = b"".join(bytes.fromhex(sha) for sha in answers.sha256)
            tensors = {
                name: np.ascontiguousarray(answers.logits),
                "sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
            }
            names = json.dumps(answers.label_names)
            metadata = {"label_names": names, "fingerprint": answers.fingerprint}
            _safetensors(path).numpy.save_file(tensors, path, metadata)
        case ".npy":
            np.save(path, answers.logits, allow_pickle=False)
            names = ("sha256", "label_names", "fingerprint")
            rest = {name: getattr(answers, name) for name in names}
            path.with_suffix(".json").write_text(json.dumps(rest), encoding="utf-8")
        case _:
            raise _wrong_suffix(path)


def load_answers(path: Path, array: str | None = None) -> Answers:
    """Reads and checks a file of answers; its suffix determines the format.

    ``.npz``: arrays ``logits``, ``sha256``, ``label_names``, ``fingerprint``. An array ``images``,
    uint8 at native size, may replace ``sha256``; the fingerprint is then optional.

    ``.safetensors``: tensors ``logits`` and ``sha256`` (uint8 ``[M, 32]``), metadata
    ``label_names`` (a JSON list) and ``fingerprint``.

    ``.npy``: the logits. A ``.json`` file of the same name holds the other three.

    Args:
      path: The file.
      array: Name of the array that holds the answers; None takes ``logits``, or ``embeddings`` if
        there are no logits. Label names belong only to ``logits``: other arrays are embeddings.

    Raises:
      UserError: If the file is missing or unreadable, or its logits are not finite floats ``[M,
        *spatial, F]`` with one hash per row and one label name per column.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".npy": _read_npy}
    if path.suffix not in readers:
        raise _wrong_suffix(path)
    try:
        stored = readers[path.suffix](path, array)
    except FileNotFoundError:
        raise UserError(f"teacher.path: there is no file {path}") from None
    except _READ_ERRORS as error:
        words = f"{path} is no readable {path.suffix} file"
        raise UserError(f"teacher.path: {words} ({error})") from None
    name, logits, sha256, label_names, fingerprint = stored
    if logits.ndim < 2 or not jnp.issubdtype(logits.dtype, np.floating):
        raise UserError(
            f"teacher.path: {name} in {path} must be floats [M, F], or [M, *spatial, F] of masks, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    columns = logits.shape[-1:] if label_names.size else (0,)
    if sha256.shape != logits.shape[:1] or label_names.shape != columns:
        raise UserError(
            f"teacher.path: {path} must hold one sha256 per row and one label name per column of "
            f"{name} {list(logits.shape)}, got {list(sha256.shape)} and {list(label_names.shape)}"
        )
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim))))
    if bad.size:
        raise UserError(
            f"teacher.path: {name} in {path} must be finite; {bad.size} rows are not, the first is "
            f"row {bad[0]}"
        )
    return Answers(logits, _text(sha256), _text(label_names), fingerprint)


def join_answers(answers: Answers, public: PublicDataset) -> np.ndarray:
    """Returns the answers in the order of the public images, matched by hash.

    Returns:
      float32 ``[P, *spatial, F]``.

    Raises:
      UserError: If an image has no answer.
    """
    rows = {sha: row for row, sha in enumerate(answers.sha256)}
    missing = [sha for sha in public.sha256 if sha not in rows]
    if missing:
        raise UserError(
            f"teacher.path: {len(missing)} of the {len(public.sha256)} images of {public.name} "
            f"have no answer, the first has sha256 {missing[0]}; the file must answer all of them"
        )
    return answers.logits[[rows[sha] for sha in public.sha256]]


def _read_npz(path: Path, array: str | None) -> _Stored:
    # The file is opened here because np.load leaves a damaged file open.
    with path.open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        name = _name_of_answers(path, array, stored.files)
        hashed = "sha256" in stored.files or "images" not in stored.files
        needed = ["sha256"] if hashed else ["images"]
        needed += ["label_names"] if name == "logits" else []
        needed += ["fingerprint"] if hashed or "fingerprint" in stored.files else []
        missing = [needs for needs in needed if needs not in stored.files]
        if missing:
            raise UserError(f"teacher.path: {path} lacks the array {missing[0]!r}")
        arrays = {one: stored[one] for one in (name, *needed)}
    if hashed:
        sha256 = arrays["sha256"]
    else:
        images = take_images(arrays, "images", f"teacher.path: {path}")
        sha256 = np.array([image_sha256(image) for image in images])
    if "fingerprint" in arrays:
        fingerprint = _text(arrays["fingerprint"])[0]
    else:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        fingerprint = f"{path.stem} (sha256 {digest[:12]})"
    label_names = arrays.get("label_names", np.array([], str))
    return _Stored(name, arrays[name], sha256, label_names, fingerprint)


def _read_safetensors(path: Path, array: str | None) -> _Stored:
    library = _safetensors(path)
    try:
        with library.safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            name = _name_of_answers(path, array, names)
            if "sha256" not in names:
                raise UserError(f"teacher.path: {path} lacks the tensor 'sha256'")
            answers, digests = file.get_tensor(name), file.get_tensor("sha256")
    except (library.SafetensorError, AttributeError) as error:
        # safetensors raises AttributeError for a dtype that NumPy does not have.
        raise ValueError(error) from None
    if digests.dtype != np.uint8 or digests.shape[1:] != (32,):
        raise UserError(
            f"teacher.path: sha256 in {path} must be uint8 [M, 32], got {digests.dtype} "
            f"{list(digests.shape)}"
        )
    sha256 = np.array([digest.tobytes().hex() for digest in digests], str)
    where = f"the metadata of {path}"
    label_names = np.array([], str)
    if name == "logits":
        try:
            names = json.loads(metadata.get("label_names", "null"))
        except ValueError:
            names = None
        label_names = _strings(names, "label_names", where)
    return _Stored(name, answers, sha256, label_names, _string(metadata, where))


def _read_npy(path: Path, array: str | None) -> _Stored:
    if array is not None:
        raise UserError(f"teacher.array must not be set for {path}, which holds a single array")
    with path.open("rb") as file:
        answers = np.load(file, allow_pickle=False)
    if not isinstance(answers, np.ndarray):
        raise ValueError("several arrays")
    beside = path.with_suffix(".json")
    where = f"{beside}, beside {path},"
    try:
        rest = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"teacher.path: there is no file {beside} beside {path}; it must hold sha256, "
            "label_names and fingerprint"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"teacher.path: {where} is no readable JSON file ({error})") from None
    if not isinstance(rest, dict):
        raise UserError(f"teacher.path: {where} must hold sha256, label_names and fingerprint")
    sha256, label_names = (_strings(rest.get(k), k, where) for k in ("sha256", "label_names"))
    return _Stored("logits", answers, sha256, label_names, _string(rest, where))


def _name_of_answers(path: Path, array: str | None, names: list[str]) -> str:
    if array is None:
        array = "embeddings" if "embeddings" in names and "logits" not in names else "logits"
    if array in names:
        return array
    others = [name for name in names if name not in _NOT_ANSWERS]
    hint = f"; teacher.array may name one of {', '.join(others)}" if others else ""
    raise UserError(f"teacher.path: {path} lacks the array {array!r}{hint}")


def _strings(value: Any, name: str, where: str) -> np.ndarray:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"teacher.path: {where} must hold {name}, a JSON list of strings")
    return np.array(value, str)


def _string(values: dict[str, Any], where: str) -> str:
    if not isinstance(values.get("fingerprint"), str):
        raise UserError(f"teacher.path: {where} must hold fingerprint, a string")
    return values["fingerprint"]


def _safetensors(path: Path) -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError:
        raise UserError(
            f"teacher.path: {path} needs the package safetensors; pip install safetensors"
        ) from None


def _wrong_suffix(path: Path) -> UserError:
    return UserError(f"teacher.path: {path} must end in .npz, .safetensors or .npy")


def _text(array: np.ndarray) -> tuple[str, ...]:
    items = array.reshape(-1).tolist()
    return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in items)
