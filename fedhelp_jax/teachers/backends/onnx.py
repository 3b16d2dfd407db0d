"""A foundation model in an ONNX file."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.backends.model_file import ModelFile, named
from fedhelp_jax.teachers.preprocessing import Preprocessing

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


class _Network(NamedTuple):
    """A session, its details of the input, and the output's name."""

    session: Any
    input: Any
    output: str


class OnnxModel(ModelFile):
    """An ``.onnx`` file, run by onnxruntime on CPU; see `ModelFile` for the other arguments.

    The hash includes weights that the exporter put beside the file as ``model.onnx.data`` or
    ``model.onnx_data``, but not weights under other names.

    Args:
      input: Name of the file's input; may be None, since the file must have exactly one.
      output: Name of one of the file's outputs; None takes the first.
    """

    extra = "onnx"

    def __init__(
        self,
        path: Path,
        labels: tuple[str, ...],
        input: str | None,
        output: str | None,
        preprocessing: Preprocessing,
    ):
        super().__init__(path, labels, output, preprocessing)
        self.input = input

    def _load(self) -> tuple[_Network, list[Any]]:
        library = self._import("onnxruntime")
        options = library.SessionOptions()
        options.log_severity_level = 4  # errors are raised, so they need not be printed as well
        try:
            session = library.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's error classes share no other base class
            raise self._unreadable(error) from None
        inputs = session.get_inputs()
        names = [tensor.name for tensor in inputs]
        if self.input is not None:
            named(self.input, names, "teacher.input", self.path)
        if len(inputs) != 1:
            raise UserError(
                f"teacher.path: {self.path} must have one input, the image; it has "
                f"{', '.join(map(repr, names))}"
            )
        if inputs[0].type not in _TYPES:
            raise UserError(
                f"teacher.path: {self.path} takes {inputs[0].type}; images come as "
                f"{', '.join(_TYPES)}"
            )
        outputs = [tensor.name for tensor in session.get_outputs()]
        if self.output is not None:
            named(self.output, outputs, "teacher.output", self.path)
        return _Network(session, inputs[0], self.output or outputs[0]), inputs[0].shape

    def _run(self, inputs: np.ndarray) -> Any:
        session, taken, output = self._network
        dtype = _TYPES[taken.type]
        if dtype == np.uint8 and inputs.dtype != np.uint8:
            raise UserError(
                f"teacher.scale: {self.path} takes pixels 0..255 (uint8); set teacher.scale=uint8"
            )
        try:
            return session.run([output], {taken.name: inputs.astype(dtype)})[0]
        except Exception as error:
            raise self._unreadable(error) from None
