"""What a foundation model can do wrong: the run goes on, or ends in one line and loses nothing."""

import email.utils
import ssl
import time

import numpy as np
import pytest
import trustme
from commands import fedhelp
from foundation_server import (
    FoundationServer,
    body,
    bomb,
    changed,
    cut,
    described,
    drip,
    drip_headers,
    flood,
    hang,
    redirect,
    reset,
    retry_at,
    short_binary,
    status,
    with_header,
    with_nan,
)
from teaching import BATCH, DISTINCT, Study, stored

from fedhelp_jax.experiments import runner

KEY = "sk-Zq8Xw3Lr7Tn5Vb2Kd9Hf4"


@pytest.fixture
def study(tmp_path):
    with FoundationServer() as server:
        yield Study(tmp_path, server)


@pytest.fixture
def key(monkeypatch):
    """The settings that have a key sent."""
    monkeypatch.setenv("TINY_KEY", KEY)
    return "--config.teacher.api_key_env=TINY_KEY"


def holds_key(text: str) -> bool:
    """Whether there is any telling part of the key."""
    return any(KEY[start : start + 6] in text for start in range(3, len(KEY) - 5))


def refused(capsys, code: int) -> str:
    """The one line of a command that ended with exit code 2, once it is known to keep the key."""
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert not holds_key(out + err)
    lines = err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fedhelp: teacher"), lines
    return lines[0]


# --- faults that pass ---


@pytest.mark.parametrize(
    ("faults", "rest"),
    [
        ([status(429)], ""),
        ([status(500)] * 3, ""),
        ([status(503)], ""),
        ([reset], ""),
        ([cut], ""),
        ([hang], "--config.teacher.timeout=0.4"),
        ([drip], "--config.teacher.timeout=0.4"),
        ([None, status(500), None, reset, None, status(429)], "--config.teacher.concurrency=3"),
    ],
    ids=["429", "500", "503", "reset", "cut", "hang", "drip", "several-at-once"],
)
def test_a_fault_that_passes_is_got_over(study, capsys, faults, rest):
    failed = [fault for fault in faults if fault is not None]
    study.server.faults = list(faults)
    assert study.teach(rest) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert not study.server.faults
    received = study.server.received()
    assert set(received) == set(study.sha256)
    # Only batches that failed were sent again.
    assert received.total() == DISTINCT + BATCH * len(failed)
    study.assert_stored_rightly()


# --- faults that do not ---

TRANSIENT = {
    "429": (status(429), "", "429"),
    "500": (status(500), "", "500"),
    "reset": (reset, "", ""),
    "cut": (cut, "", ""),
    "not-gzip": (with_header("Content-Encoding", "gzip"), "", ""),
    "hang": (hang, "--config.teacher.timeout=0.3", "0.3"),
    "drip": (drip, "--config.teacher.timeout=0.3", "0.3"),
    "drip-of-headers": (drip_headers, "--config.teacher.timeout=0.3", "0.3"),
}
LASTING = {
    "400": (status(400), "400"),
    "401": (status(401), "401"),
    "403": (status(403), "403"),
    "404": (status(404), "404"),
    "a-row-less": (changed(lambda x: x[1:]), ""),
    "another-dimension": (changed(lambda x: np.stack([x, x], 1)), "teacher.version"),
    "int64": (changed(lambda x: x.astype(np.int64), "INT64"), "INT64"),
    "bytes": (changed(lambda x: x, "BYTES"), "BYTES"),
    "nan": (changed(with_nan), "finite"),
    "infinite": (changed(lambda x: x - np.inf), "finite"),
    "a-class-more": (changed(lambda x: np.concatenate([x, x[:, :1]], 1)), "6"),
    "no-class": (changed(lambda x: x[:, :0]), ""),
    "another-name": (changed(lambda x: x, name="probabilities"), "logits"),
    "short": (short_binary, ""),
    "html": (body(b"<html>\n<body>Sign in</body>\n</html>", "text/html"), ""),
    "nothing": (body(b""), ""),
    "no-object": (body(b"[1, 2]"), ""),
    "deep": (body(b"[" * 100_000), ""),
    "beyond-float32": (changed(lambda x: x.astype(np.float64) * 1e300, "FP64"), ""),
    "enormous-shape": (described(shape=[10**30, 5]), ""),
    "shape-of-text": (described(shape="[4, 5]"), ""),
    "negative-size": (described(parameters={"binary_data_size": -4}), ""),
    "size-of-text": (described(parameters={"binary_data_size": "80"}), ""),
    "no-data": (described(parameters={}), ""),
    "unknown-type": (described(datatype="FP12"), "FP12"),
    "type-of-list": (described(datatype=["FP32"]), ""),
    "bad-length": (with_header("Inference-Header-Content-Length", "many"), ""),
    "negative-length": (with_header("Inference-Header-Content-Length", "-1"), ""),
    "bomb": (bomb, ""),
    "error-with-200": (body(b'{"error": "model is loading"}'), "model is loading"),
    "huge": (flood(1 << 33), ""),
    "endless": (flood(None), ""),
    "redirect-302": (302, "302, a redirect"),
    "redirect-307": (307, "307, a redirect"),
}


def assert_kept(study, capsys, before: set[str], rest: str) -> None:
    """What was answered before the fault is not asked again; all else is."""
    study.server.always = None
    study.server.forget()
    assert study.teach(rest) == 0
    received = study.server.received()
    assert set(received) == set(study.sha256) - before
    assert received.total() == len(received)
    study.assert_stored_rightly()
    out, err = capsys.readouterr()
    assert not holds_key(out + err)
    assert not holds_key(study.files().decode(errors="replace"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSIENT)
def test_a_passing_fault_that_never_passes_ends_in_one_line(study, capsys, key, name):
    fault, rest, word = TRANSIENT[name]
    study.server.faults, study.server.always = [None, None], fault
    start = time.monotonic()
    line = refused(capsys, study.teach(f"{key} --config.teacher.max_attempts=3 {rest}"))
    assert time.monotonic() - start < 5
    assert word in line
    assert len(study.server.requests) == 2 + 3
    before = set(study.server.answered)
    assert len(before) == 2 * BATCH
    # A short timeout is no fault of the model that comes next.
    assert_kept(study, capsys, before, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_ends_in_one_line_at_once(study, capsys, key, name):
    fault, word = LASTING[name]
    with FoundationServer() as elsewhere:
        if isinstance(fault, int):
            fault = redirect(fault, f"http://localhost:{elsewhere.port}")
        study.server.faults, study.server.always = [None, None], fault
        line = refused(capsys, study.teach(key))
        # What a server says is not repeated to whoever sent it a key.
        assert (word if not (key and name == "error-with-200") else "not shown") in line
        assert len(study.server.requests) == 3
        assert elsewhere.requests == []
    assert study.server.flood < 1 << 27
    assert_kept(study, capsys, set(study.server.answered), key)


def test_a_server_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    with FoundationServer() as server:
        study = Study(tmp_path, server)
        command = study.command("--config.teacher.max_attempts=2")
    line = refused(capsys, fedhelp(command))
    assert str(study.server.port) in line


# --- pauses ---


def pause(server) -> float:
    """Seconds between the first two requests."""
    return server.requests[1].time - server.requests[0].time


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_in_seconds_is_honoured(study, code):
    study.server.faults = [status(code, Retry_After="1")]
    assert study.teach("--config.teacher.max_backoff=5") == 0
    assert 1 <= pause(study.server) < 3
    study.assert_stored_rightly()


def test_retry_after_as_a_date_is_honoured(study):
    told = []
    study.server.faults = [retry_at(429, 0.3, told)]
    assert study.teach("--config.teacher.max_backoff=5") == 0
    assert told[0] - 0.01 <= study.server.requests[1].time < told[0] + 2


@pytest.mark.slow
def test_all_requests_heed_retry_after(study):
    """Not only the one that was told: the model asked for a rest."""
    study.server.faults, study.server.delay = [status(429, Retry_After="1")], 0.1
    assert study.teach("--config.teacher.max_backoff=5 --config.teacher.concurrency=2") == 0
    told = study.server.requests[0].time
    early = [r for r in study.server.requests if 0.3 < r.time - told < 0.95]
    assert early == []


@pytest.mark.parametrize(
    "value",
    ["3600", "9" * 12, email.utils.formatdate(time.time() + 3600, usegmt=True)],
    ids=["an hour", "ages", "a date"],  # a date in a name would differ between processes
)
def test_a_pause_longer_than_max_wait_is_refused_at_once(study, capsys, value):
    study.server.faults, study.server.always = [None], status(429, Retry_After=value)
    start = time.monotonic()
    line = refused(capsys, study.teach())
    assert time.monotonic() - start < 3
    assert "teacher.max_backoff" in line
    assert len(line) < 400
    assert len(study.server.requests) == 2
    assert_kept(study, capsys, set(study.server.answered), "")


@pytest.mark.parametrize(
    "value", ["0", "soon", "-5", "nan", "", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct"]
)
def test_a_retry_after_that_says_nothing_is_ignored(study, value):
    study.server.faults = [status(429, Retry_After=value)]
    assert study.teach() == 0
    assert pause(study.server) < 2
    study.assert_stored_rightly()


# --- limits ---


def test_no_more_requests_at_once_than_allowed(study):
    study.server.delay = 0.05
    assert study.teach("--config.teacher.concurrency=3") == 0
    assert study.server.busiest == 3


def test_no_more_requests_a_second_than_allowed(study):
    rest = "--config.teacher.requests_per_second=10 --config.teacher.concurrency=4"
    assert study.teach(rest) == 0
    times = [request.time for request in study.server.requests]
    assert len(times) == 9
    assert max(times) - min(times) >= 0.75


def test_max_queries_that_cannot_suffice_sends_nothing(study, capsys):
    for rest in (f"{DISTINCT - 1}", "1", "0"):
        line = refused(capsys, study.teach(f"--config.teacher.max_queries={rest}"))
        assert "teacher.max_queries" in line and str(DISTINCT) in line
    assert study.server.requests == []


@pytest.mark.parametrize("concurrency", [1, 4])
def test_max_queries_counts_every_try_over_several_runs(study, capsys, concurrency):
    server, limit = study.server, DISTINCT + 3
    rest = f"--config.teacher.concurrency={concurrency} --config.teacher.max_queries="
    # Two good answers, two tries of the third: no more is left for all the others.
    server.faults, server.always = [None, None, status(500)], status(400)
    assert "400" in refused(capsys, study.teach(f"{rest}{limit}"))
    sent = server.received().total()
    assert sent >= 4 * BATCH
    server.always = None
    assert "teacher.max_queries" in refused(capsys, study.teach(f"{rest}{limit}"))
    assert server.received().total() == sent
    left = DISTINCT - len(stored(study.store))
    assert study.teach(f"{rest}{sent + left}") == 0
    assert server.received().total() == sent + left
    # Nothing more to ask: nothing to refuse.
    assert study.teach(f"{rest}1") == 0
    study.assert_stored_rightly()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_tries_never_exceed_max_queries(study, capsys, concurrency):
    server, limit = study.server, DISTINCT + BATCH + 1
    rest = f"--config.teacher.concurrency={concurrency} --config.teacher.max_queries={limit}"
    server.faults = [None, status(500), None, status(500), None]
    assert "teacher.max_queries" in refused(capsys, study.teach(rest))
    assert DISTINCT <= server.received().total() <= limit
    assert set(stored(study.store)) == set(server.answered)


# --- a full disk ---


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_spoils_nothing(tmp_path, capsys):
    # So many classes that the answers fill some pages.
    with FoundationServer(classes=900) as server:
        study = Study(tmp_path, server)
        with study.process(file_limit=100_000) as process:
            _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        _, line = err.splitlines()  # the first says which classes no public image shows
        assert line.startswith("fedhelp: teacher.store: ") and str(study.store) in line
        before = stored(study.store)
        assert BATCH <= len(before) < DISTINCT
        study.assert_stored_rightly(len(before))
        assert len(server.requests) <= len(before) / BATCH + 2
        assert_kept(study, capsys, set(before), "")


# --- keys ---


def authorization(server) -> set[str | None]:
    return {request.headers.get("authorization") for request in server.requests}


def test_no_key_is_sent_unless_asked_for(study, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert study.teach() == 0
    assert authorization(study.server) == {None}


@pytest.mark.slow
def test_a_key_from_the_environment_is_sent_and_never_told(study, monkeypatch, capsys, key):
    netrc = study.folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert study.teach(key) == 0
    assert authorization(study.server) == {f"Bearer {KEY}"}
    workdir = study.folder / "run"

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    # Stopped before it compiles, which would take long: its settings are written by then.
    monkeypatch.setattr(runner, "compiled_ahead", stop)
    assert fedhelp(study.command(f"{key} --workdir={workdir}", "train")) == 130
    assert "TINY_KEY" in (workdir / "config.json").read_text()
    assert len(study.server.requests) == 9  # training asks nothing
    out, err = capsys.readouterr()
    assert not holds_key(out + err)
    assert not holds_key(study.files().decode(errors="replace"))


def test_a_key_from_a_file_that_only_its_owner_reads(study, capsys, tmp_path_factory):
    file = tmp_path_factory.mktemp("secret") / "key"
    file.write_text(f"{KEY}\n")
    rest = f"--config.teacher.api_key_file={file}"
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        line = refused(capsys, study.teach(rest))
        assert "teacher.api_key_file" in line and "600" in line
    assert study.server.requests == []
    file.chmod(0o600)
    assert study.teach(rest) == 0
    assert authorization(study.server) == {f"Bearer {KEY}"}
    assert not holds_key(study.files().decode(errors="replace"))


@pytest.mark.parametrize("value", [None, "", "  ", f"{KEY}\r\nX-Mine: 1", f"{KEY}ключ"])
def test_a_key_that_cannot_be_sent_is_named_by_its_setting(study, capsys, monkeypatch, value):
    monkeypatch.delenv("TINY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TINY_KEY", value)
    line = refused(capsys, study.teach("--config.teacher.api_key_env=TINY_KEY"))
    assert "teacher.api_key" in line
    assert study.server.requests == []


def test_a_key_is_kept_where_the_server_echoes_it_escaped(study, capsys, monkeypatch):
    """As some languages write JSON, and as addresses are written."""
    parts = ("Zq8Xw3Lr7T", "n5Vb2Kd9Hf", "4Mc6Js1Pg0")
    monkeypatch.setenv("TINY_KEY", "/".join(parts))
    for between in ("\\/", "%2F", "\\u002f"):
        study.server.always = body(f'{{"error": "no {between.join(parts)} here"}}'.encode())
        assert study.teach("--config.teacher.api_key_env=TINY_KEY") == 2
        out, err = capsys.readouterr()
        assert not [part for part in parts if part in out + err], err


def test_a_key_for_this_machine_is_sent_to_no_proxy(study, monkeypatch, key):
    with FoundationServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert study.teach(key) == 0
        assert proxy.requests == []


def test_a_key_in_the_address_is_refused_or_kept(study, capsys):
    """``http://user:password@host`` ends up in the run's settings."""
    address = study.server.url.replace("//", f"//me:{KEY}@")
    line = refused(capsys, study.teach(f"--config.teacher.url={address}"))
    assert "teacher.url" in line
    assert study.server.requests == []


@pytest.mark.parametrize("fault", ["another's authority", "another host's", None])
def test_only_a_certificate_of_a_known_authority_is_trusted(tmp_path, capsys, monkeypatch, fault):
    authority, other = trustme.CA(), trustme.CA()
    (other if fault == "another's authority" else authority).cert_pem.write_to_path(
        tmp_path / "authority.pem"
    )
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    host = "192.0.2.1" if fault == "another host's" else "127.0.0.1"
    authority.issue_cert(host).configure_cert(context)
    with FoundationServer(tls=context) as server:
        study = Study(tmp_path, server)
        if fault is None:
            assert study.teach() == 0
            assert server.received().total() == DISTINCT
        else:
            assert "TLS" in refused(capsys, study.teach())
            assert server.requests == [] and server.described == 0
