"""Fetches files from their publishers, and keeps them only if complete and as published."""

import contextlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders.downloads import KEY, md5_of

_TIMEOUT = 30.0  # seconds without receiving data
_BLOCK = 2**20
_NETWORK_ERRORS = (OSError, http.client.HTTPException)


class Remote(NamedTuple):
    """A file that anyone may download without asking for access.

    Attributes:
      url: Its URL.
      name: Its file name.
      md5: Its official checksum.
    """

    url: str
    name: str
    md5: str


def fetch(
    remote: Remote,
    folder: Path,
    say: Callable[[str], None],
    planned: Callable[[int], None],
    done: Callable[[int], None],
) -> None:
    """Fetches a file unless it exists, and resumes an earlier attempt that was stopped.

    The file is called ``<name>.part`` until it is complete and its checksum is correct.

    Args:
      remote: The file.
      folder: The folder to put it in.
      say: Called with progress messages.
      planned: Called with the number of bytes to fetch.
      done: Called with the number of bytes in each block that was fetched.

    Raises:
      UserError: If there is no network, the connection breaks, or another file is received.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists():
        if md5_of(path) == remote.md5:
            say(f"{path} is there already")
            return
        say(f"{path} is not the official file: fetched anew")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetching {remote.url} to {folder}")
    try:
        _fetch(remote.url, part, planned, done)
    except _Failed as error:
        raise UserError(
            f"{remote.url} cannot be fetched: {error}; try again, or download it elsewhere and "
            f"name its folder with {KEY}"
        ) from None
    md5 = md5_of(part)
    if md5 != remote.md5:
        part.unlink()
        raise UserError(
            f"{remote.url} is not the official file: its md5 is {md5}, not {remote.md5}; try "
            f"again, or name a folder that has it with {KEY}"
        )
    os.replace(part, path)


class _Failed(Exception):
    """An error of the network rather than the disk."""


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Refuses redirections to another scheme than that of the request, such as away from https."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != req.type:
            raise _Failed(f"it redirects to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(
    url: str, part: Path, planned: Callable[[int], None], done: Callable[[int], None]
) -> None:
    """Fetches the missing rest of a file and appends it."""
    start = part.stat().st_size if part.exists() else 0
    with contextlib.closing(_open(url, start)) as response:
        if response.status != 206:  # the server sends the whole file instead of the rest
            start = 0
        size = response.length
        if size is None:
            raise _Failed("its server does not say how large it is")
        planned(size)
        with part.open("ab" if start else "wb") as file:
            left = size
            while left:
                block = _read(response, min(left, _BLOCK))
                if not block:
                    raise _Failed(f"it ended after {size - left} of {size} bytes")
                file.write(block)
                left -= len(block)
                done(len(block))


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "fedhelp_jax", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    opener = urllib.request.build_opener(_SameScheme)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # no bytes are left: it is complete, or another file
            return _open(url, 0)
        raise _Failed(f"{error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Failed(str(error.reason)) from None
    except _NETWORK_ERRORS as error:
        raise _Failed(str(error)) from None


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    try:
        return response.read(size)
    except _NETWORK_ERRORS as error:
        raise _Failed(str(error)) from None
