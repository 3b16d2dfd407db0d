"""How good answers are, and what a person sees of the asking."""

import re
import types

import jax
import numpy as np
import pytest
from helpers import PUBLIC_CLASSES, tiny_public
from scipy.special import softmax

from fedhelp_jax.experiments import teach as teach_lib
from fedhelp_jax.experiments.teach import agreement
from fedhelp_jax.metrics import classification_metrics
from fedhelp_jax.report import teaching as report
from fedhelp_jax.teachers.answers import Answers
from fedhelp_jax.teachers.heads import linear_probe_logits

# --- how good the answers are ---

MANY = 120


METRICS = jax.jit(classification_metrics)


@pytest.fixture(autouse=True)
def compiled_at_once(monkeypatch):
    """As one program, which is compiled faster than its parts."""
    monkeypatch.setattr(teach_lib, "classification_metrics", METRICS)


@pytest.fixture(scope="module")
def public():
    return tiny_public(MANY)


def answers_about(public, logits, names=None):
    names = public.label_names if names is None else names
    return Answers(logits, public.sha256, names, "a model")


def knowing(public, seed=3):
    """Logits that tell something of the labels, and are too sure of it."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(public.labels), PUBLIC_CLASSES))
    return (3 * (noise + np.eye(PUBLIC_CLASSES)[public.labels])).astype(np.float32)


def measured(logits, labels):
    """Top-1 accuracy, calibration error of 15 bins and cross-entropy, in float64."""
    probs = softmax(logits.astype(np.float64), axis=1)
    rows = np.arange(len(labels))
    right = probs.argmax(axis=1) == labels
    confidence, error = probs.max(axis=1), 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return {"top_1": right.mean(), "ece": error, "loss": -np.log(probs[rows, labels]).mean()}


def assert_measured(found, logits, labels):
    for name, value in measured(logits, labels).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["chance"] == max(np.mean(labels == label) for label in range(PUBLIC_CLASSES))


def test_answers_over_the_public_classes_are_compared_with_the_labels(public):
    logits = knowing(public)
    found = agreement(answers_about(public, logits), public)
    assert (found["images"], found["classes"], found["probed"]) == (MANY, PUBLIC_CLASSES, False)
    assert_measured(found, logits, public.labels)
    assert found["chance"] + 0.1 < found["top_1"] < 1 and found["ece"] > 0.01


@pytest.mark.parametrize("names", ["other", "reordered", "none"])
def test_answers_over_other_classes_are_probed(public, names):
    names = {
        "other": tuple("vwxyz"),
        "reordered": public.label_names[::-1],
        "none": (),
    }[names]
    # The classes turned round: the answers themselves are wrong, and tell the labels all the same.
    logits = knowing(public)[:, ::-1]
    found = agreement(answers_about(public, logits, names), public)
    assert found["probed"] and found["images"] == MANY
    probe = linear_probe_logits(
        logits, public.labels, PUBLIC_CLASSES, public.sha256, max_iterations=30
    )
    assert_measured(found, probe, public.labels)
    assert found["top_1"] > found["chance"] + 0.1


def test_some_images_suffice_for_a_probe(monkeypatch):
    monkeypatch.setattr(teach_lib, "_MOST_PROBED", MANY)
    public = tiny_public(MANY + 30)
    logits = knowing(public)
    found = agreement(answers_about(public, logits, tuple("vwxyz")), public)
    # By hash, as a file may be sorted by class.
    some = sorted(range(MANY + 30), key=lambda row: public.sha256[row])[:MANY]
    labels, sha256 = public.labels[some], tuple(public.sha256[row] for row in some)
    probe = linear_probe_logits(logits[some], labels, PUBLIC_CLASSES, sha256, max_iterations=30)
    assert_measured(found, probe, labels)
    assert found["images"] == MANY + 30


def test_what_cannot_be_measured_is_noted(public, capsys):
    logits = knowing(public)
    unlabelled = public._replace(labels=None, label_names=None)
    few = tiny_public(1)
    masks = np.zeros((MANY, 2, 2, PUBLIC_CLASSES), np.float32)
    cases = [
        (answers_about(public, logits), unlabelled, "tiny_public has no labels to compare with"),
        (answers_about(public, masks), public, "masks are not compared"),
        (answers_about(few, logits[:1], tuple("vwxyz")), few, "1 distinct images are too few"),
    ]
    for answers, about, words in cases:
        found = agreement(answers, about)
        assert found["note"].startswith(words) and "top_1" not in found
        report.print_agreement("a model", about.name, found)
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(f"answers    {len(answers.logits)} over 5 classes, of a model")
        assert second == f"agreement  not measured: {found['note']}"


def told_of(capsys, answers, public):
    report.print_agreement("a model", public.name, agreement(answers, public))
    return capsys.readouterr().out


def test_agreement_is_printed(public, capsys):
    logits = knowing(public)
    found = agreement(answers_about(public, logits), public)
    out = told_of(capsys, answers_about(public, logits), public)
    for words in (
        f"answers    {MANY} over 5 classes, of a model\n",
        "agreement  with the labels of tiny_public: ",
        f"top-1 {found['top_1']:.3f} (the most frequent label alone {found['chance']:.3f})",
        f"calibration error {found['ece']:.3f}, loss {found['loss']:.3f} nats",
    ):
        assert words in out
    assert "warning" not in out and "probe" not in out
    out = told_of(capsys, answers_about(public, logits, tuple("vwxyz")), public)
    assert "of tiny_public by a linear probe, as its classes are others: top-1" in out


@pytest.mark.slow
def test_a_teacher_that_names_the_most_frequent_label_is_warned_of(public, capsys):
    """Exactly as often right, whichever way that share is rounded."""
    logits = np.zeros((MANY, PUBLIC_CLASSES), np.float32)
    logits[:, 2] = 1
    silent = []
    for most in range(60, 80):
        labels = np.where(np.arange(MANY) < most, 2, np.arange(MANY) % 2).astype(np.int32)
        about = public._replace(labels=labels)
        assert agreement(answers_about(about, logits), about)["chance"] == most / MANY
        if "warning    these answers" not in told_of(capsys, answers_about(about, logits), about):
            silent.append(f"{most}/{MANY}")
    assert silent == []


def test_a_teacher_that_is_worse_or_better(public, capsys):
    labels = np.arange(MANY, dtype=np.int32) % PUBLIC_CLASSES
    labels[:60] = 2
    about = public._replace(labels=labels)
    logits = 5 * np.eye(PUBLIC_CLASSES, dtype=np.float32)[labels]
    assert "warning" not in told_of(capsys, answers_about(about, logits), about)
    assert "warning" in told_of(capsys, answers_about(about, -logits), about)


def test_of_few_images_nothing_is_said(public, capsys):
    """A good teacher may well be that wrong about them."""
    few = tiny_public(99)
    logits = -5 * np.eye(PUBLIC_CLASSES, dtype=np.float32)[few.labels]
    out = told_of(capsys, answers_about(few, logits), few)
    assert "top-1 0.000" in out and "warning" not in out


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_probabilities_in_place_of_logits_are_warned_of(public, capsys, shape):
    logits = 3 * np.random.default_rng(5).normal(size=(MANY, *shape, PUBLIC_CLASSES))
    words = "warning    these look like probabilities"
    adding_up = logits - logits.mean(axis=-1, keepdims=True) + 1 / PUBLIC_CLASSES
    cases = ((logits, False), (adding_up, False), (softmax(logits, axis=-1), True))
    for answers, warned in cases:
        found = agreement(answers_about(public, answers.astype(np.float32)), public)
        assert found["look_like_probabilities"] is warned
        report.print_agreement("a model", public.name, found)
        assert (words in capsys.readouterr().out) is warned


# --- progress ---


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds that the display sees."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(report, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_progress_tells_count_rate_and_time_left(clock, capsys):
    with report.AskingProgress(2400) as progress:
        for seconds, images, line in (
            (2, 400, ""),
            (4, 400, ""),
            (6, 400, "asking     1,200/2,400 images  200.0/s  left 6s\n"),
            (8, 16, ""),
            (16, 400, "asking     1,616/2,400 images  101.0/s  left 8s\n"),
            (17, 784, "asking     2,400/2,400 images  141.2/s  left 0s\n"),
        ):
            clock.now = 100.0 + seconds
            progress.advance(images)
            assert capsys.readouterr().out == line


def test_a_long_time_left_is_told_in_hours(clock, capsys):
    with report.AskingProgress(7201) as progress:
        clock.now += 10
        progress.advance(10)
    assert capsys.readouterr().out == "asking     10/7,201 images  1.0/s  left 1h59m\n"  # and 51 s


def test_the_first_answers_may_come_at_once(clock, capsys):
    with report.AskingProgress(4) as progress:
        progress.advance(4)
    assert re.fullmatch(r"asking     4/4 images  \S+/s  left 0s\n", capsys.readouterr().out)


def test_what_is_kept_of_an_end_that_came_early_is_told(clock, capsys):
    with pytest.raises(KeyboardInterrupt), report.AskingProgress(2400) as progress:
        clock.now += 1
        progress.advance(1200)
        raise KeyboardInterrupt
    assert capsys.readouterr().out.startswith("kept       1,200 answers of 2,400; ")


def test_a_terminal_shows_one_live_line(clock, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with report.AskingProgress(8) as progress:
        clock.now += 2
        progress.advance(4)
        clock.now += 2
        progress.advance(2)
    out = capsys.readouterr().out
    assert "6/8 images  1.5/s  left 1s" in out
    assert "asking     " not in out
