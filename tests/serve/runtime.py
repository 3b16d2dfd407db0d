"""MLServer runtimes that record which images they were sent; only the server imports this."""

import hashlib
import json

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import Datatype, InferenceRequest, InferenceResponse, RequestInput
from PIL import Image


class _Runtime(MLModel):
    """Takes UINT8 ``[B, H, W, 3]`` of any size, resizes it, and returns FP32 ``[B, P]``.

    Settings: ``parameters.uri`` is the model file. ``parameters.extra`` names the ``output`` tensor
    and the ``log``, a file that gets a JSON line for each request.
    """

    input: str
    shape: tuple[int, ...]  # shape of one image

    async def load(self) -> bool:
        self.output, self.log = (self.settings.parameters.extra[key] for key in ("output", "log"))
        self.open(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = self.images(payload.inputs)
        for wanted in payload.outputs or []:
            if wanted.name != self.output:
                raise InferenceError(f"no output {wanted.name}; there is {self.output}")
        prefix = repr(images.shape[1:]).encode()
        sha256 = [hashlib.sha256(prefix + image.tobytes()).hexdigest() for image in images]
        with open(self.log, "a") as file:
            print(json.dumps({"images": len(images), "sha256": sha256}), file=file)
        height, width, _ = self.shape
        pictures = [Image.fromarray(image) for image in images]
        resized = [
            picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures
        ]
        answer = self.run(np.stack([np.asarray(picture) for picture in resized]))
        output = NumpyCodec.encode_output(self.output, answer)
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])

    def images(self, inputs: list[RequestInput]) -> np.ndarray:
        """Returns the request's tensor, uint8 ``[B, H, W, 3]``."""
        # Only InferenceError, since MLServer answers 500 to others as if the fault were its own.
        if [tensor.name for tensor in inputs] != [self.input]:
            raise InferenceError(f"one input is taken, {self.input}")
        tensor = inputs[0]
        if Datatype(tensor.datatype) != Datatype.UINT8 or tensor.shape[3:] != [3]:
            raise InferenceError(f"images in {self.input} must be UINT8 [B, H, W, 3]")
        try:
            return NumpyCodec.decode_input(tensor)
        except (ValueError, TypeError, OverflowError) as error:
            raise InferenceError(f"{self.input}: {error}") from None

    def open(self, path: str) -> None:
        """Reads the model file and the description of its input."""
        raise NotImplementedError

    def run(self, images: np.ndarray) -> np.ndarray:
        """Returns the answer, float32 ``[B, P]``, for images, uint8 ``[B, H, W, 3]``."""
        raise NotImplementedError


class LiteRTRuntime(_Runtime):
    """A quantised classifier in a LiteRT file, whose ``output`` may be any tensor of the graph."""

    def open(self, path: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.network = Interpreter(path, experimental_preserve_all_tensors=True, num_threads=1)
        self.network.allocate_tensors()
        taken = self.network.get_input_details()[0]
        self.index, self.input = taken["index"], taken["name"]
        self.shape = tuple(taken["shape"][1:].tolist())
        details = self.network.get_tensor_details()
        self.tensor = next(detail for detail in details if detail["name"] == self.output)

    def run(self, images: np.ndarray) -> np.ndarray:
        scale, zero = self.tensor["quantization"]
        rows = []
        for image in images:
            self.network.set_tensor(self.index, image[None])
            self.network.invoke()
            rows.append(self.network.get_tensor(self.tensor["index"])[0].astype(np.float32))
        return (np.stack(rows) - zero) * scale


class OnnxRuntime(_Runtime):
    """A classifier in an ONNX file."""

    def open(self, path: str) -> None:
        from onnxruntime import InferenceSession

        self.session = InferenceSession(path, providers=["CPUExecutionProvider"])
        taken = self.session.get_inputs()[0]
        self.input, self.shape = taken.name, tuple(taken.shape[1:])

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.session.run([self.output], {self.input: images})[0]
