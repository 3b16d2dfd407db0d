"""The command ``fedhelp teach`` against Seldon MLServer: a real server that we did not write.

It serves a real MobileNetV2 where ``FEDHELP_DATA_DIR`` has it, else a small model built here.
"""

import contextlib
import http.client
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
import served_config
from commands import fedhelp
from PIL import Image
from serve.server import Served, mlserver, serve_python

from fedhelp_jax.data.sources import load_public
from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.experiments.config import validate
from fedhelp_jax.teachers.resolve import resolve_answers

CONFIG = Path(__file__).parent / "served_config.py"
Network = Callable[[np.ndarray], np.ndarray]  # uint8 [B, S, S, 3] -> float32 [B, P]


class Case(NamedTuple):
    """A model file, and all there is to know about it."""

    runtime: str
    file: Path
    run: Network  # without the server
    size: int  # of the images it takes
    input: str
    output: str
    labels: Path
    public: Path


def real_case(data: Path, folder: Path) -> Case:
    """MobileNetV2 and 1,000 tiles of colon tissue."""
    models = data / "models"
    file, output = models / "mobilenet_v2_1.0_224_quant.tflite", "MobilenetV2/Logits/Squeeze1"
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is missing")
    with pytest.warns(UserWarning, match="experimental_preserve_all_tensors"):
        network = litert.Interpreter(str(file), experimental_preserve_all_tensors=True)
    network.allocate_tensors()
    taken = network.get_input_details()[0]
    logits = next(each for each in network.get_tensor_details() if each["name"] == output)
    scale, zero = logits["quantization"]

    def run(images: np.ndarray) -> np.ndarray:
        rows = []
        for image in images:
            network.set_tensor(taken["index"], image[None])
            network.invoke()
            rows.append(network.get_tensor(logits["index"])[0])
        return (np.stack(rows).astype(np.float32) - zero) * scale

    with np.load(data / "pathmnist_1000_clip.npz", allow_pickle=False) as stored:
        # Without labels: to compare 1,001 logits with them takes longer than all the rest.
        np.savez(folder / "public.npz", images=stored["images"])
    labels, public = models / "imagenet_labels.txt", folder / "public.npz"
    return Case("LiteRTRuntime", file, run, 224, taken["name"], output, labels, public)


def built_case(folder: Path) -> Case:
    """A linear model with weights -1, 0 and 1: exact in float32, so that sums in integers say."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing, and so is FEDHELP_DATA_DIR")
    helper, types = onnx.helper, onnx.TensorProto
    rng = np.random.default_rng(3)
    size, classes = 32, 9
    weights = rng.integers(-1, 2, size=(size * size * 3, classes))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=types.FLOAT),
            helper.make_node("Flatten", ["floats"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", types.UINT8, ["B", size, size, 3])],
        [helper.make_tensor_value_info("logits", types.FLOAT, ["B", classes])],
        [onnx.numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "linear.onnx")
    (folder / "labels.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    images = rng.integers(0, 256, size=(100, 28, 28, 3), dtype=np.uint8)
    images[50:60] = images[:10]
    np.savez(folder / "public.npz", images=images)

    def run(images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1).astype(np.int64) @ weights).astype(np.float32)

    model, labels, public = (folder / name for name in ("linear.onnx", "labels.txt", "public.npz"))
    return Case("OnnxRuntime", model, run, size, "images", "logits", labels, public)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    serve_python()  # skips before anything is built
    data, folder = os.environ.get("FEDHELP_DATA_DIR"), tmp_path_factory.mktemp("model")
    return real_case(Path(data), folder) if data else built_case(folder)


@pytest.fixture(scope="module")
def server(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("mlserver")
    with mlserver(folder, case.runtime, case.file, case.output) as served:
        yield served


def images_of(case: Case) -> np.ndarray:
    with np.load(case.public, allow_pickle=False) as file:
        return file["images"]


def prepared(case: Case, images: np.ndarray) -> np.ndarray:
    """What the model is to see of images, in words of its own: uint8 ``[B, S, S, 3]``."""
    side = (case.size, case.size)
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    return np.stack([np.asarray(p.resize(side, Image.Resampling.BICUBIC)) for p in pictures])


def post(server: Served, path: str, tensor: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of a request put together by hand."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps({"inputs": [tensor]}), headers)
        response = connection.getresponse()
        text = response.read().decode()
        assert response.getheader("Content-Type") == "application/json", text
        return response.status, json.loads(text)


def test_server_answers_as_its_model_does_and_writes_down_what_it_saw(case, server):
    pixels = images_of(case)[:2]
    before = len(server.received())
    tensor = {"name": case.input, "datatype": "UINT8", "shape": list(pixels.shape)}
    tensor["data"] = pixels.ravel().tolist()
    path = f"/v2/models/{server.model}/versions/{server.version}/infer"
    status, body = post(server, path, tensor)
    assert status == 200, body
    [answer] = body["outputs"]
    assert (answer["name"], answer["datatype"]) == (case.output, "FP32")
    expected = case.run(prepared(case, pixels))
    assert np.array_equal(np.array(answer["data"], np.float32).reshape(answer["shape"]), expected)
    assert server.received()[before:] == [image_sha256(image) for image in pixels]

    status, body = post(server, path, tensor | {"shape": [1, 2, 3]})
    assert (status, list(body)) == (400, ["error"])
    status, body = post(server, path.replace(server.version, "v0"), tensor)
    assert (status, list(body)) == (404, ["error"])
    assert len(server.received()) == before + 2


def test_teach_stores_what_the_model_itself_answers(case, server, tmp_path):
    settings = {
        "public.path": str(case.public),
        "teacher.url": server.url,
        "teacher.model": server.model,
        "teacher.version": server.version,
        "teacher.input": case.input,
        "teacher.output": case.output,
        "teacher.labels": str(case.labels),
        "teacher.store": str(tmp_path / "store"),
        "mapping.cpu_devices": jax.device_count(),
    }
    overrides = " ".join(f"--config.{key}={value}" for key, value in settings.items())
    command = f"teach --config={CONFIG} {overrides}"
    before = len(server.received())
    assert fedhelp(command) == 0

    images = images_of(case)
    distinct = {image_sha256(image): number for number, image in enumerate(images)}
    received = server.received()[before:]
    assert len(received) == len(distinct)
    assert set(received) == set(distinct)

    flat = served_config.get_config()
    flat.update_from_flattened_dict(settings)
    config = validate(flat)
    public = load_public(config.public, config.data.image_size, config.seed)
    answers = resolve_answers(config.teacher, public)
    assert answers is not None
    assert answers.label_names == tuple(case.labels.read_text().splitlines())
    assert answers.sha256 == tuple(image_sha256(image) for image in images)
    stored = answers.logits[list(distinct.values())]
    expected = case.run(prepared(case, images[list(distinct.values())]))
    assert stored.dtype == expected.dtype == np.float32
    assert np.abs(stored - expected).max() == 0

    assert fedhelp(command) == 0
    assert len(server.received()) == before + len(distinct)
