import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from helpers import public_images
from PIL import Image
from scipy.special import softmax

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.backends.hf_zero_shot import HuggingFaceZeroShot
from fedhelp_jax.teachers.base import FoundationModel, TransientError
from fedhelp_jax.teachers.http import Transport
from fedhelp_jax.teachers.query import QueryLimits, execute, make_plan
from fedhelp_jax.teachers.store import AnswerStore, Precision

LABELS = ("naevus", "mélanome", "benign keratosis", "other")
PATH = "/models/clip"
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (3, 7, 5, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (3, 6, 9), dtype=np.uint8)
PACE = QueryLimits(
    batch_size=16,
    concurrency=2,
    requests_per_second=None,
    max_attempts=1,
    max_backoff=1.0,
    max_queries=None,
)


def scores_of(pixels):
    """What the endpoint says of an image, over `LABELS`: probabilities in float64."""
    logits = np.random.default_rng(int(pixels.sum())).normal(size=len(LABELS))
    return softmax(2 * logits)


def listed(scores, labels=LABELS):
    """As the task answers: the highest score first."""
    rows = [{"label": label, "score": score} for label, score in zip(labels, scores, strict=True)]
    return sorted(rows, key=lambda row: -row["score"])


class Endpoint:
    """A zero-shot endpoint on loopback.

    Attributes:
        answer: Status and body of the answer to an image; scores by its pixels at first.
        requests: Path, headers by lower-case names, and body of each request.
    """

    def __enter__(self):
        self.answer = lambda pixels: (200, json.dumps(listed(scores_of(pixels))).encode())
        self.requests = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                endpoint.requests.append((self.path, headers, body))
                status, content = endpoint.answer(np.asarray(endpoint.image(-1)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format, *args):
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def image(self, number):
        """The image of a request, decoded."""
        encoded = base64.b64decode(json.loads(self.requests[number][2])["inputs"], validate=True)
        image = Image.open(io.BytesIO(encoded), formats=["PNG"])
        image.load()
        return image

    def parameters(self, number):
        return json.loads(self.requests[number][2])["parameters"]

    def model(
        self, template=None, labels=LABELS, version=None, path=PATH, scores="softmax"
    ) -> FoundationModel:
        url = f"http://127.0.0.1:{self._http.server_address[1]}{path}"
        transport = Transport(url, 10.0, None, None)
        return HuggingFaceZeroShot(transport, "openai/clip", version, labels, template, scores)


@pytest.fixture
def endpoint():
    with Endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def model(endpoint):
    model = endpoint.model()
    yield model
    model.close()


# --- what is sent ---


@pytest.mark.parametrize(
    ("images", "mode"),
    [(COLOUR, "RGB"), (GREY, "L"), (GREY[..., None], "L")],
    ids=["colour", "grey", "grey with an axis"],
)
def test_images_are_sent_pixel_by_pixel(endpoint, model, images, mode):
    model.answer(public_images(images))
    assert len(endpoint.requests) == len(images)
    for number, image in enumerate(images):
        received = endpoint.image(number)
        assert received.mode == mode
        np.testing.assert_array_equal(np.asarray(received), image.squeeze())


def test_the_candidates_are_sent_in_their_order(endpoint, model):
    model.answer(public_images(COLOUR[:1]))
    ((path, headers, body),) = endpoint.requests
    assert path == PATH and headers["content-type"] == "application/json"
    assert set(json.loads(body)) == {"inputs", "parameters"}
    assert endpoint.parameters(0) == {"candidate_labels": list(LABELS)}
    assert "authorization" not in headers


def test_a_template_is_sent_as_it_is(endpoint):
    model = endpoint.model("a dermatoscopic image of {}, “x”")
    model.answer(public_images(COLOUR[:1]))
    model.close()
    assert endpoint.parameters(0) == {
        "candidate_labels": list(LABELS),
        "hypothesis_template": "a dermatoscopic image of {}, “x”",
    }


def test_the_plan_knows_how_much_is_sent(endpoint, model):
    images = public_images(COLOUR)
    model.answer(images)
    bodies = [len(body) for _, _, body in endpoint.requests]
    assert model.request_bytes(images) == sum(bodies)
    assert model.request_bytes(images.take([1])) == bodies[1]


def test_the_fingerprint_tells_all_that_decides_the_answers(endpoint):
    fingerprint = endpoint.model().fingerprint
    assert fingerprint.label_names == LABELS and fingerprint.name == "openai/clip"
    others = [
        endpoint.model(template="a {}"),
        endpoint.model(template="the {}"),
        endpoint.model(version="1"),
        endpoint.model(labels=LABELS[::-1]),
    ]
    assert len({fingerprint.digest, *(other.fingerprint.digest for other in others)}) == 5
    # The address is no part of it.
    assert endpoint.model(path="/elsewhere/").fingerprint == fingerprint


# --- what comes back ---


def test_logits_are_log_scores_in_the_order_of_the_candidates(endpoint, model):
    images = public_images(COLOUR)
    logits = model.answer(images)
    assert logits.dtype == np.float32 and logits.shape == (3, len(LABELS))
    expected = np.array([np.log(scores_of(image)) for image in COLOUR])
    # Or else an answer that was not put in order would pass.
    assert all(list(row) != sorted(row, reverse=True) for row in expected)
    np.testing.assert_array_equal(logits, expected.astype(np.float32))
    np.testing.assert_array_equal(model.answer(images.take([2, 0])), logits[[2, 0]])


def test_scores_that_were_rounded_to_nothing_stay_finite(endpoint, model):
    scores = [0.0, 1.0, 1e-9, 2e-7]
    endpoint.answer = lambda pixels: (200, json.dumps(listed(scores)).encode())
    (logits,) = model.answer(public_images(COLOUR[:1]))
    np.testing.assert_allclose(logits, np.log([1e-7, 1.0, 1e-7, 2e-7]), rtol=1e-6)


@pytest.mark.parametrize(
    "scores",
    [[0.333, 0.333, 0.333, 0.0], [0.33, 0.33, 0.33, 0.0], [0.26, 0.26, 0.25, 0.25]],
    ids=["three digits", "two, 0.99", "two, 1.02"],
)
def test_scores_may_be_rounded(endpoint, model, scores):
    endpoint.answer = lambda pixels: (200, json.dumps(listed(scores)).encode())
    (logits,) = model.answer(public_images(COLOUR[:1]))
    np.testing.assert_allclose(np.exp(logits), np.maximum(scores, 1e-7), rtol=1e-6)


def test_scores_of_sigmoids_give_back_their_logits(endpoint):
    """As of a SigLIP, which scores each label by itself; rounded to 0 or 1 they stay finite."""
    logits = np.array([-12.0, -3.0, 0.5, 4.0])
    scores = 1 / (1 + np.exp(-logits))
    endpoint.answer = lambda pixels: (200, json.dumps(listed(scores.tolist())).encode())
    model = endpoint.model(scores="sigmoid")
    np.testing.assert_allclose(model.answer(public_images(COLOUR[:1]))[0], logits, rtol=1e-5)
    endpoint.answer = lambda pixels: (200, json.dumps(listed([0.0, 1.0, 0.5, 1.0])).encode())
    (found,) = model.answer(public_images(COLOUR[:1]))
    np.testing.assert_allclose(found, np.log(1e7) * np.array([-1, 1, 0, 1]), rtol=1e-5)
    model.close()
    assert model.fingerprint != endpoint.model().fingerprint


GOOD = [0.1, 0.2, 0.3, 0.4]
REFUSED = {
    "a label less": (listed([0.3, 0.3, 0.4], LABELS[:3]), "scores 3 labels, not the 4 candidates"),
    "a label more": (listed([*GOOD, 0.0], (*LABELS, "x")), "scores 5 labels, not the 4"),
    "another label": (listed(GOOD, (*LABELS[:3], "x")), "not the 4 candidates"),
    "labels of another case": (listed(GOOD, [label.upper() for label in LABELS]), "candidates"),
    "a label twice": (listed([*GOOD, 0.2], (*LABELS, LABELS[1])), "candidates"),
    "nothing": ([], "scores 0 labels"),
    "logits": (listed([4.0, -1.0, 2.0, 0.5]), "must be probabilities"),
    "too little": (listed([0.1, 0.1, 0.1, 0.1]), "add up to 0.4; if the model scores each label"),
    "more than rounding": (listed([0.333, 0.333, 0.313, 0.0]), "add up to 0.979; if the model"),
    "too much": (listed([0.9, 0.1, 0.2, 0.0]), "add up to 1.2"),
    "negative": (listed([-0.2, 0.2, 0.5, 0.5]), "must be probabilities"),
    "nan": (listed([float("nan"), 0.2, 0.4, 0.4]), "must be probabilities"),
    "infinite": (listed([float("inf"), 0.2, 0.4, 0.4]), "must be probabilities"),
    "no number": ([{"label": label, "score": "high"} for label in LABELS], "no list of labels"),
    "no score": ([{"label": label} for label in LABELS], "no list of labels and scores"),
    "null": ([{"label": label, "score": None} for label in LABELS], "no list of labels"),
    "an enormous number": ([{"label": label, "score": 10**400} for label in LABELS], "list"),
    "numbers": (GOOD, "no list of labels and scores: [0.1, 0.2, 0.3, 0.4]"),
    "lists": ([[row] for row in listed(GOOD)], "no list of labels and scores"),
    "by label": (dict(zip(LABELS, GOOD, strict=True)), "no list of labels and scores"),
    "an error": ({"error": "Model is loading"}, 'scores: {"error": "Model is loading"}'),
    "a number": (7, "no list of labels and scores"),
    "html": (b"<html>\n<body>Sign in</body>\n</html>", "scores: <html> <body>Sign in"),
    "no text": (b"\xff\xfe\x00", "no list of labels and scores"),
    "empty": (b"", "the answer is no list of labels and scores"),
    "deep": (b"[" * 100_000, "no list of labels and scores"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_that_is_none_is_refused_in_one_line(endpoint, model, name):
    content, words = REFUSED[name]
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    endpoint.answer = lambda pixels: (200, content)
    with pytest.raises(UserError) as error:
        model.answer(public_images(COLOUR[:1]))
    message = str(error.value)
    assert message.startswith("teacher.url: ") and "\n" not in message and len(message) < 300
    assert words in message
    assert len(endpoint.requests) == 1


def test_a_model_that_is_loading_may_be_asked_again(endpoint, model):
    endpoint.answer = lambda pixels: (503, b'{"error": "Model is loading"}')
    with pytest.raises(TransientError, match="503: .*Model is loading"):
        model.answer(public_images(COLOUR[:1]))


# --- asked as a whole ---


def test_each_image_is_a_request(tmp_path, endpoint, model):
    images = public_images([*COLOUR, *GREY, COLOUR[1]])
    with AnswerStore(tmp_path / "store", model.fingerprint, Precision()) as store:
        plan = make_plan(model, images, store, PACE)
    assert [len(batch) for batch in plan.batches] == [1] * 6 and plan.to_ask == 6
    with AnswerStore(tmp_path / "store", model.fingerprint, Precision(), write=True) as store:
        execute(plan, model, images, store, PACE, lambda count: None)
        found = store.read(images.sha256)
    assert len(endpoint.requests) == 6
    for sha, image in zip(images.sha256, [*COLOUR, *GREY], strict=True):
        np.testing.assert_array_equal(
            found[sha].answer, np.log(scores_of(image)).astype(np.float32)
        )
