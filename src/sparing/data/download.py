"""Download files from web servers that may fail, stall or never end."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from sparing.errors import InputError
from sparing.files import atomic_write

MAX_BYTES = 2**36
TIMEOUT_SECONDS = 60
"""Time after which a server that sends nothing counts as failed."""
RETRY_SECONDS = (1, 5)
"""Waiting times before a file is requested again."""


class TransferError(Exception):
    """A server failed."""


def download(url: str, folder: Path, check: Callable[[BinaryIO], None]) -> Path:
    """Return the copy of a file in a folder; download it if it is not there.

    Args:
        url: http or https address.
        folder: where the copy is, under a name that depends on the URL.
        check: raises any error if the downloaded file is damaged.

    Raises:
        InputError: the server fails, or sends nothing for `TIMEOUT_SECONDS`; the file is damaged, too large, or cannot
            be written.
    """
    from filelock import FileLock  # torch needs it, too

    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-100:]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # the ranks of a host ask for the same files
            for wait in () if path.exists() else (*RETRY_SECONDS, None):
                try:
                    with atomic_write(path) as temporary, temporary.open("rb+") as file:
                        file.writelines(_chunks(url))
                        file.seek(0)
                        check(file)
                    break
                except TransferError:
                    if wait is None:
                        raise
                    time.sleep(wait)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data {url} cannot be read ({' '.join(str(error).split())})") from error
    return path


def _chunks(url: str) -> Iterator[bytes]:
    received = 0
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # which follows no redirection to a local file
            promised = response.headers.get("Content-Length") or "0"
            while chunk := response.read(2**20):
                received += len(chunk)
                if received > MAX_BYTES:
                    raise ValueError(f"larger than {MAX_BYTES:,} bytes")
                yield chunk
            if received < int(promised):
                raise OSError(f"the server sent {received:,} of {int(promised):,} bytes")
    except (OSError, HTTPException) as error:
        raise TransferError(_describe(error)) from error


def _describe(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers with status {error.code}"
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"the server sends nothing for {TIMEOUT_SECONDS} seconds"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
