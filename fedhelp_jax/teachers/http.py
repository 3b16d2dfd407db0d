"""Guarded HTTP requests: verified TLS, no redirects, a deadline, and answers of bounded size.

Error messages never reveal the API key. If one was sent, they quote nothing that the server said,
since the server could repeat the key in any spelling.
"""

import email.utils
import ipaddress
import os
import re
import threading
import time
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import TransientError

if TYPE_CHECKING:
    import requests

_MAX_ANSWER_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**16
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_SHOWN = 160  # characters of a server's answer that an error message quotes


class Reply(NamedTuple):
    """The body of a 200 answer, and its headers, whose names are case-insensitive."""

    body: bytes
    headers: Mapping[str, str]


class Transport:
    """Sends requests to one server; thread-safe, and connects only at the first request.

    Args:
      url: ``https://...``; plain ``http`` is allowed for this machine only.
      timeout: Seconds for one whole request. If the headers arrive piece by piece, the timeout is
        checked only once they are complete; there are at most 100 headers.
      api_key_env: Name of the environment variable that holds the API key, or None.
      api_key_file: File of mode 0600 that holds the API key, or None.

    Raises:
      UserError: If the URL is of neither kind.
    """

    def __init__(self, url: str, timeout: float, api_key_env: str | None, api_key_file: str | None):
        self._host = _checked_host(url)
        self._url, self._timeout = url.rstrip("/"), timeout
        self._plain = urlsplit(url).scheme == "http"
        self._key_env, self._key_file = api_key_env, api_key_file
        self._opening = threading.Lock()
        self._session: requests.Session | None = None
        self._key: str | None = None

    def open(self) -> None:
        """Reads the API key; sends nothing."""
        self._opened()

    def get(self, path: str) -> Reply:
        """Gets what is at ``path``; raises the same errors as `post`."""
        return self._request("GET", path, None, {})

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        """Posts ``body`` and returns the answer.

        Raises:
          TransientError: On a timeout, a broken connection or a temporary status.
          UserError: On a refusal, a redirect, or an answer longer than 64 MiB.
        """
        return self._request("POST", path, body, headers)

    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> Reply:
        import requests
        import urllib3

        deadline = time.monotonic() + self._timeout
        try:
            session = self._opened()
            with session.request(
                method,
                self._url + path,
                data=body,
                headers=headers,
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                content = self._read(response, deadline)
                self._check_status(response, content)
                return Reply(content, response.headers)
        except requests.exceptions.SSLError:
            raise UserError(
                f"teacher.url: no TLS connection to {self._host} that can be trusted; if its "
                "certificate is your own authority's, name that one's file in REQUESTS_CA_BUNDLE"
            ) from None
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise TransientError(f"{self._host} took longer than {self._timeout:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(
                f"the connection to {self._host} failed ({type(error).__name__})"
            ) from None

    def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _opened(self) -> "requests.Session":
        import requests

        with self._opening:
            if self._session is None:
                self._key = _read_key(self._key_env, self._key_file)
                self._session = requests.Session()
                # Cookies from one thread's answer must not change another thread's request.
                self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
                # A proxy would carry a plain HTTP request away from this machine unencrypted.
                self._session.trust_env = not self._plain
                # Set even without a key, since ~/.netrc could otherwise add credentials.
                self._session.auth = self._sign
            return self._session

    def _sign(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, response: "requests.Response", deadline: float) -> bytes:
        """Returns the body, read piece by piece, since ``requests`` times out per piece only."""
        content = bytearray()
        while time.monotonic() <= deadline:
            piece = response.raw.read1(_CHUNK_BYTES, decode_content=True)
            if not piece:
                return bytes(content)
            content += piece
            if len(content) > _MAX_ANSWER_BYTES:
                raise UserError(
                    f"teacher.url: an answer of {self._host} is longer than "
                    f"{_MAX_ANSWER_BYTES // 2**20} MiB; is it a foundation model?"
                )
        raise TransientError(f"{self._host} took longer than {self._timeout:g} s")

    def _check_status(self, response: "requests.Response", content: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = self.quote(content)
        if status in _AGAIN:
            raise TransientError(
                f"{self._host} answered {status}{said}", _retry_after(response.headers)
            )
        if 300 <= status < 400:
            # The target is not shown, since a server that was sent a key could repeat it there.
            raise UserError(
                f"teacher.url: {self._host} answered {status}, a redirect, which is not followed; "
                "name the address itself"
            )
        if status in (401, 403):
            raise UserError(
                f"teacher.url: {self._host} answered {status}: not allowed; check the key in "
                "teacher.api_key_env or teacher.api_key_file"
            )
        raise UserError(f"teacher.url: {self._host} answered {status}{said}")

    def quote(self, content: bytes) -> str:
        """Returns a short printable excerpt of an answer, or none of it if a key was sent."""
        if self._key is not None:
            return " (what it said is not shown: it was sent a key)"
        text = content[: 16 * _SHOWN].decode("utf-8", "replace")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return f": {text[:_SHOWN]}" if text else ""


class Endpoint:
    """Base class of foundation models behind a `Transport`."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def open(self) -> None:
        """See `FoundationModel`."""
        self._transport.open()

    def close(self) -> None:
        """See `FoundationModel`."""
        self._transport.close()


def version_name(version: str | None) -> str:
    """Returns the version of a served model, as written in its fingerprint."""
    return f"version {version}" if version else "(no version)"


def _checked_host(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname
    if parts.username or parts.password or parts.query or parts.fragment:
        # The URL is not shown, since it may contain a key.
        raise UserError(
            "teacher.url must not hold a user, a password or a query; a key goes to "
            "teacher.api_key_env or teacher.api_key_file"
        )
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and _is_local(host))):
        raise UserError(
            f"teacher.url = {url!r} must begin with https:// and a host; http:// is for this "
            "machine only, 127.0.0.1 or localhost"
        )
    return parts.netloc


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_key(variable: str | None, file: str | None) -> str | None:
    """Returns the API key.

    Messages show neither the key nor the setting's value, which may be the key by mistake.
    """
    if variable:
        key = os.environ.get(variable)
        if not key:
            raise UserError(
                "teacher.api_key_env: there is no environment variable of that name; it takes the "
                "name of the variable, not the key"
            )
    elif file:
        path = Path(file).expanduser()
        try:
            mode = path.stat().st_mode & 0o777
            key = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError("teacher.api_key_file: there is no such file to read") from None
        if mode & 0o077:
            raise UserError(
                f"teacher.api_key_file: others can read the file (mode {mode:04o}); make it yours "
                "alone: chmod 600"
            )
    else:
        return None
    key = key.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError("teacher.api_key_*: the key must be one word of printable ASCII characters")
    return key


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a server asks to wait, given as a number or as a date."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
