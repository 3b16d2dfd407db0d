import hashlib
import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import public_images
from PIL import Image

from fedhelp_jax.teachers.backends.litert import LiteRTModel
from fedhelp_jax.teachers.base import FoundationModel
from fedhelp_jax.teachers.preprocessing import Preprocessing

litert = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is absent")
if importlib.util.find_spec("flatbuffers") is None:
    pytest.skip("flatbuffers, which writes the files, is absent", allow_module_level=True)
import flatbuffers  # noqa: E402
from ai_edge_litert import schema_py_generated as schema  # noqa: E402

SIDE, CLASSES = 4, 3
LABELS = ("a", "b", "c")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
WEIGHTS = RNG.normal(size=(CLASSES, SIDE * SIDE * 3)).astype(np.float32)
BIAS = RNG.normal(size=CLASSES).astype(np.float32)
# (scale, zero point) of the input, the weights and the output of quantised files.
QUANTISED = {
    np.uint8: ((0.01, 128), (0.02, 120), (0.5, 130)),
    np.int8: ((0.01, 0), (0.02, 0), (0.5, 3)),
}
TYPES = {np.float32: 0, np.int32: 2, np.uint8: 3, np.int8: 9}


class Writer:
    """Writes LiteRT files of a few dense layers, without TensorFlow."""

    def __init__(self):
        self.buffers, self.tensors, self.operators = [schema.BufferT()], [], []

    def tensor(self, name, shape, dtype=np.float32, *, data=None, quantised=None, free=()):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, list(shape), TYPES[dtype]
        tensor.shapeSignature = [-1 if i in free else n for i, n in enumerate(shape)]
        if quantised is not None:
            tensor.quantization = schema.QuantizationParametersT()
            scales, zeros = (np.atleast_1d(part) for part in quantised)
            tensor.quantization.scale = scales.astype(np.float32)
            tensor.quantization.zeroPoint = zeros.astype(np.int64)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.asarray(data, dtype).tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, code, options_type, options, inputs, outputs):
        operator = schema.OperatorT()
        operator.opcodeIndex = code
        operator.inputs, operator.outputs = inputs, outputs
        operator.builtinOptionsType, operator.builtinOptions = options_type, options
        self.operators.append(operator)

    def dense(self, inputs, outputs):
        options = schema.FullyConnectedOptionsT()
        kind = schema.BuiltinOptions.FullyConnectedOptions
        self.operator(0, kind, options, inputs, outputs)

    def softmax(self, inputs, outputs):
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        self.operator(1, schema.BuiltinOptions.SoftmaxOptions, options, inputs, outputs)

    def write(self, path, inputs, outputs):
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = inputs, outputs
        codes = []
        for builtin, version in ((9, 4), (25, 1)):  # FULLY_CONNECTED, SOFTMAX
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = builtin
            code.version = version
            codes.append(code)
        model = schema.ModelT()
        model.version, model.operatorCodes = 3, codes
        model.subgraphs, model.buffers = [graph], self.buffers
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())
        return path


def float_file(path, *, batch=1, free=(), side=SIDE):
    """``softmax(logits)``, ``logits = pixels W' + b``, and the probabilities first."""
    file = Writer()
    image = file.tensor("image", (batch, side, side, 3), free=free)
    weights = file.tensor("weights", WEIGHTS.shape, data=WEIGHTS)
    bias = file.tensor("bias", BIAS.shape, data=BIAS)
    logits = file.tensor("logits", (batch, CLASSES), free=free[:1])
    probabilities = file.tensor("probabilities", (batch, CLASSES), free=free[:1])
    file.dense([image, weights, bias], [logits])
    file.softmax([logits], [probabilities])
    return file.write(path, [image], [probabilities])


def quantised_file(path, dtype):
    """``pixels W'`` in 8 bits, and the integer weights it holds."""
    pixels, weights, answers = QUANTISED[dtype]
    limits = np.iinfo(dtype)
    q = np.clip(np.round(WEIGHTS / weights[0]) + weights[1], limits.min, limits.max).astype(dtype)
    file = Writer()
    image = file.tensor("image", (1, SIDE, SIDE, 3), dtype, quantised=pixels)
    kernel = file.tensor("weights", q.shape, dtype, data=q, quantised=weights)
    scale = pixels[0] * weights[0]
    bias = file.tensor("bias", (CLASSES,), np.int32, data=np.zeros(3), quantised=(scale, 0))
    logits = file.tensor("logits", (1, CLASSES), dtype, quantised=answers)
    file.dense([image, kernel, bias], [logits])
    return file.write(path, [image], [logits]), q


def logits_of(pixels):
    """In float64, of pixels ``[B, H, W, 3]``."""
    flat = np.asarray(pixels, np.float64).reshape(len(pixels), -1)
    return flat @ WEIGHTS.astype(np.float64).T + BIAS


def model(path, labels=LABELS, output=None, **preprocessing):
    return LiteRTModel(path, labels, output, Preprocessing(**preprocessing))


def refusal(make, *images):
    """The one line that making a model, or asking it, is refused with."""
    return helpers.refusal(lambda: make().answer(*images))


@pytest.fixture
def path(tmp_path):
    return float_file(tmp_path / "tiny.tflite")


# --- what comes out ---


def test_logits_inside_the_graph(path):
    asked: FoundationModel = model(path, output="logits", scale="unit")
    got = asked.answer(public_images(IMAGES))
    assert got.dtype == np.float32 and got.shape == (5, CLASSES)
    np.testing.assert_allclose(got, logits_of(IMAGES / 255), rtol=0, atol=1e-5)
    asked.close()
    np.testing.assert_array_equal(asked.answer(public_images(IMAGES)), got)


def test_the_first_output_where_none_is_named(path):
    got = model(path, scale="unit").answer(public_images(IMAGES))
    powers = np.exp(logits_of(IMAGES / 255))
    np.testing.assert_allclose(got, powers / powers.sum(axis=1, keepdims=True), atol=1e-6)
    named = model(path, output="probabilities", scale="unit").answer(public_images(IMAGES))
    np.testing.assert_array_equal(named, got)


def test_pixels_as_they_are_go_into_a_float_input(path):
    got = model(path, output="logits").answer(public_images(IMAGES))
    np.testing.assert_allclose(got, logits_of(IMAGES), rtol=1e-5, atol=1e-3)


def test_other_sizes_are_resized(path):
    pictures = RNG.integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    resized = [Image.fromarray(p).resize((SIDE, SIDE), Image.BICUBIC) for p in pictures]
    got = model(path, output="logits", size=SIDE, scale="unit").answer(public_images(pictures))
    np.testing.assert_allclose(got, logits_of(np.stack(resized) / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "free"), [(1, (0,)), (1, (0, 1, 2)), (2, ()), (7, ())])
def test_batches_free_or_fixed_at_a_number(tmp_path, batch, free):
    """5 images: in one batch, in three of which the last is short, in one that is too large."""
    path = float_file(tmp_path / "tiny.tflite", batch=batch, free=free)
    got = model(path, output="logits", scale="unit").answer(public_images(IMAGES))
    np.testing.assert_allclose(got, logits_of(IMAGES / 255), rtol=0, atol=1e-5)


def test_a_free_batch_may_change(tmp_path):
    asked = model(float_file(tmp_path / "t.tflite", free=(0,)), output="logits", scale="unit")
    for count in (5, 2, 5):
        got = asked.answer(public_images(IMAGES[:count]))
        np.testing.assert_allclose(got, logits_of(IMAGES[:count] / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("scale", ["uint8", "signed"])
def test_quantised_files(tmp_path, dtype, scale):
    """Integer arithmetic once more: inputs quantised or as they are, outputs de-quantised."""
    path, kernel = quantised_file(tmp_path / "q.tflite", dtype)
    (step, zero), (w_step, w_zero), (o_step, o_zero) = QUANTISED[dtype]
    if scale == "uint8":
        q = IMAGES.astype(int) - (128 if dtype == np.int8 else 0)
    else:
        q = np.round((IMAGES / 127.5 - 1) / step) + zero
        q = np.clip(q, np.iinfo(dtype).min, np.iinfo(dtype).max)
    sums = (q.reshape(5, -1) - zero) @ (kernel.astype(float) - w_zero).T * step * w_step
    got = model(path, scale=scale).answer(public_images(IMAGES))
    assert got.dtype == np.float32
    # Multiples of the output's step, each the nearest one; a tie may fall either way.
    np.testing.assert_array_equal(got, np.float32(o_step) * np.round(got / o_step))
    low, high = ((limit - o_zero) * o_step for limit in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    np.testing.assert_allclose(got, np.clip(sums, low, high), rtol=0, atol=o_step / 2 + 1e-3)
    assert np.ptp(got) > 2 * o_step


def test_answers_from_several_threads(path):
    asked = model(path, output="logits", scale="unit")
    barrier = threading.Barrier(4)

    def ask(row):
        barrier.wait(timeout=30)
        return [asked.answer(public_images(IMAGES[row : row + 1])) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    expected = asked.answer(public_images(IMAGES))
    for row, several in enumerate(answers):
        for got in several:
            np.testing.assert_array_equal(got[0], expected[row])


# --- its fingerprint ---


def test_the_fingerprint_needs_no_library(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    asked = model(path, output="logits", size=SIDE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = ("tiny", f"sha256 {digest[:12]}", "bicubic 4, uint8, nhwc, output logits", LABELS)
    assert asked.fingerprint == expected
    assert model(path).fingerprint.preprocessing == "native size, uint8, nhwc, first output"
    message = refusal(lambda: asked, public_images(IMAGES))
    assert message.startswith("teacher.name: litert needs the package ai_edge_litert")
    assert "pip install 'fedhelp_jax[litert]'" in message


def test_the_file_is_hashed_once(path, monkeypatch):
    opened = []
    original = Path.open

    def counting(self, *arguments, **options):
        opened.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", counting)
    asked = model(path, output="logits", scale="unit")
    for _ in range(3):
        asked.answer(public_images(IMAGES))
        assert asked.fingerprint.digest
    assert opened == [path]


# --- what is wrong ---


def test_files_that_are_none(tmp_path):
    images = public_images(IMAGES)
    gone = tmp_path / "gone.tflite"
    assert refusal(lambda: model(gone)) == f"teacher.path: there is no file {gone}"
    assert f"teacher.path: {tmp_path} cannot be read" in refusal(lambda: model(tmp_path))
    good = float_file(tmp_path / "good.tflite").read_bytes()
    for content in (b"", b"no model", good[: len(good) // 2], b"\x18\x00\x00\x00TFL3" + 64 * b"\0"):
        gone.write_bytes(content)
        message = refusal(lambda: model(gone), images)
        assert message.startswith(f"teacher.path: {gone} is no model that litert can run (")


def test_an_unknown_output_is_told_the_closest(path):
    message = refusal(lambda: model(path, output="logit"), public_images(IMAGES))
    assert message.startswith(f"teacher.output: {path} has no 'logit'; the closest are 'logits', ")


def test_what_does_not_fit(path, tmp_path):
    images = public_images(IMAGES)
    message = refusal(lambda: model(path, size=8), images)
    assert message.startswith(
        f"teacher.image_size: {path} takes images [4, 4, 3], and they come as"
    )
    assert "[8, 8, 3] (bicubic 8, uint8, nhwc)" in message
    assert "come as [3, 4, 4]" in refusal(lambda: model(path, layout="nchw"), images)
    message = refusal(lambda: model(path, ("a", "b")), images)
    assert message.startswith("teacher.labels: 2 names for the 3 classes of the output of")
    assert model(path, ()).answer(images).shape == (5, 3)  # an embedding has no names
    message = refusal(lambda: model(path, output="weights"), images)
    assert message.startswith(f"teacher.output: the output weights of {path} has the shape [3, 48]")
    assert "has the shape [3]" in refusal(lambda: model(path, output="bias"), images)


def test_integers_without_a_scale_are_no_answers(tmp_path):
    file = Writer()
    image = file.tensor("image", (1, SIDE, SIDE, 3))
    kernel = file.tensor("weights", WEIGHTS.shape, data=WEIGHTS)
    logits = file.tensor("logits", (1, CLASSES))
    order = file.tensor("order", (1, CLASSES), np.int32, data=[[2, 0, 1]])
    channels = (np.full(CLASSES, 0.1), np.zeros(CLASSES))
    file.tensor("int8", (CLASSES, 1), np.int8, data=np.zeros((3, 1)), quantised=channels)
    file.dense([image, kernel, -1], [logits])
    path = file.write(tmp_path / "t.tflite", [image], [logits, order])
    message = refusal(lambda: model(path, output="order"), public_images(IMAGES))
    assert f"teacher.output: the output order of {path} is int32, which is neither" in message
    message = refusal(lambda: model(path, output="int8"), public_images(IMAGES))
    assert f"'int8' of {path} holds weights" in message


def test_two_inputs_are_one_too_many(tmp_path):
    file = Writer()
    image = file.tensor("image", (1, SIDE, SIDE, 3))
    kernel = file.tensor("kernel", WEIGHTS.shape)
    logits = file.tensor("logits", (1, CLASSES))
    file.dense([image, kernel, -1], [logits])
    path = file.write(tmp_path / "t.tflite", [image, kernel], [logits])
    message = refusal(lambda: model(path), public_images(IMAGES))
    assert message.endswith("must have one input, the image; it has 'image', 'kernel'")


# --- a real network ---


def test_mobilenet_answers_as_its_interpreter_does(real):
    """Bit for bit, asked in the plainest way: as in the studies of docs/results.md."""
    folder, images = real / "models", real / "pathmnist_1000_clip.npz"
    path = folder / "mobilenet_v2_1.0_224_quant.tflite"
    labels = tuple((folder / "imagenet_labels.txt").read_text().splitlines())
    with np.load(images, allow_pickle=False) as file:
        images = file["images"][:5]
    with pytest.warns(UserWarning, match="preserve_all_tensors"):
        network = litert.Interpreter(str(path), experimental_preserve_all_tensors=True)
    network.allocate_tensors()
    name = "MobilenetV2/Logits/Squeeze1"
    tensor = next(d for d in network.get_tensor_details() if d["name"] == name)
    scale, zero = tensor["quantization"]
    expected = []
    for image in images:
        picture = Image.fromarray(image).convert("RGB").resize((224, 224), Image.BICUBIC)
        network.set_tensor(network.get_input_details()[0]["index"], np.asarray(picture)[None])
        network.invoke()
        expected.append((network.get_tensor(tensor["index"])[0].astype(np.float32) - zero) * scale)
    got = model(path, labels, name, size=224).answer(public_images(images))
    assert got.shape == (5, 1001) and np.ptp(got) > 5
    np.testing.assert_array_equal(got, np.stack(expected))
    pooled = model(path, (), "MobilenetV2/Logits/AvgPool", size=224)
    assert pooled.answer(public_images(images)).shape == (5, 1280)
