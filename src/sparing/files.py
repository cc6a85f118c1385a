"""Atomic file writes."""

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` if the block ends without an error.

    The temporary file is in the directory of `path`. Readers see the old file or the complete new file,
    also after a crash. If the block raises, the temporary file is deleted and `path` is unchanged.

    Args:
        path: the file to create or replace. If it is a symbolic link, the file it points to is replaced.

    Raises:
        OSError: `path` exists and is not a regular file, or the directory is not writable.

    Examples:
        >>> with atomic_write("notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("complete or not at all")
    """
    path = Path(path).resolve()  # replace the target of a symbolic link, not the link
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    # The process id alone is not unique: workers in containers share a directory, and often an id.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers create the file with mode 600
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(folder: str | Path) -> None:
    """Delete the temporary files that killed processes have left in a folder and the folders directly in it.

    Files of a process that still runs on this host are kept. The caller makes sure that no other host writes there.
    """
    own = f".{socket.gethostname()}."
    for pattern in (".*", "*/.*"):
        for path in Path(folder).glob(pattern):
            found = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{8}", path.name)
            if found and path.is_file() and not (own in path.name and _is_running(int(found[1]))):
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        pass
    return True
