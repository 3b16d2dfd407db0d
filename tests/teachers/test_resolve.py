import dataclasses

import numpy as np
import pytest
from fake_model import FakeModel
from helpers import PUBLIC_CLASSES, refusal, tiny_dataset, tiny_public
from scipy.special import expit, softmax

from fedhelp_jax.experiments import teach as teach_lib
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.settings.schema import FoundationConfig, PublicConfig, TeacherConfig
from fedhelp_jax.teachers import resolve
from fedhelp_jax.teachers.answers import Answers, save_answers
from fedhelp_jax.teachers.heads import linear_probe_logits
from fedhelp_jax.teachers.resolve import (
    AnswersMissing,
    foundation_model,
    open_store,
    resolve_answers,
)
from fedhelp_jax.teachers.store import Precision, decode, encode

COUNT, WIDTH = 60, 6
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def public():
    """Images of which some are there twice."""
    public = tiny_public(COUNT)
    order = [*range(COUNT), 3, 0, 3]
    return public._replace(
        images=public.images[order],
        labels=public.labels[order],
        sha256=tuple(public.sha256[i] for i in order),
        originals=public.originals[order],
    )


def rows(*shape, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=(COUNT, *shape))).astype(np.float32)


def given(answers):
    """Answers to the images, in their order; the last three are those of images before."""
    return np.concatenate([answers, answers[[3, 0, 3]]])


def file_of(path, public, logits, names=NAMES, fingerprint="mine"):
    """A file of answers, in another order than the images."""
    order = np.random.default_rng(9).permutation(COUNT)
    sha256 = tuple(public.sha256[i] for i in order)
    save_answers(path, Answers(logits[order], sha256, names, fingerprint))
    return str(path)


def stored_in(path, public, logits, names=NAMES, fingerprint="mine", **settings):
    """The settings of a teacher whose answers are in a file."""
    path = file_of(path, public, logits, names, fingerprint)
    return FoundationConfig(name="stored", path=path, **settings)


def served(tmp_path, model="clip", **settings):
    """The settings of a served teacher; nobody answers at that address."""
    return FoundationConfig(
        name="open_inference",
        url="https://models.example.org",
        model=model,
        store=str(tmp_path / "store"),
        **settings,
    )


def teacher(config, **settings):
    """One model as the teacher."""
    return TeacherConfig(**dataclasses.asdict(config), **settings)


def ensemble(*members, weights=()):
    return TeacherConfig(name="ensemble", members=members, weights=weights)


def fill(config, public, answers, count=COUNT):
    """Stores a served model's answers to the first images."""
    model = foundation_model(config, public)
    with open_store(config, model, write=True) as store:
        store.put(public.sha256[:count], answers[:count])


@pytest.fixture
def labels(tmp_path):
    """A text file of the classes, as somebody wrote it."""
    path = tmp_path / "labels.txt"
    path.write_bytes(b"a\r\n\n  b \nc\nd\n\n")
    return str(path)


# --- ensembles ---


@pytest.mark.parametrize("spatial", [(), (2, 3)])
@pytest.mark.parametrize("weights", [(), (0.7, 0.2, 0.1), (14.0, 4.0, 2.0)])
def test_an_ensemble_averages_probabilities(tmp_path, public, spatial, weights):
    logits = [rows(*spatial, len(NAMES), seed=seed) for seed in range(3)]
    members = [stored_in(tmp_path / f"{i}.npz", public, z) for i, z in enumerate(logits)]
    answers = resolve_answers(ensemble(*members, weights=weights), public)
    shares = np.array(weights or [1, 1, 1], np.float64)
    shares /= shares.sum()
    probs = np.tensordot(shares, [softmax(z.astype(np.float64), axis=-1) for z in logits], 1)
    assert answers.logits.dtype == np.float32
    np.testing.assert_allclose(answers.logits, given(np.log(probs)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(softmax(answers.logits, axis=-1).sum(-1), 1, rtol=1e-6)
    assert answers.sha256 == public.sha256 and answers.label_names == NAMES


def test_an_ensemble_of_one_foreground_class_averages_its_probability(tmp_path, public):
    logits = [rows(2, 3, 1, seed=seed) for seed in range(2)]
    members = [stored_in(tmp_path / f"{i}.npz", public, z, ("lung",)) for i, z in enumerate(logits)]
    answers = resolve_answers(ensemble(*members, weights=(3.0, 1.0)), public)
    probs = 0.75 * expit(given(logits[0])) + 0.25 * expit(given(logits[1]))
    np.testing.assert_allclose(expit(answers.logits), probs, rtol=1e-5)


def test_an_ensemble_says_what_it_is_of(tmp_path, public):
    members = [
        stored_in(tmp_path / f"{name}.npz", public, rows(len(NAMES)), fingerprint=name)
        for name in ("first", "second")
    ]
    answers = resolve_answers(ensemble(*members, weights=(3.0, 1.0)), public)
    assert answers.fingerprint == "ensemble of 0.75 first + 0.25 second"


def test_an_ensemble_of_one_is_that_one(tmp_path, public):
    logits = rows(len(NAMES))
    member = stored_in(tmp_path / "a.npz", public, logits)
    answers = resolve_answers(ensemble(member), public)
    expected = softmax(given(logits).astype(np.float64), axis=-1)
    np.testing.assert_allclose(softmax(answers.logits, axis=-1), expected, rtol=1e-5)
    alone = resolve_answers(teacher(member), public)
    np.testing.assert_array_equal(alone.logits, given(logits))


def test_extreme_logits_of_a_member_stay_finite(tmp_path, public):
    logits = [np.full((COUNT, len(NAMES)), fill, np.float32) for fill in (1e30, -1e30)]
    logits[0][:, 1], logits[1][:, 1] = -1e30, 1e30
    members = [stored_in(tmp_path / f"{i}.npz", public, z) for i, z in enumerate(logits)]
    answers = resolve_answers(ensemble(*members, weights=(0.4, 0.6)), public)
    expected = np.log([0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3])
    np.testing.assert_allclose(answers.logits, np.tile(expected, (COUNT + 3, 1)), rtol=1e-6)


@pytest.mark.parametrize("names", [NAMES[::-1], (*NAMES, "e"), NAMES[:3]])
def test_members_need_the_same_classes_in_the_same_order(tmp_path, public, names):
    members = [
        stored_in(tmp_path / "0.npz", public, rows(len(NAMES))),
        stored_in(tmp_path / "1.npz", public, rows(len(NAMES), seed=1)),
        stored_in(tmp_path / "2.npz", public, rows(len(names)), names),
    ]
    message = refusal(lambda: resolve_answers(ensemble(*members), public))
    assert message.startswith("teacher.members: member 2 has other classes than member 0")
    assert message.endswith("same order")
    masks = stored_in(tmp_path / "3.npz", public, rows(2, len(NAMES)))
    message = refusal(lambda: resolve_answers(ensemble(members[0], masks), public))
    assert message.startswith("teacher.members: member 1 has other classes than member 0")


# --- members are asked and stored one by one ---


@pytest.fixture
def fakes(monkeypatch, public):
    """Fake models by name in place of those at addresses, and tiny data."""
    found = {name: FakeModel(name, NAMES) for name in ("first", "second", "third")}

    def fake(config, _):
        return found[config.model]

    for module in (resolve, teach_lib):
        monkeypatch.setattr(module, "foundation_model", fake)
    monkeypatch.setattr(teach_lib, "read_data", lambda *_, **__: (tiny_dataset(), public))
    note = {"images": 0, "classes": 0, "look_like_probabilities": False, "note": "takes seconds"}
    monkeypatch.setattr(teach_lib, "agreement", lambda *_: note)
    return found


def run_of(config):
    return RunConfig(teacher=config, public=PublicConfig(name="npz", path="unused"))


def test_each_member_is_asked_by_itself(tmp_path, public, fakes, capsys):
    known = stored_in(tmp_path / "a.npz", public, rows(len(NAMES)))
    members = [served(tmp_path, "first"), known, served(tmp_path, "second")]
    teach_lib.teach(run_of(ensemble(*members)), dry_run=True)
    assert all(fake.asked == [] for fake in fakes.values())
    teach_lib.teach(run_of(ensemble(*members)))
    for name in ("first", "second"):
        assert fakes[name].received == dict.fromkeys(public.sha256, 1)
        assert fakes[name].opened == fakes[name].closed == 2
    out = capsys.readouterr().out
    assert "stored: there is nothing to ask" in out
    # Other weights ask nothing, another member asks that one alone.
    config = ensemble(*members, served(tmp_path, "third"), weights=(1.0, 2.0, 3.0, 4.0))
    teach_lib.teach(run_of(config))
    for fake in fakes.values():
        assert fake.received == dict.fromkeys(public.sha256, 1)
    answers = resolve_answers(config, public)
    for row, sha in enumerate(public.sha256):
        logits = [fakes[name].expected(sha) for name in ("first", "second", "third")]
        logits.insert(1, given(rows(len(NAMES)))[row])
        probs = np.average(softmax(np.float64(logits), axis=-1), axis=0, weights=[1, 2, 3, 4])
        np.testing.assert_allclose(answers.logits[row], np.log(probs), rtol=0, atol=1e-6)


def test_a_member_that_was_not_asked_is_named(tmp_path, public, fakes):
    members = [served(tmp_path, "first"), served(tmp_path, "second")]
    teach_lib.teach(run_of(teacher(members[0])))
    message = refusal(lambda: resolve_answers(ensemble(*members), public), AnswersMissing)
    assert "second" in message and "first" not in message


def test_members_with_other_classes_are_refused_before_they_are_asked(tmp_path, fakes):
    fakes["second"].fingerprint = FakeModel("second", NAMES[::-1]).fingerprint
    members = [served(tmp_path, "first"), served(tmp_path, "second")]
    message = refusal(lambda: teach_lib.teach(run_of(ensemble(*members))))
    assert message.startswith("teacher.members: ") and "same order" in message
    assert all(fake.asked == [] for fake in fakes.values())


# --- a head on embeddings ---


def test_a_probe_makes_logits_of_embeddings(tmp_path, public):
    embeddings = rows(WIDTH)
    config = stored_in(tmp_path / "e.npz", public, embeddings, names=(), head="probe")
    answers = resolve_answers(teacher(config), public)
    expected = linear_probe_logits(given(embeddings), public.labels, PUBLIC_CLASSES, public.sha256)
    np.testing.assert_array_equal(answers.logits, expected)
    assert answers.label_names == public.label_names and answers.sha256 == public.sha256
    assert answers.fingerprint == "mine, linear probe on the labels of tiny_public"


def test_a_probe_that_cannot_be_fitted(tmp_path, public):
    config = stored_in(tmp_path / "e.npz", public, rows(WIDTH), names=(), head="probe")
    unlabelled = public._replace(labels=None, label_names=None)
    message = refusal(lambda: resolve_answers(teacher(config), unlabelled))
    assert message.startswith("teacher.head: ") and message.endswith("tiny_public has none")
    one = public._replace(sha256=public.sha256[:1], labels=public.labels[:1])
    message = refusal(lambda: resolve_answers(teacher(config), one))
    assert message == "teacher.head: 1 distinct images are too few for a linear probe"
    masks = stored_in(tmp_path / "m.npz", public, rows(2, 2, WIDTH), names=(), head="probe")
    assert "not for masks" in refusal(lambda: resolve_answers(teacher(masks), public))


def vectors_file(path, **changes):
    """A file of class vectors with some of its arrays replaced, or left out where None."""
    vectors = np.random.default_rng(4).normal(size=(len(NAMES), WIDTH)).astype(np.float32)
    arrays = {"class_vectors": vectors, "label_names": np.array(NAMES)} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **arrays)
    return str(path), vectors.astype(np.float64)


@pytest.mark.parametrize("scale", [None, 30.0])
def test_class_vectors_make_logits_of_embeddings(tmp_path, public, scale):
    head, vectors = vectors_file(tmp_path / "v.npz", logit_scale=scale)
    embeddings = rows(WIDTH)
    config = stored_in(tmp_path / "e.npz", public, embeddings, names=(), head=head)
    answers = resolve_answers(teacher(config), public)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embeddings, vectors)]
    expected = given((scale or 100) * unit[0].astype(np.float64) @ unit[1].T)
    np.testing.assert_allclose(answers.logits, expected, rtol=0, atol=1e-4)
    assert answers.label_names == NAMES
    assert answers.fingerprint == "mine, class vectors of v.npz"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_vectors": None}, "lacks the array 'class_vectors'"),
        ({"label_names": None}, "lacks the array 'label_names'"),
        ({"class_vectors": np.ones((4, WIDTH), int)}, "finite floats [P, D]"),
        ({"class_vectors": np.full((4, WIDTH), np.nan)}, "finite floats [P, D]"),
        ({"class_vectors": np.ones(4)}, "finite floats [P, D]"),
        ({"label_names": np.array(NAMES[:3])}, "[3]"),
        ({"class_vectors": np.ones((4, WIDTH + 1))}, f"length {WIDTH + 1}, the embeddings have"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_class_vectors_is_told(tmp_path, public, changes, words):
    head, _ = vectors_file(tmp_path / "v.npz", **changes)
    config = stored_in(tmp_path / "e.npz", public, rows(WIDTH), names=(), head=head)
    message = refusal(lambda: resolve_answers(teacher(config), public))
    assert message.startswith("teacher.head: ") and head in message
    assert words in message


@pytest.mark.parametrize("scale", ["large", float("nan"), [30.0, 40.0]])
def test_a_scale_that_is_no_number_is_refused(tmp_path, public, scale):
    head, _ = vectors_file(tmp_path / "v.npz", logit_scale=np.array(scale))
    config = stored_in(tmp_path / "e.npz", public, rows(WIDTH), names=(), head=head)
    message = refusal(lambda: resolve_answers(teacher(config), public))
    assert message.startswith("teacher.head: ") and "logit_scale" in message


@pytest.mark.parametrize("name", ["absent.npz", "text.npz", "prboe"])
def test_a_head_that_is_no_file_is_refused(tmp_path, public, name):
    (tmp_path / "text.npz").write_text("no vectors")
    config = stored_in(tmp_path / "e.npz", public, rows(WIDTH), (), head=str(tmp_path / name))
    message = refusal(lambda: resolve_answers(teacher(config), public))
    assert message.startswith("teacher.head") and name in message


def test_embeddings_alone_are_no_answers(tmp_path, public):
    config = stored_in(tmp_path / "e.npz", public, rows(WIDTH), names=(), fingerprint="clip B/32")
    message = refusal(lambda: resolve_answers(teacher(config), public))
    assert message.startswith("teacher.head is not set, but clip B/32 gives embeddings")
    assert "probe" in message and "teacher.labels" in message
    config = served(tmp_path)
    fill(config, public, rows(WIDTH))
    message = refusal(lambda: resolve_answers(teacher(config), public))
    assert message.startswith("teacher.head is not set, but clip ")


def test_another_head_asks_nothing_anew(tmp_path, public):
    fill(served(tmp_path), public, rows(WIDTH))
    head, _ = vectors_file(tmp_path / "v.npz")
    for changed, classes in (("probe", PUBLIC_CLASSES), (head, len(NAMES))):
        answers = resolve_answers(teacher(served(tmp_path, head=changed)), public)
        assert answers.logits.shape == (COUNT + 3, classes)


# --- from the store ---


def test_answers_come_in_the_order_of_the_images(tmp_path, public, labels):
    config, logits = served(tmp_path, labels=labels), rows(len(NAMES))
    fill(config, public, logits)
    answers = resolve_answers(teacher(config), public)
    np.testing.assert_array_equal(answers.logits, given(logits))
    assert answers.label_names == NAMES and answers.sha256 == public.sha256
    fingerprint = "clip (no version) (native size, uint8, nhwc, first output)"
    assert answers.fingerprint == fingerprint
    order = np.random.default_rng(2).permutation(COUNT)[:20]
    some = public._replace(sha256=tuple(public.sha256[i] for i in order))
    np.testing.assert_array_equal(resolve_answers(teacher(config), some).logits, logits[order])


def test_answers_that_are_missing_are_counted(tmp_path, public, labels):
    config = served(tmp_path, labels=labels, version="7")
    words = (
        f"answers of clip version 7 (native size, uint8, nhwc, first output) about {public.name}"
    )
    message = refusal(lambda: resolve_answers(teacher(config), public), AnswersMissing)
    assert message.startswith(f"teacher.store: {config.store} lacks {COUNT} of the {COUNT} {words}")
    assert "fedhelp teach" in message
    assert not (tmp_path / "store").exists()
    fill(config, public, rows(len(NAMES)), count=COUNT - 2)
    message = refusal(lambda: resolve_answers(teacher(config), public), AnswersMissing)
    assert message.startswith(f"teacher.store: {config.store} lacks 2 of the {COUNT} {words}")
    fill(config, public, rows(len(NAMES)))
    assert resolve_answers(teacher(config), public) is not None
    other = dataclasses.replace(config, version="8")
    refusal(lambda: resolve_answers(teacher(other), public), AnswersMissing)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({}, ""),
        ({"dtype": "float16"}, ", kept as float16"),
        ({"top_k": 2}, ", kept as float32, top 2"),
        ({"dtype": "float16", "top_k": 2}, ", kept as float16, top 2"),
    ],
)
def test_how_precisely_answers_are_kept_is_noted(tmp_path, public, labels, settings, note):
    logits = rows(len(NAMES))
    fill(served(tmp_path, labels=labels), public, logits)
    answers = resolve_answers(teacher(served(tmp_path, labels=labels, **settings)), public)
    assert answers.fingerprint.endswith(f"first output){note}")
    precision = Precision(**settings)
    expected = np.stack([decode(encode(row, precision)).answer for row in logits])
    np.testing.assert_array_equal(answers.logits, given(expected))


def test_no_teacher_has_no_answers(public):
    assert resolve_answers(TeacherConfig(name="none"), public) is None


# --- the model's classes ---


def zero_shot(**settings):
    return FoundationConfig(
        name="hf_zero_shot", url="https://models.example.org", model="clip", **settings
    )


def test_zero_shot_takes_the_public_label_names(tmp_path, public, labels):
    assert foundation_model(zero_shot(), public).fingerprint.label_names == public.label_names
    model = foundation_model(zero_shot(labels=labels), public)
    assert model.fingerprint.label_names == NAMES
    # Others do not: theirs are the outputs of a network.
    assert foundation_model(served(tmp_path), public).fingerprint.label_names == ()
    model = foundation_model(served(tmp_path, labels=labels), public)
    assert model.fingerprint.label_names == NAMES


def test_zero_shot_without_any_label_names(public):
    unlabelled = public._replace(labels=None, label_names=None)
    message = refusal(lambda: foundation_model(zero_shot(), unlabelled))
    assert message.startswith("teacher.labels is not set, and tiny_public has no label names")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"", "is empty"), (b" \n\t\n", "is empty"), (b"\xff\xfe", "text")],
)
def test_a_labels_file_that_is_none_is_named(tmp_path, public, content, words):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    for config in (zero_shot(labels=str(path)), served(tmp_path, labels=str(path))):
        message = refusal(lambda config=config: foundation_model(config, public))
        assert message.startswith(f"teacher.labels: {path}") and words in message
    message = refusal(lambda: foundation_model(zero_shot(labels=str(tmp_path)), public))
    assert message.startswith(f"teacher.labels: {tmp_path} cannot be read")
