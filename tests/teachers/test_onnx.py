import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor

import helpers
import numpy as np
import pytest
from helpers import public_images

from fedhelp_jax.teachers.backends.onnx import OnnxModel
from fedhelp_jax.teachers.base import FoundationModel
from fedhelp_jax.teachers.preprocessing import Preprocessing

pytest.importorskip("onnxruntime", reason="onnxruntime is absent")
onnx = pytest.importorskip("onnx", reason="onnx, which writes the files, is absent")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

SIDE, WIDTH, CLASSES = 5, 4, 3
LABELS = ("a", "b", "c")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
KERNEL = RNG.normal(size=(WIDTH, 3, 3, 3)).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32)
BIAS = RNG.normal(size=CLASSES).astype(np.float32)
FLOAT, UINT8, HALF, INT64 = 1, 2, 10, 7  # of onnx.TensorProto


def write(path, nodes, inputs, outputs, weights=(), **options):
    """A file of an opset and a version of the format that old runtimes read too."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save_model(model, str(path), **options)
    return path


def network(path, *, batch="N", kind=FLOAT, side=SIDE, **options):
    """A convolution, ReLU, mean over space, and a linear head; all of them outputs."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=FLOAT),
        helper.make_node("Conv", ["pixels", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "head", "bias"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["named"], axis=1),
    ]
    outputs = [
        ("logits", FLOAT, [batch, CLASSES]),
        ("maps", FLOAT, None),
        ("pooled", FLOAT, None),
        ("named", INT64, None),
        ("kernel_out", FLOAT, None),
    ]
    nodes.append(helper.make_node("Identity", ["kernel"], ["kernel_out"]))
    weights = [("kernel", KERNEL), ("head", HEAD), ("bias", BIAS)]
    return write(
        path, nodes, [("image", kind, [batch, 3, side, side])], outputs, weights, **options
    )


def maps_of(pixels):
    """ReLU of the convolution of ``[B, H, W, 3]``, in float64, ``[B, H, W, WIDTH]``."""
    padded = np.pad(np.asarray(pixels, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = sum(
        padded[:, i : i + SIDE, j : j + SIDE] @ KERNEL[:, :, i, j].T.astype(np.float64)
        for i in range(3)
        for j in range(3)
    )
    return np.maximum(out, 0)


def logits_of(pixels):
    return maps_of(pixels).mean(axis=(1, 2)) @ HEAD.astype(np.float64) + BIAS


def model(path, labels=LABELS, input=None, output=None, **preprocessing):
    return OnnxModel(path, labels, input, output, Preprocessing(layout="nchw", **preprocessing))


def refusal(make, *images):
    """The one line that making a model, or asking it, is refused with."""
    return helpers.refusal(lambda: make().answer(*images))


@pytest.fixture
def path(tmp_path):
    return network(tmp_path / "tiny.onnx")


@pytest.fixture
def images():
    return public_images(IMAGES)


# --- what comes out ---


def test_logits(path, images):
    asked: FoundationModel = model(path, scale="unit")
    got = asked.answer(images)
    assert got.dtype == np.float32 and got.shape == (5, CLASSES)
    np.testing.assert_allclose(got, logits_of(IMAGES / 255), rtol=0, atol=1e-5)
    named = model(path, input="image", output="logits", scale="unit").answer(images)
    np.testing.assert_array_equal(named, got)
    asked.close()
    np.testing.assert_array_equal(asked.answer(images), got)
    assert asked.request_bytes(images) == 0


def test_masks_have_their_classes_last(path, images):
    got = model(path, (), output="maps", scale="unit").answer(images)
    assert got.shape == (5, SIDE, SIDE, WIDTH)
    np.testing.assert_allclose(got, maps_of(IMAGES / 255), rtol=0, atol=1e-5)


def test_pooled_features_are_one_vector(path, images):
    got = model(path, (), output="pooled", scale="unit").answer(images)
    np.testing.assert_allclose(got, maps_of(IMAGES / 255).mean(axis=(1, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", ["N", 1, 2, 7])
def test_batches_free_or_fixed_at_a_number(tmp_path, images, batch):
    """5 images: in one batch, one by one, in three with the last short, in one too large."""
    path = network(tmp_path / "tiny.onnx", batch=batch)
    got = model(path, scale="unit").answer(images)
    np.testing.assert_allclose(got, logits_of(IMAGES / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [FLOAT, UINT8, HALF])
def test_pixels_as_they_are(tmp_path, images, kind):
    got = model(network(tmp_path / "t.onnx", kind=kind)).answer(images)
    np.testing.assert_allclose(got, logits_of(IMAGES), rtol=1e-5, atol=1e-3)


def test_sides_may_be_free(tmp_path, images):
    path = network(tmp_path / "t.onnx", side="S")
    got = model(path, scale="unit").answer(images)
    np.testing.assert_allclose(got, logits_of(IMAGES / 255), rtol=0, atol=1e-5)
    assert model(path, size=9).answer(images).shape == (5, CLASSES)


def test_answers_from_several_threads(path, images):
    asked = model(path, scale="unit")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda row: asked.answer(images.take([row])), [*range(5)] * 8))
    whole = asked.answer(images)
    for number, got in enumerate(answers):
        np.testing.assert_allclose(got[0], whole[number % 5], rtol=0, atol=1e-5)


# --- its fingerprint ---


def test_the_fingerprint_needs_no_library(path, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    asked = model(path, output="logits", size=SIDE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = ("tiny", f"sha256 {digest[:12]}", "bicubic 5, uint8, nchw, output logits", LABELS)
    assert asked.fingerprint == expected
    assert model(path).fingerprint.preprocessing.endswith(", first output")
    message = refusal(lambda: asked, images)
    assert message.startswith("teacher.name: onnx needs the package onnxruntime, which is not")
    assert message.endswith("pip install 'fedhelp_jax[onnx]'")


def test_weights_beside_the_file_count(tmp_path, images):
    """An exporter's second file: its bytes decide the answers, so the fingerprint too."""
    path = tmp_path / "tiny.onnx"
    network(path, save_as_external_data=True, location="tiny.onnx.data", size_threshold=0)
    asked = model(path, scale="unit")
    np.testing.assert_allclose(asked.answer(images), logits_of(IMAGES / 255), rtol=0, atol=1e-5)
    beside = tmp_path / "tiny.onnx.data"
    content = bytearray(beside.read_bytes())
    content[0] ^= 1
    beside.write_bytes(content)
    assert model(path, scale="unit").fingerprint.version != asked.fingerprint.version


# --- what is wrong ---


def test_files_that_are_none(tmp_path, images, capfd):
    gone = tmp_path / "gone.onnx"
    assert refusal(lambda: model(gone)) == f"teacher.path: there is no file {gone}"
    assert f"teacher.path: {tmp_path} cannot be read" in refusal(lambda: model(tmp_path))
    good = network(tmp_path / "good.onnx").read_bytes()
    for content in (b"", b"no model", good[: len(good) // 2]):
        gone.write_bytes(content)
        message = refusal(lambda: model(gone), images)
        assert message.startswith(f"teacher.path: {gone} is no model that onnx can run (")
    assert capfd.readouterr().err == ""


def test_unknown_tensors_are_told_the_closest(path, images):
    message = refusal(lambda: model(path, output="logit"), images)
    assert message.startswith(f"teacher.output: {path} has no 'logit'; the closest are 'logits', ")
    message = refusal(lambda: model(path, input="images"), images)
    assert message == f"teacher.input: {path} has no 'images'; the closest are 'image'"


def test_what_does_not_fit(path, tmp_path, images, capfd):
    message = refusal(lambda: model(path, size=8), images)
    assert message.startswith(
        f"teacher.image_size: {path} takes images [3, 5, 5], and they come as"
    )
    message = refusal(lambda: OnnxModel(path, (), None, None, Preprocessing(5)), images)
    assert "come as [5, 5, 3] (bicubic 5, uint8, nhwc)" in message
    message = refusal(lambda: model(path, ("a",)), images)
    assert message.startswith("teacher.labels: 1 names for the 3 classes of the output of")
    message = refusal(lambda: model(path, output="named"), images)
    assert "the output named of" in message and "is int64, which is neither" in message
    message = refusal(lambda: model(path, output="kernel_out"), images)
    assert message.startswith("teacher.output: ") and "has the shape [4, 3, 3, 3]" in message
    path = network(tmp_path / "uint8.onnx", kind=UINT8)
    message = refusal(lambda: model(path, scale="unit"), images)
    assert message.startswith("teacher.scale: ") and "set teacher.scale=uint8" in message
    path = network(tmp_path / "integers.onnx", kind=INT64)
    assert "takes tensor(int64); images come as" in refusal(lambda: model(path), images)
    assert capfd.readouterr().err == ""


def test_two_inputs_are_one_too_many(tmp_path, images):
    inputs = [(name, FLOAT, ["N", 3, SIDE, SIDE]) for name in ("image", "mask")]
    nodes = [helper.make_node("Mul", ["image", "mask"], ["product"])]
    path = write(tmp_path / "t.onnx", nodes, inputs, [("product", FLOAT, None)])
    message = refusal(lambda: model(path, input="image"), images)
    assert message.endswith("must have one input, the image; it has 'image', 'mask'")


def test_an_error_while_it_runs_is_one_line(tmp_path, images, capfd):
    shape = ("shape", np.array([7, 11], np.int64))
    nodes = [helper.make_node("Reshape", ["image", "shape"], ["out"])]
    inputs = [("image", FLOAT, ["N", 3, "H", "W"])]
    path = write(tmp_path / "t.onnx", nodes, inputs, [("out", FLOAT, [7, 11])], [shape])
    message = refusal(lambda: model(path), images)
    assert message.startswith(f"teacher.path: {path} is no model that onnx can run (")
    assert capfd.readouterr().err == ""
