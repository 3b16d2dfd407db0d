"""No image is asked about twice, whatever stops a run, and however many run at once."""

import re
import signal
import time

import numpy as np
import pytest
from commands import fedhelp, refusal
from foundation_server import FoundationServer, hang, status
from teaching import BATCH, DISTINCT, Study, stored


@pytest.fixture
def study(tmp_path):
    with FoundationServer() as server:
        yield Study(tmp_path, server)


def test_identical_images_are_asked_about_once_and_nothing_twice(study, capsys):
    assert study.teach() == 0
    received = study.server.received()
    assert set(received) == set(study.sha256)
    assert received.total() == DISTINCT
    assert [len(request.sha256) for request in study.server.requests] == [4] * 8 + [2]
    assert {r.path for r in study.server.requests} == {"/v2/models/tiny/versions/1/infer"}
    study.assert_stored_rightly()
    assert study.teach() == 0
    assert len(study.server.requests) == 9
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err


@pytest.mark.parametrize("extensions", [[], None])
def test_a_server_that_takes_json_only_is_sent_json(study, extensions):
    study.server.extensions = extensions
    assert study.teach() == 0
    inferences = [r for r in study.server.requests if r.path != "/v2"]
    assert len(inferences) == 9
    assert {r.headers["content-type"] for r in inferences} == {"application/json"}
    assert all("data" in r.header["inputs"][0] for r in inferences)
    study.assert_stored_rightly()


def test_only_new_images_are_asked_about(study):
    assert study.teach() == 0
    study.server.forget()
    new = np.random.default_rng(8).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    # In another order too: answers belong to pixels, not to places.
    study.publish(np.concatenate([new, study.images[::-1]]))
    assert study.teach() == 0
    assert sorted(study.server.received().elements()) == sorted(study.sha256[:3])
    study.assert_stored_rightly(DISTINCT + 3)


@pytest.mark.parametrize(
    "rest",
    [
        "--config.teacher.version=2",
        "--config.teacher.model=other",
        "--config.teacher.image_size=8",
        "--config.teacher.scale=unit",
        "--config.teacher.layout=nchw",
    ],
)
def test_another_model_or_preprocessing_is_asked_anew(study, rest):
    assert study.teach() == 0
    study.server.forget()
    assert study.teach(rest) == 0
    assert study.server.received().total() == DISTINCT
    study.server.forget()
    assert study.teach(rest) == 0
    assert study.teach() == 0
    assert study.server.requests == []


@pytest.mark.parametrize(
    "rest",
    [
        "--config.teacher.batch_size=7",
        "--config.teacher.concurrency=3",
        "--config.teacher.timeout=3",
        "--config.teacher.dtype=float16",
        "--config.teacher.top_k=3",
        "--config.seed=5",
        "--config.data.image_size=20",
    ],
)
def test_what_does_not_change_answers_asks_nothing_anew(study, rest):
    assert study.teach() == 0
    study.server.forget()
    assert study.teach(rest) == 0
    assert study.server.requests == []


def test_the_same_model_at_another_address_is_not_asked_again(study):
    assert study.teach() == 0
    with FoundationServer() as elsewhere:
        assert study.teach(f"--config.teacher.url={elsewhere.url}") == 0
        assert elsewhere.requests == []


def numbers(text: str) -> set[float]:
    """All numbers in a text, however thousands are set apart."""
    return {
        float(n) for n in re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d)[, ](?=\d{3})", "", text))
    }


def test_a_dry_run_tells_all_and_sends_nothing(study, capsys):
    rest = "--dry-run --config.teacher.price_per_query=0.25"
    assert study.teach(rest) == 0
    out, err = capsys.readouterr()
    assert study.server.requests == []
    assert err == ""
    for word in ("image", "known", "ask", "request", "mb", "cost"):
        assert word in out.lower(), out
    assert {0, DISTINCT, 9, DISTINCT * 0.25} <= numbers(out), out
    # What a dry run foretells is what a run does.
    study.server.faults, study.server.always = [None, None], status(400)
    assert study.teach() == 2
    capsys.readouterr()
    study.server.always = None
    assert study.teach(rest) == 0
    out = capsys.readouterr().out
    left = DISTINCT - 2 * BATCH
    assert {2 * BATCH, left, 7, left * 0.25} <= numbers(out), out
    study.server.forget()
    assert study.teach() == 0
    assert study.server.received().total() == left
    assert len(study.server.requests) == 7
    bodies = sum(int(r.headers["content-length"]) for r in study.server.requests)
    (told,) = re.findall(r"([\d.]+) MB", out)
    assert abs(float(told) - bodies / 1e6) < 0.006


def test_a_dry_run_leaves_no_file(study):
    assert study.teach("--dry-run") == 0
    assert not study.store.exists()


# --- killed, interrupted, together ---


def asked_twice(before, after) -> int:
    """How many images, of all that were received, came again."""
    total = before + after
    return total.total() - len(total)


@pytest.mark.slow
def test_a_killed_run_loses_no_more_than_what_was_under_way(study):
    concurrency = 2
    rest = f"--config.teacher.concurrency={concurrency}"
    study.server.delay = 0.05
    with study.process(rest) as process:
        study.server.wait_for(5)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    before = study.server.received()
    assert len(before) < DISTINCT
    for answer in stored(study.store).values():
        assert np.isfinite(answer).all() and answer.shape == (5,)
    study.server.forget()
    assert study.teach(rest) == 0
    after = study.server.received()
    assert set(before + after) == set(study.sha256)
    assert asked_twice(before, after) <= concurrency * BATCH
    study.assert_stored_rightly()


@pytest.mark.slow
def test_two_processes_never_ask_about_one_image_twice(study, capsys):
    study.server.delay = 0.1
    with study.process("--config.teacher.batch_size=2") as other:
        study.server.wait_for(1)
        assert study.teach("--config.teacher.concurrency=3") == 0
        _, err = other.communicate(timeout=60)
    assert other.returncode == 0, err
    assert "waiting" in capsys.readouterr().out
    received = study.server.received()
    assert set(received) == set(study.sha256)
    assert received.total() == DISTINCT
    study.assert_stored_rightly()


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", [hang, status(429, Retry_After="50")], ids=["asking", "waiting to ask again"]
)
def test_an_interrupted_run_keeps_what_was_answered(study, last):
    study.server.faults, study.server.always = [None] * 3, last
    rest = "--config.teacher.timeout=2 --config.teacher.max_backoff=60"
    with study.process(rest) as process:
        study.server.wait_for(4)
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        took = time.monotonic() - start
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("fedhelp: ") and "Traceback" not in err
    assert took < 6
    # Nothing was sent after the interruption.
    assert len(study.server.requests) == 4
    before = set(study.server.answered)
    assert set(stored(study.store)) == before
    assert len(before) == 3 * BATCH
    study.server.always = None
    study.server.forget()
    assert study.teach() == 0
    assert set(study.server.received()) == set(study.sha256) - before
    study.assert_stored_rightly()


def test_training_without_answers_names_the_command_that_gets_them(study, capsys):
    workdir = study.folder / "run"
    train = study.command(f"--workdir={workdir}", "train")
    line = refusal(capsys, fedhelp(train))
    assert "lacks 34 of the 34 answers of tiny" in line
    command = line.split("fedhelp teach gets them: fedhelp ")[1]
    assert study.server.requests == [] and not study.store.exists()
    assert fedhelp(command) == 0
    assert study.server.received().total() == DISTINCT
