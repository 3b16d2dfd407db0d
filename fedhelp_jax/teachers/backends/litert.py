"""A foundation model in a LiteRT (TensorFlow Lite) file."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.backends.model_file import ModelFile, named


class _Network(NamedTuple):
    """An interpreter, and its details of the input and output tensors that we use."""

    interpreter: Any
    input: dict[str, Any]
    output: dict[str, Any]


class LiteRTModel(ModelFile):
    """A ``.tflite`` file, run by ai-edge-litert; see `ModelFile` for the arguments.

    ``output`` may name any tensor inside the graph, such as the logits before a softmax or a
    pooled feature. Integer outputs are de-quantised, ``(q - zero_point) * scale``.

    Pixels of the scale "uint8" are passed unchanged to an integer input; for int8, whose range
    starts at -128, 128 is subtracted first. Pixels of other scales are quantised with the input's
    own scale and zero point.
    """

    extra = "litert"

    def _load(self) -> tuple[_Network, list[int]]:
        library = self._import("ai_edge_litert.interpreter")
        try:
            with warnings.catch_warnings():
                # It warns that keeping inner tensors takes memory, but we need them.
                warnings.filterwarnings("ignore", ".*preserve_all_tensors", UserWarning)
                interpreter = library.Interpreter(
                    str(self.path), experimental_preserve_all_tensors=self.output is not None
                )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self._unreadable(error) from None
        inputs = interpreter.get_input_details()
        if len(inputs) != 1:
            raise UserError(
                f"teacher.path: {self.path} must have one input, the image; it has "
                f"{', '.join(repr(tensor['name']) for tensor in inputs)}"
            )
        network = _Network(interpreter, inputs[0], self._output(interpreter))
        return network, inputs[0]["shape_signature"].tolist()

    def _output(self, interpreter: Any) -> dict[str, Any]:
        if self.output is None:
            return interpreter.get_output_details()[0]
        # An output takes precedence over a tensor of the same name inside the graph.
        tensors = [*interpreter.get_output_details(), *interpreter.get_tensor_details()]
        name = named(self.output, (t["name"] for t in tensors), "teacher.output", self.path)
        tensor = next(tensor for tensor in tensors if tensor["name"] == name)
        if len(tensor["quantization_parameters"]["scales"]) > 1:
            raise UserError(
                f"teacher.output: {name!r} of {self.path} holds weights; name a tensor that "
                "depends on the image"
            )
        return tensor

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        interpreter, taken, given = self._network
        index = taken["index"]
        try:
            if interpreter.get_tensor(index).shape != inputs.shape:
                interpreter.resize_tensor_input(index, inputs.shape)
                interpreter.allocate_tensors()
            interpreter.set_tensor(index, _quantised(inputs, taken))
            interpreter.invoke()
            raw = interpreter.get_tensor(given["index"])
        except (ValueError, RuntimeError) as error:
            raise self._unreadable(error) from None
        scale, zero = given["quantization"]
        if raw.dtype.kind in "iu" and scale:
            raw = (raw.astype(np.float32) - zero) * scale
        return raw


def _quantised(pixels: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """Returns pixels in the dtype of the input tensor."""
    dtype = np.dtype(tensor["dtype"])
    if dtype.kind not in "iu" or pixels.dtype == dtype:
        return pixels.astype(dtype)
    if pixels.dtype == np.uint8:
        shift = 128 if dtype == np.int8 else 0
        return (pixels.astype(np.int32) - shift).astype(dtype)
    scale, zero = tensor["quantization"]
    limits = np.iinfo(dtype)
    steps = np.round(pixels / np.float32(scale or 1)) + zero
    return np.clip(steps, limits.min, limits.max).astype(dtype)
