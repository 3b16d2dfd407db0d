"""A foundation model on loopback that speaks the Open Inference Protocol v2, with faults on demand.

It records what it was sent. The protocol is written by hand, so that it shares no mistakes with the
client under test.
"""

import contextlib
import json
import math
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fedhelp_jax.data.types import image_sha256

_BOUND = 60.0  # longest wait in seconds
_HUGE = 1 << 28  # bytes after which a flood ends even if nothing stopped it
_INPUT_TYPES = {"UINT8": np.uint8, "FP32": np.float32}


class Request(NamedTuple):
    """One request, as received."""

    method: str
    path: str
    headers: dict[str, str]  # by lower-case name
    header: dict[str, Any]  # the JSON that describes the tensors
    sha256: tuple[str, ...]  # hash of each image
    time: float  # from time.time()


Fault = Callable[["Exchange"], None]


class FoundationServer:
    """Answers with logits that depend only on each image's pixels.

    Attributes:
        faults: Faults for the next requests, one each; None gives a good answer.
        always: Fault for all requests after those; None gives good answers.
        delay: Seconds before each good answer.
        extensions: Protocol extensions that the server lists; None means no description of itself.
        described: How often the description was requested.
        requests: All other requests, whatever was answered.
        answered: Hash of each image for which a good answer was sent.
        flood: Bytes sent by faults that send without end.
        busiest: Largest number of concurrent requests.
    """

    def __init__(
        self, classes: int = 5, delay: float = 0.0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.classes, self.delay, self.tls = classes, delay, tls
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.extensions: list[str] | None = ["binary_tensor_data"]
        self.described = 0
        self.requests: list[Request] = []
        self.answered: list[str] = []
        self.flood = self.busiest = self._busy = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._unexpected: list[BaseException] = []

    def __enter__(self) -> "FoundationServer":
        self._http = _Server(("127.0.0.1", 0), Exchange)
        self._http.owner = self
        if self.tls is not None:
            self._http.socket = self.tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.cut()
        self._http.server_close()
        if self._unexpected and error is None:
            raise self._unexpected[0]

    @property
    def url(self) -> str:
        """The address of the server, without a path."""
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._http.server_address[1]

    def expected(self, images: np.ndarray) -> np.ndarray:
        """Returns the good answer, float32 ``[B, classes]``, for images ``[B, ...]``."""
        seeds = [int(_sha256(image)[:16], 16) for image in images]
        rows = [np.random.default_rng(seed).normal(size=self.classes) for seed in seeds]
        return np.array(rows, np.float32).reshape(len(images), self.classes)

    def received(self) -> Counter[str]:
        """Returns how often each image was received."""
        with self._lock:
            return Counter(sha for request in self.requests for sha in request.sha256)

    def forget(self) -> None:
        """Clears the records."""
        with self._lock:
            self.requests, self.answered, self.busiest = [], [], 0

    def wait_for(self, requests: int, within: float = 30.0) -> None:
        """Waits until ``requests`` requests have been received."""
        end = time.monotonic() + within
        while len(self.requests) < requests:
            assert time.monotonic() < end, f"{len(self.requests)} of {requests} requests came"
            time.sleep(0.005)


class _Server(ThreadingHTTPServer):
    owner: FoundationServer
    daemon_threads = False  # threads are joined when the server closes

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        """Closes connections that clients keep open, on which threads wait for requests."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):  # OSError: the client has left
            self.owner._unexpected.append(error)


class Exchange(BaseHTTPRequestHandler):
    """One connection, which a fault gets in order to answer the request on it."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _BOUND

    logits: np.ndarray  # the good answer
    binary: bool  # whether the client asked for a binary answer

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""

    def do_GET(self) -> None:
        """Describes the server; other paths are recorded and answered with 404."""
        owner = self.server.owner
        if self.path == "/v2" and owner.extensions is not None:
            with owner._lock:
                owner.described += 1
            metadata = {"name": "tiny", "version": "1", "extensions": owner.extensions}
            self.send(200, {}, json.dumps(metadata).encode())
            return
        self._record({}, ())
        self.send(404, {}, b'{"error": "there is only POST .../infer"}')

    do_HEAD = do_PUT = do_GET

    def do_POST(self) -> None:
        """Records the request, and answers it with the next fault or a good answer."""
        owner = self.server.owner
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            header, images = self._parsed(content)
        except (KeyError, ValueError, IndexError) as error:
            self._record({}, ())
            self.send(400, {}, json.dumps({"error": f"bad request: {error!r}"}).encode())
            return
        sha256 = self._record(header, tuple(_sha256(image) for image in images))
        self.logits = owner.expected(images)
        with owner._lock:
            owner._busy += 1
            owner.busiest = max(owner.busiest, owner._busy)
            fault = owner.faults.pop(0) if owner.faults else owner.always
        try:
            if fault is not None:
                fault(self)
                return
            owner.closing.wait(owner.delay)
            self.send(200, *self.tensor(self.logits))
            with owner._lock:
                owner.answered += sha256
        finally:
            with owner._lock:
                owner._busy -= 1

    def tensor(
        self, values: np.ndarray, datatype: str = "FP32", name: str = "logits"
    ) -> tuple[dict[str, str], bytes]:
        """Returns the headers and body of an answer, in binary if the client asked for that."""
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if datatype == "BYTES":
            texts = [str(value).encode() for value in values.ravel().tolist()]
            content = b"".join(struct.pack("<I", len(text)) + text for text in texts)
            listed: list[Any] = [text.decode() for text in texts]
        else:
            content, listed = values.tobytes(), values.ravel().tolist()
        if self.binary:
            output["parameters"] = {"binary_data_size": len(content)}
        else:
            output["data"], content = listed, b""
        answer = {"model_name": "tiny", "model_version": "1", "outputs": [output]}
        header = json.dumps(answer).encode()
        if not self.binary:
            return {"Content-Type": "application/json"}, header
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        return headers, header + content

    def send(
        self, status: int, headers: dict[str, str], body: bytes, length: int | None = None
    ) -> None:
        """Sends a complete answer, unless ``length`` announces more bytes than ``body`` has."""
        self.start(status, headers, len(body) if length is None else length)
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str], length: int | None) -> None:
        """Sends everything before the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _record(self, header: dict[str, Any], sha256: tuple[str, ...]) -> tuple[str, ...]:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, header, sha256, time.time())
        with self.server.owner._lock:
            self.server.owner.requests.append(request)
        return sha256

    def _parsed(self, content: bytes) -> tuple[dict[str, Any], np.ndarray]:
        """Returns the JSON of a request and its images."""
        parts = self.path.strip("/").split("/")
        if parts[0] != "v2" or parts[1] != "models" or parts[-1] != "infer":
            raise ValueError(f"no such path {self.path}")
        split = int(self.headers.get("Inference-Header-Content-Length", len(content)))
        header = json.loads(content[:split])
        (given,) = header["inputs"]
        dtype = _INPUT_TYPES[given["datatype"]]
        if "data" in given:
            flat = np.array(given["data"]).ravel().astype(dtype)
        else:
            size = given["parameters"]["binary_data_size"]
            if size != len(content) - split:
                raise ValueError(f"{size} bytes announced, {len(content) - split} received")
            flat = np.frombuffer(content[split:], dtype)
        self.binary = header.get("parameters", {}).get("binary_data_output", False)
        for output in header.get("outputs", []):
            self.binary = output.get("parameters", {}).get("binary_data", self.binary)
        return header, flat.reshape(given["shape"])


def _sha256(image: np.ndarray) -> str:
    return image_sha256(np.ascontiguousarray(image).view(np.uint8))


# --- faults -------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Fault:
    """Answers with an error whose message repeats the caller's key, like a careless server."""

    def fault(exchange: Exchange) -> None:
        said = f"no, {exchange.headers.get('Authorization')}\nis not\nwelcome"
        body = json.dumps({"error": said}).encode()
        exchange.send(code, {k.replace("_", "-"): v for k, v in headers.items()}, body)

    return fault


def retry_at(code: int, seconds: float, told: list[float]) -> Fault:
    """Answers with an error and a date in Retry-After, which is also appended to ``told``.

    ``told`` holds it as in time.time().
    """

    def fault(exchange: Exchange) -> None:
        told.append(math.ceil(time.time() + seconds))
        status(code, Retry_After=formatdate(told[-1], usegmt=True))(exchange)

    return fault


def reset(exchange: Exchange) -> None:
    """Sends half of the body, then resets the connection."""
    headers, body = exchange.tensor(exchange.logits)
    exchange.send(200, headers, body[: len(body) // 2], len(body))
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.rfile.close()
    exchange.connection.close()
    exchange.close_connection = True


def cut(exchange: Exchange) -> None:
    """Sends half of the body, then closes the connection in an orderly way."""
    headers, body = exchange.tensor(exchange.logits)
    exchange.send(200, headers, body[: len(body) // 2], len(body))
    exchange.close_connection = True


def hang(exchange: Exchange) -> None:
    """Sends nothing at all."""
    exchange.server.owner.closing.wait(_BOUND)
    exchange.close_connection = True


def drip(exchange: Exchange) -> None:
    """Sends the good answer at ten bytes per second, none of which arrives late."""
    headers, body = exchange.tensor(exchange.logits)
    exchange.start(200, headers, len(body))
    exchange.close_connection = True
    for number in range(len(body)):
        exchange.wfile.write(body[number : number + 1])
        if exchange.server.owner.closing.wait(0.1):
            return


def drip_headers(exchange: Exchange) -> None:
    """Sends headers for a second, none of which arrives late."""
    exchange.close_connection = True
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10):
        exchange.wfile.write(f"X-{number}: 0\r\n".encode())
        if exchange.server.owner.closing.wait(0.1):
            return


def changed(
    change: Callable[[np.ndarray], np.ndarray], datatype: str = "FP32", name: str = "logits"
) -> Fault:
    """Sends a well-formed answer with a changed tensor."""
    return lambda e: e.send(200, *e.tensor(change(e.logits), datatype, name))


def with_nan(logits: np.ndarray) -> np.ndarray:
    """Returns the logits with the last value replaced by NaN."""
    logits = logits.copy()
    logits[-1, -1] = np.nan
    return logits


def short_binary(exchange: Exchange) -> None:
    """Sends a tensor that lacks its last bytes, in an answer that is complete as HTTP."""
    headers, body = exchange.tensor(exchange.logits)
    exchange.send(200, headers, body[:-5])


def described(**changes: Any) -> Fault:
    """Sends the good answer with a changed description of its tensor, such as another shape."""

    def fault(exchange: Exchange) -> None:
        headers, whole = exchange.tensor(exchange.logits)
        split = int(headers.get("Inference-Header-Content-Length", len(whole)))
        answer = json.loads(whole[:split])
        answer["outputs"][0] |= changes
        header = json.dumps(answer).encode()
        if split < len(whole):
            headers["Inference-Header-Content-Length"] = str(len(header))
        exchange.send(200, headers, header + whole[split:])

    return fault


def with_header(name: str, value: str) -> Fault:
    """Sends the good answer with an additional or changed header."""

    def fault(exchange: Exchange) -> None:
        headers, whole = exchange.tensor(exchange.logits)
        exchange.send(200, headers | {name: value}, whole)

    return fault


def body(content: bytes, kind: str = "application/json", **headers: str) -> Fault:
    """Sends content that is not an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.send(200, {"Content-Type": kind} | named, content)


def bomb(exchange: Exchange) -> None:
    """Sends a small answer that decompresses to a large one."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = b" " * (1 << 20)
    packed = b"".join([packer.compress(block) for _ in range(_HUGE >> 20)]) + packer.flush()
    exchange.send(200, {"Content-Encoding": "gzip"}, packed)


def flood(length: int | None) -> Fault:
    """Sends an answer that announces ``length`` bytes, or none, and does not end."""

    def fault(exchange: Exchange) -> None:
        owner, block = exchange.server.owner, b" " * (1 << 16)
        exchange.close_connection = True
        exchange.start(200, {"Content-Type": "application/json"}, length)
        while owner.flood < _HUGE and not owner.closing.is_set():
            exchange.wfile.write(block)
            with owner._lock:
                owner.flood += len(block)

    return fault


def redirect(code: int, host: str) -> Fault:
    """Redirects the client to the same path on another host."""
    return lambda e: e.send(code, {"Location": f"{host}{e.path}"}, b"")
