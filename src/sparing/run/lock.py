"""A lock on a run directory: one process at a time trains in it."""

import contextlib
import errno
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO

from sparing.errors import InputError, SparsityWarning

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """Context that releases the lock on a run directory, if it was acquired.

    The operating system releases the lock of a process that ends, however it ends. It does not pass to the processes
    that load data, which may live a few seconds longer.

    Args:
        out: run directory.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            InputError: another process has it; its id and host are named.

        Warns:
            SparsityWarning: the file system has no locks.
        """
        if fcntl is None:
            return
        while self._file is None:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read(200).strip()
                file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    warnings.warn(
                        f"{self._out} cannot be locked ({error.strerror}): only one process may train in it",
                        SparsityWarning,
                        stacklevel=2,
                    )
                    return
                raise InputError(
                    f"{self._out} is in use by {owner or 'another process'}; wait until it ends, or choose another "
                    "directory with --out"
                ) from error
            # The file may have been deleted by the process that had the lock before.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    self._file = file
                    continue
            file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the directory was removed, or is read-only
                self._path.unlink()
            self._file.close()
            self._file = None
