"""Write files atomically; read and write text that may come from somebody else."""

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from sparing.errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` if the block ends without an error.

    The temporary file is in the directory of `path`. Readers see the old file or the complete new file,
    also after a crash. If the block raises, the temporary file is deleted and `path` is unchanged.

    Args:
        path: the file to create or replace. If it is a symbolic link, the file it points to is replaced.

    Raises:
        InputError: `path` exists and is not a regular file, the directory is not writable, or the disk is full.

    Examples:
        >>> with atomic_write("notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("complete or not at all")
    """
    try:
        # Replace the target of a symbolic link, not the link.
        with _replace(Path(os.path.realpath(path))) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _replace(path: Path) -> Iterator[Path]:
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


class _Checked(Exception):  # noqa: N818
    pass


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Raises:
        InputError: as `atomic_write`.
    """
    with suppress(_Checked), atomic_write(path):
        raise _Checked  # the temporary file is deleted, and `path` stays as it is


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Other things at the path are refused: a pipe may never begin, and a device never end.

    Raises:
        OSError: the path cannot be opened, or is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def read_text(path: str | Path, where: str, max_bytes: int = 2**25) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        where: start of error messages.
        max_bytes: maximum size.

    Raises:
        InputError: the file is missing, not a regular file, too large, or not a text file.
    """
    try:
        with open_regular(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise InputError(f"{where}: cannot be read: larger than {max_bytes:,} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not a text file") from error


FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""Beginnings of cells that spreadsheets run as formulas, and the mark that prevents it."""


def escape_cell(text: str) -> str:
    """Return a text as a cell of a CSV file that spreadsheets do not run as a formula.

    Examples:
        >>> escape_cell("=1+1"), escape_cell("conv1")
        ("'=1+1", 'conv1')
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def unescape_cell(cell: str) -> str:
    """Return the text of a cell that `escape_cell` wrote."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def printable(text: str) -> str:
    r"""Return a text for the terminal: control characters, which could move the cursor or hide text, are escaped.

    Examples:
        >>> printable("conv\x1b[2J")
        'conv\\x1b[2J'
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


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
