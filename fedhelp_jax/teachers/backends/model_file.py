"""Base class of foundation models in local files: hashing, lazy loading and checks."""

import difflib
import hashlib
import importlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import Fingerprint, Images
from fedhelp_jax.teachers.preprocessing import Preprocessing

# Suffixes of the files for weights that ONNX exporters cannot fit into the model file.
_WEIGHTS = ("_data", ".data")


class ModelFile:
    """A foundation model in a file, run on this machine by an optional library.

    The file is hashed on construction and loaded at the first question, because training needs
    only the fingerprint. Several threads may ask at once.

    A subclass loads the file (`_load`) and runs one batch (`_run`).

    Args:
      path: The file.
      labels: The model's classes; empty if the output is an embedding.
      output: Name of the tensor that holds the answer; None takes the file's first output.
      preprocessing: The preprocessing of images.

    Attributes:
      fingerprint: The file's name and hash, the preprocessing and the output.
      batch_limit: None, since batches are split to the size that the file takes.

    Raises:
      UserError: If the file is missing or unreadable.
    """

    extra = ""
    batch_limit: int | None = None

    def __init__(
        self,
        path: Path,
        labels: tuple[str, ...],
        output: str | None,
        preprocessing: Preprocessing,
    ):
        self.path, self.labels, self.output = path, labels, output
        self.preprocessing = preprocessing
        taken = "first output" if output is None else f"output {output}"
        self.fingerprint = Fingerprint(
            path.stem, f"sha256 {_file_sha256(path)[:12]}", f"{preprocessing}, {taken}", labels
        )
        self._lock = threading.Lock()
        # Both are set to what `_load` returns.
        self._network: Any = None
        self._input_shape: Sequence[Any] = ()

    def open(self) -> None:
        """Loads the file."""
        with self._lock:
            if self._network is None:
                self._network, self._input_shape = self._load()

    def answer(self, images: Images) -> np.ndarray:
        """Returns the model's answers; see `FoundationModel` and `Preprocessing.answer_of`.

        Raises:
          UserError: If the file cannot be loaded, or does not fit the images or the labels.
        """
        inputs = self.preprocessing(images.pixels)
        self.open()
        with self._lock:
            step = self._check_input(inputs) or len(inputs)
            parts = []
            for start in range(0, len(inputs), step):
                part = inputs[start : start + step]
                # Fill up the last batch by repeating its last image.
                rows = np.minimum(np.arange(step), len(part) - 1)
                parts.append(self._checked(self._run(part[rows]), step)[: len(part)])
        return np.concatenate(parts)

    def request_bytes(self, images: Images) -> int:
        """Returns 0, since nothing leaves this machine."""
        return 0

    def close(self) -> None:
        """Releases the loaded model."""
        with self._lock:
            self._network = None

    def _load(self) -> tuple[Any, Sequence[Any]]:
        """Returns the loaded model and its input's shape; a free axis is no positive integer."""
        raise NotImplementedError

    def _run(self, inputs: np.ndarray) -> Any:
        """Returns the output tensor for a batch ``[B, ...]`` of preprocessed images."""
        raise NotImplementedError

    def _import(self, module: str) -> Any:
        try:
            return importlib.import_module(module)
        except ImportError:
            raise UserError(
                f"teacher.name: {self.extra} needs the package {module.split('.')[0]}, which is "
                f"not installed; pip install 'fedhelp_jax[{self.extra}]'"
            ) from None

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"teacher.path: {self.path} is no model that {self.extra} can run ({one_line(error)})"
        )

    def _check_input(self, inputs: np.ndarray) -> int | None:
        """Checks the input's shape and returns the file's batch size, or None if it is free."""
        shape = self._input_shape or inputs.ndim * [None]  # a file need not state its shape
        batch, *wanted = (n if isinstance(n, int) and n > 0 else None for n in shape)
        got = list(inputs.shape[1:])
        fits = len(wanted) == len(got)
        if not fits or any(n not in (None, m) for n, m in zip(wanted, got, strict=True)):
            words = ", ".join("any" if n is None else str(n) for n in wanted)
            raise UserError(
                f"teacher.image_size: {self.path} takes images [{words}], and they come as {got} "
                f"({self.preprocessing}); set teacher.image_size and teacher.layout to fit"
            )
        return batch

    def _checked(self, raw: Any, count: int) -> np.ndarray:
        name = f"the output {self.output or ''}".rstrip() + f" of {self.path}"
        if not isinstance(raw, np.ndarray) or raw.dtype.kind != "f":
            kind = getattr(raw, "dtype", type(raw).__name__)
            raise UserError(
                f"teacher.output: {name} is {kind}, which is neither logits nor an embedding; "
                "name another"
            )
        if raw.ndim < 2 or len(raw) != count:
            raise UserError(
                f"teacher.output: {name} has the shape {list(raw.shape)} for {count} images; "
                f"it must be [{count}, ...]"
            )
        answer = self.preprocessing.answer_of(raw)
        if self.labels and answer.shape[-1] != len(self.labels):
            raise UserError(
                f"teacher.labels: {len(self.labels)} names for the {answer.shape[-1]} classes of "
                f"{name}; there must be one name per class"
            )
        return answer


def named(name: str, names: Iterable[str], key: str, path: Path) -> str:
    """Returns ``name`` after checking that it is one of ``names``.

    Raises:
      UserError: If it is not; the message lists the closest names.
    """
    names = list(dict.fromkeys(names))
    if name in names:
        return name
    closest = ", ".join(map(repr, difflib.get_close_matches(name, names, n=3, cutoff=0.0)))
    raise UserError(f"{key}: {path} has no {name!r}; the closest are {closest}")


def one_line(error: Exception) -> str:
    """Returns an error's message on one line."""
    return " ".join(str(error).split())


def _file_sha256(path: Path) -> str:
    weights = (path.with_name(path.name + suffix) for suffix in _WEIGHTS)
    digest = hashlib.sha256()
    try:
        for file in (path, *filter(Path.is_file, weights)):
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except FileNotFoundError:
        raise UserError(f"teacher.path: there is no file {path}") from None
    except OSError as error:
        raise UserError(f"teacher.path: {path} cannot be read ({error.strerror})") from None
    return digest.hexdigest()
