"""A foundation model's answers: a file of logits, joined to public images by their hash."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhelp_jax.data.types import PublicDataset
from fedhelp_jax.errors import UserError

_ARRAYS = ("logits", "sha256", "label_names", "fingerprint")


class Answers(NamedTuple):
    """What a foundation model said about some images.

    Attributes:
      logits: float32 ``[M, F]`` over its own classes.
      sha256: ``[M]`` which image each row is about (:func:`fedhelp_jax.data.types.image_sha256`).
      label_names: ``[F]`` its classes.
      fingerprint: Its name, version and preprocessing, for the record.
    """

    logits: np.ndarray
    sha256: tuple[str, ...]
    label_names: tuple[str, ...]
    fingerprint: str


def save_answers(path: Path, answers: Answers) -> None:
    """Writes answers as a compressed ``.npz`` that :func:`load_answers` reads; no pickle."""
    np.savez_compressed(
        path,
        logits=answers.logits,
        sha256=np.array(answers.sha256),
        label_names=np.array(answers.label_names),
        fingerprint=np.array(answers.fingerprint),
    )


def load_answers(path: Path) -> Answers:
    """Reads and checks a file of answers.

    Raises:
      UserError: If the file is missing or unreadable, or its logits are not finite floats ``[M,
        F]`` with one hash per row and one label name per column.
    """
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            missing = [name for name in _ARRAYS if name not in stored.files]
            if missing:
                raise UserError(f"teacher.path: {path} lacks the array {missing[0]!r}")
            logits, sha256, label_names, fingerprint = (stored[name] for name in _ARRAYS)
    except FileNotFoundError:
        raise UserError(f"teacher.path: there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"teacher.path: {path} is no readable .npz file ({error})") from None
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise UserError(
            f"teacher.path: logits in {path} must be floats [M, F], got {logits.dtype} "
            f"{list(logits.shape)}"
        )
    if sha256.shape != logits.shape[:1] or label_names.shape != logits.shape[1:]:
        raise UserError(
            f"teacher.path: {path} must hold one sha256 per row and one label name per column of "
            f"logits {list(logits.shape)}, got {list(sha256.shape)} and {list(label_names.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise UserError(
            f"teacher.path: logits in {path} must be finite; {bad.size} rows are not, the first is "
            f"row {bad[0]}"
        )
    return Answers(
        logits.astype(np.float32), _text(sha256), _text(label_names), _text(fingerprint)[0]
    )


def join_answers(answers: Answers, public: PublicDataset) -> np.ndarray:
    """The answers in the order of the public images, matched by hash and never by position.

    Returns:
      float32 ``[P, F]``.

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


def _text(array: np.ndarray) -> tuple[str, ...]:
    items = array.reshape(-1).tolist()
    return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in items)
