"""Read tar archives as a stream, without trust in their content."""

import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MAX_MEMBER_BYTES = 2**28
"""Maximum size of a member, and of a header with extensions."""
MAX_PADDING_BYTES = 2**20
"""Number of bytes after the end of an archive that are checked to be zero. tar pads archives to 10 kB by default."""


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
        _check_size(member)
        return member

    def _proc_gnusparse_10(self, *unused: Any) -> None:
        # The map of a sparse member has no maximum length.
        raise tarfile.ReadError(f"{self.name!r} is a sparse file")


def read_tar(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files of a tar archive, in order.

    The archive may be compressed. Memory is limited by `MAX_MEMBER_BYTES`.

    Args:
        stream: the archive, read once from begin to end.
        wanted: whether to read the file of a name.

    Raises:
        tarfile.TarError: the archive is damaged; it does not end with a block of zeros, as one that was cut between two
            members; a member is larger than `MAX_MEMBER_BYTES`; other data follows the archive.
        EOFError, OSError, ValueError: the archive is damaged.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            _check_size(member)  # again: an extended header can set another size
            if member.isreg() and wanted(member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content.read()
            archive.members = []  # type: ignore[attr-defined] # tarfile would keep all headers
        assert archive.fileobj is not None
        if archive.fileobj.read(MAX_PADDING_BYTES).strip(b"\0"):
            raise tarfile.ReadError("data follows the end of the archive")


def _check_size(member: tarfile.TarInfo) -> None:
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise tarfile.ReadError(f"{member.name!r} has {member.size:,} bytes; the maximum is {MAX_MEMBER_BYTES:,}")
