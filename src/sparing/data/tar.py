"""Read tar archives without trust in their content."""

import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

MAX_MEMBER_BYTES = 2**28
"""Maximum size of a member, and of a header with extensions."""
MAX_PADDING_BYTES = 2**20
"""Number of bytes after the end of an archive that are checked to be zero. tar pads archives to 10 kB by default."""
MAX_NAME = 4096


class _Member(tarfile.TarInfo):
    """Header of a member. Where `tarfile` takes a damaged or missing header for the end, it raises ReadError."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # a block of zeros: the regular end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"truncated, or damaged at byte {archive.offset:,} ({error})") from error

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        _check(member)
        return member

    def _proc_gnusparse_10(self, *unused: Any) -> None:
        _check(self, sparse=True)  # the map of a sparse member has no maximum length


def read_tar(stream: BinaryIO, mode: str = "r|*") -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield the regular files of a tar archive in order: the header, and a function that reads the content.

    Args:
        stream: the archive, read once from begin to end. It may be compressed.
        mode: "r:" for an archive without compression that can be sought: what is not read is skipped.

    Raises:
        tarfile.TarError: the archive is damaged; it does not end with a block of zeros, as one that was cut between two
            members; a member is larger than `MAX_MEMBER_BYTES`, or sparse; other data follows the archive.
        EOFError, OSError, ValueError: the archive is damaged.
    """
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Member) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            _check(member, sparse=member.issparse())  # again: an extended header can set another size
            if member.isreg():
                yield member, partial(_content, archive, member)
            archive.members = []  # tarfile would keep all headers
        if archive.fileobj.read(MAX_PADDING_BYTES).strip(b"\0"):
            raise tarfile.ReadError("data follows the end of the archive")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def _check(member: tarfile.TarInfo, sparse: bool = False) -> None:
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise tarfile.ReadError(f"{member.name!r} has {member.size:,} bytes; the maximum is {MAX_MEMBER_BYTES:,}")
    if sparse or len(member.name) > MAX_NAME:
        raise tarfile.ReadError(f"{member.name[:MAX_NAME]!r} is a sparse file, or its name is too long")
