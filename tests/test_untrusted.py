"""Files, names and servers that are damaged or malicious: an error of one sentence, and nothing executed or lost."""

import functools
import http.server
import io
import socket
import tarfile
import threading
import time

import pytest
import torch

import sparing
from sparing import InputError
from sparing.data import shards
from sparing.data.tar import read_tar
from sparing.train.evaluate import evaluate


def tar_of(*names, size=700, **options):
    """Return a tar archive as bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", **options) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    return content.getvalue()


WHOLE = tar_of("0.jpg", "0.cls", "1.jpg", "1.cls")
MEMBER = 512 + 1024


def pax(**keys):
    """Return an archive whose member has an extended header."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("0.jpg")
        member.pax_headers = {key.replace("_", "."): value for key, value in keys.items()}
        archive.addfile(member)
    return content.getvalue()


def header(size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo("0.jpg")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


DAMAGES = {
    "cut between two members": WHOLE[: 2 * MEMBER],
    "cut in a header": WHOLE[: 2 * MEMBER + 100],
    "cut in a member": WHOLE[: 2 * MEMBER + 600],
    "flipped in a header": WHOLE[: 2 * MEMBER + 3] + b"\x7f" + WHOLE[2 * MEMBER + 4 :],
    "two archives in one": WHOLE + WHOLE,
    "member of 100 GB": header(10**11) + bytes(4096),
    "negative size": header(-5) + bytes(4096),
    "extended header of 100 GB": header(10**11, tarfile.XHDTYPE) + bytes(4096),
    "sparse member of 100 GB": pax(GNU_sparse_size="100000000000", GNU_sparse_map="0,0"),
    "endless map": pax(GNU_sparse_major="1", GNU_sparse_minor="0"),
    "size of 100 GB in the extended header": pax(size="100000000000"),
    "empty": b"",
    "not an archive": b"no tar " * 1000,
}


@pytest.mark.parametrize("compression", ["w", "w:gz"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_raise(damage, compression):
    import gzip

    content = DAMAGES[damage] if compression == "w" else gzip.compress(DAMAGES[damage])
    with pytest.raises((tarfile.TarError, ValueError, EOFError)):
        list(read_tar(io.BytesIO(content), lambda name: True))


def test_every_cut_of_an_archive_raises():
    for length in range(0, 4 * MEMBER + 512, 256):
        with pytest.raises(tarfile.TarError):
            list(read_tar(io.BytesIO(WHOLE[:length]), lambda name: True))
    found = list(read_tar(io.BytesIO(WHOLE), lambda name: name.endswith("jpg")))
    assert found == [("0.jpg", bytes(700)), ("1.jpg", bytes(700))]


@pytest.fixture
def serve():
    """Return a function that starts a server on a free port, and its address."""
    listeners = []

    def start(answer):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    answer(connection)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar"

    yield start
    for listener in listeners:
        listener.close()


def answer(text, content=b"", wait=0.0, connection=None):
    connection.sendall(text.encode() + b"\r\n\r\n" + content)
    time.sleep(wait)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (("HTTP/1.0 200 OK", WHOLE[: 2 * MEMBER]), "truncated, or damaged at byte 3,072"),
        (("HTTP/1.0 200 OK\r\nContent-Length: 100000", WHOLE[: 2 * MEMBER + 700]), "unexpected end of data"),
        (("HTTP/1.0 200 OK", WHOLE[:600], 1.0), "the server sends nothing for 0.2 seconds"),
        (("HTTP/1.0 500 Error",), "the server answers with status 500"),
        (("HTTP/1.0 404 Not Found",), "the server answers with status 404"),
        (("HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname",), "status 302|not allowed"),
        (("HTTP/1.0 302 Found\r\nLocation: ftp://127.0.0.1/x.tar",), "unknown url type"),
        (("nonsense", b"\0" * 100), r"cannot be read \(.+\)"),
    ],
)
def test_servers_that_fail_raise(serve, monkeypatch, reply, message):
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0.01, 0.01))
    address = serve(functools.partial(_reply, reply))
    with pytest.raises(InputError, match=message):
        list(shards.read_shards([address]))


def _reply(reply, connection):
    answer(*reply, connection=connection)


def test_a_server_that_fails_once_is_asked_again(serve, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0.01, 0.01))
    replies = iter([("HTTP/1.0 503 Busy",), ("HTTP/1.0 200 OK", WHOLE)])
    address = serve(lambda connection: answer(*next(replies), connection=connection))
    assert [sample["__key__"] for sample in shards.read_shards([address])] == ["0", "1"]


def test_no_name_of_a_shard_runs_a_command(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    names = ["pipe:touch PWNED;#.tar", "http:x.tar", "'; touch PWNED; '.tar", "-x.tar"]
    for name in names:
        (tmp_path / name).write_bytes(WHOLE)
    found = shards.expand_shards("train", ["*.tar", "*;*"])
    assert len(found) == 6
    assert [sample["__key__"] for sample in shards.read_shards(found)] == ["0", "1"] * 6
    with pytest.raises(InputError, match=r"write \./pipe:touch"):
        shards.expand_shards("train", names[0])
    with pytest.raises(InputError, match="cannot be read"):
        list(shards.read_shards(["http://127.0.0.1:9/'; touch PWNED; '.tar"]))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "pattern",
    ["{0..9999999999}.tar", "{0..99999}{0..99999}", "{1..9999999999999999999999}", "{a,b}" * 40, "{a..z}" * 9],
)
def test_patterns_with_too_many_names_raise(pattern):
    pytest.importorskip("webdataset")
    with pytest.raises(InputError, match="more than 1,000,000 names"):
        shards.expand_shards("train", pattern)


def test_no_examples_raise():
    with pytest.raises(InputError, match="there are no examples to evaluate"):
        evaluate(torch.nn.Flatten(), [])
