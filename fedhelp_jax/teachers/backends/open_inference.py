"""Foundation models behind the Open Inference Protocol, version 2, over HTTP.

KServe, Triton, MLServer, TorchServe and OpenVINO Model Server support it. NVIDIA's client library
encodes and decodes the messages, tensors behind a JSON header; `Transport` sends them.

References:
  Open Inference Protocol, https://github.com/kserve/open-inference-protocol, and its binary tensor
  data extension.
"""

import json
import threading
from urllib.parse import quote

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import Fingerprint, Images, check_public
from fedhelp_jax.teachers.http import Endpoint, Transport, version_name
from fedhelp_jax.teachers.preprocessing import Preprocessing

_HEADER_LENGTH = "Inference-Header-Content-Length"
# Raised by the client library and the JSON parser for anything but an inference response.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_FLOATS = ("FP16", "FP32", "FP64")


class OpenInferenceModel(Endpoint):
    """A model behind ``{url}/v2/models/{model}/infer``.

    Tensors are sent and received as raw bytes if the server lists that extension, else as JSON
    numbers. Every server of the protocol accepts JSON numbers, which also keep float32 exactly.

    Args:
      transport: The connection to the server.
      model: Name of the model on the server.
      version: Version of the model on the server, which goes into the URL; None asks whichever
        version the server serves.
      label_names: The model's classes; empty for embeddings.
      input: Name of the input tensor.
      output: Name of the output tensor; None takes the first.
      preprocessing: The preprocessing that the model expects.
    """

    batch_limit: int | None = None

    def __init__(
        self,
        transport: Transport,
        model: str,
        version: str | None,
        label_names: tuple[str, ...],
        input: str,
        output: str | None,
        preprocessing: Preprocessing,
    ):
        super().__init__(transport)
        self._input, self._output = input, output
        self._preprocessing = preprocessing
        self._negotiating = threading.Lock()
        self._binary: bool | None = None
        self._path = f"/v2/models/{quote(model, safe='')}"
        if version:
            self._path += f"/versions/{quote(version, safe='')}"
        how = f"{preprocessing}, {f'output {output}' if output else 'first output'}"
        self.fingerprint = Fingerprint(model, version_name(version), how, label_names)

    def answer(self, images: Images) -> np.ndarray:
        """See `FoundationModel`."""
        from tritonclient.http import InferenceServerClient, InferenceServerException

        body, length = self._body(images, self._takes_binary())
        headers = {"Content-Type": "application/json"}
        if length is not None:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(length)}
        reply = self._transport.post(f"{self._path}/infer", body, headers)
        start = reply.headers.get(_HEADER_LENGTH)
        try:
            result = InferenceServerClient.parse_response_body(
                reply.body, header_length=None if start is None else int(start)
            )
            outputs = result.get_response()["outputs"]
            names = [output["name"] for output in outputs]
            name = self._output or names[0]
            if name not in names:
                raise UserError(
                    f"teacher.output: there is no {name!r} in the answer; there are {names}"
                )
            datatype = outputs[names.index(name)]["datatype"]
            if datatype not in _FLOATS:
                raise UserError(
                    f"teacher.output: {name} must be a floating-point tensor, the server answered "
                    f"{datatype}"
                )
            answer = result.as_numpy(name)
        except _UNREADABLE + (InferenceServerException,):
            said = self._transport.quote(reply.body)
            raise UserError(f"teacher.url: the answer is no inference response{said}") from None
        if answer is None:
            raise UserError(f"teacher.output: {name} came without its data")
        return self._preprocessing.answer_of(answer) if answer.ndim > 1 else answer

    def request_bytes(self, images: Images) -> int:
        """See `FoundationModel`; counts raw bytes, of which JSON may need four times as many."""
        return len(self._body(images, binary=True)[0])

    def _takes_binary(self) -> bool:
        """Returns whether the server lists the binary tensor data extension; asks only once."""
        with self._negotiating:
            if self._binary is None:
                try:
                    extensions = json.loads(self._transport.get("/v2").body)["extensions"]
                    self._binary = "binary_tensor_data" in extensions
                except (UserError, *_UNREADABLE):
                    self._binary = False  # the server does not describe itself
            return self._binary

    def _body(self, images: Images, binary: bool) -> tuple[bytes, int | None]:
        """Returns a request's body, and the length of its JSON part if raw bytes follow it."""
        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

        check_public(images)
        pixels = self._preprocessing(images.pixels)
        datatype = "UINT8" if pixels.dtype == np.uint8 else "FP32"
        tensor = InferInput(self._input, list(pixels.shape), datatype)
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        wanted = [InferRequestedOutput(self._output, binary_data=binary)] if self._output else None
        body, length = InferenceServerClient.generate_request_body([tensor], outputs=wanted)
        return body, length
