"""Files, names and servers that are damaged or malicious: an error of one sentence, and nothing executed or lost."""

import csv
import functools
import gzip
import io
import os
import random
import socket
import tarfile
import threading
import time
import wave

import pytest
import torch
from PIL import Image
from torch import nn

import sparing
from sparing import Budget, InputError, SparsityWarning, engine
from sparing.data import download as servers
from sparing.data import mnist, shards
from sparing.data.cache import cached
from sparing.data.cifar import _read_archive, _read_binary
from sparing.data.image import _read_idx
from sparing.data.pictures import decode
from sparing.data.speech import read_wav
from sparing.data.tar import read_tar
from sparing.export import str_release
from sparing.files import atomic_write, escape_cell, printable, unescape_cell
from sparing.run.checkpoint import load_checkpoint
from sparing.run.evaluate import evaluate


def tar_of(*names, size=700, **options):
    """Return a tar archive as bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", **options) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(b"7".ljust(size)))
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


def contents(archive, mode="r|*"):
    return {member.name: content() for member, content in read_tar(io.BytesIO(archive), mode)}


@pytest.mark.parametrize("mode", ["r|*", "r:", "gz"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_raise(damage, mode):
    with pytest.raises((tarfile.TarError, ValueError, EOFError)):
        contents(gzip.compress(DAMAGES[damage]), "r|*") if mode == "gz" else contents(DAMAGES[damage], mode)


def test_every_cut_of_an_archive_raises():
    for length in range(0, 4 * MEMBER + 512, 256):
        with pytest.raises(tarfile.TarError):
            contents(WHOLE[:length], "r:" if length % 512 else "r|*")
    for mode in ("r|*", "r:"):
        assert contents(WHOLE, mode) == dict.fromkeys(("0.jpg", "0.cls", "1.jpg", "1.cls"), b"7".ljust(700))


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
        (("HTTP/1.0 200 OK\r\nContent-Length: 100000", WHOLE), "sent 10,240 of 100,000 bytes|IncompleteRead"),
        (("HTTP/1.0 200 OK", WHOLE[:600], 1.0), "the server sends nothing for 0.2 seconds"),
        (("HTTP/1.0 500 Error",), "the server answers with status 500"),
        (("HTTP/1.0 404 Not Found",), "the server answers with status 404"),
        (("HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname",), "status 302|not allowed"),
        (("HTTP/1.0 200 OK\r\nContent-Length: x", WHOLE), r"cannot be read \(.+\)"),
        (("HTTP/1.0 200 OK", bytes(10**6)), "larger than 100,000 bytes"),
        (("nonsense", b"\0" * 100), r"cannot be read \(.+\)"),
    ],
)
def test_servers_that_fail_raise(serve, monkeypatch, tmp_path, reply, message):
    monkeypatch.setattr(servers, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(servers, "RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(servers, "MAX_BYTES", 10**5)
    address = serve(functools.partial(_reply, reply))
    with pytest.raises(InputError, match=message):
        shards.ShardFiles.scan([address], str(tmp_path), 0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def _reply(reply, connection):
    answer(*reply, connection=connection)


def test_a_server_that_fails_once_is_asked_again(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "RETRY_SECONDS", (0.01, 0.01))
    replies = iter([("HTTP/1.0 503 Busy",), ("HTTP/1.0 200 OK", WHOLE)])
    address = serve(lambda connection: answer(*next(replies), connection=connection))
    assert shards.ShardFiles.scan([address], str(tmp_path), 0).names.tolist() == [b"0", b"1"]


def test_no_name_of_a_shard_runs_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "RETRY_SECONDS", ())
    names = ["pipe:touch PWNED;#.tar", "http:x.tar", "'; touch PWNED; '.tar", "-x.tar"]
    for name in names:
        (tmp_path / name).write_bytes(WHOLE)
    found = shards.expand_shards("train", ["*.tar", "*;*"])
    assert len(found) == 6
    assert shards.ShardFiles.scan(found, None, 0).names.tolist() == [b"0", b"1"] * 6
    with pytest.raises(InputError, match=r"write \./pipe:touch"):
        shards.expand_shards("train", names[0])
    with pytest.raises(InputError, match="cannot be read"):
        shards.ShardFiles.scan(["http://127.0.0.1:9/'; touch PWNED; '.tar"], str(tmp_path), 0)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "pattern",
    ["{0..9999999999}.tar", "{0..99999}{0..99999}", "{1..9999999999999999999999}", "{a,b}" * 40],
)
def test_patterns_with_too_many_names_raise(pattern):
    with pytest.raises(InputError, match="more than 1,000,000 names"):
        shards.expand_shards("train", pattern)


def test_no_examples_raise():
    with pytest.raises(InputError, match="there are no examples to evaluate"):
        evaluate(torch.nn.Flatten(), [])


def test_a_small_file_of_images_that_expands_to_gigabytes_raises(tmp_path):
    expands = gzip.compress(bytes(10**7))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(expands)
    with pytest.raises(InputError, match="does not hold 10 items"):
        _read_idx(tmp_path, "train", 10)


def test_files_that_are_no_regular_files_raise(tmp_path):
    """Reading a pipe would wait, and reading a device would never end."""
    pipe = tmp_path / "train-images-idx3-ubyte.gz"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="not a regular file"):
        decode(str(pipe))
    for read in (engine.load, load_checkpoint, lambda path: read_wav(path, 8000), lambda path: mnist(str(path.parent))):
        with pytest.raises(InputError, match="not a regular file|no such file"):
            read(pipe)
    with pytest.warns(SparsityWarning, match="not a regular file"):
        assert cached(pipe, "key", lambda: {"x": torch.ones(1)}, bool) == {"x": torch.ones(1)}
    for target, read in (("b.json", Budget.load), ("b.bin", _read_binary)):
        (tmp_path / target).symlink_to("/dev/zero")
        with pytest.raises(InputError, match="not a regular file|size of 0 bytes"):
            read(tmp_path / target)


def mutations(content, count, first):
    """Yield damaged copies of a file, mostly in its first bytes."""
    rng = random.Random(0)
    for number in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 20))):
            last = first if rng.random() < 0.8 else len(changed)
            changed[rng.randrange(last)] = rng.choice((0, 255, 127, rng.randrange(256)))
        if number % 5 == 0:
            del changed[rng.randrange(len(changed)) :]
        yield bytes(changed)


def test_random_damage_of_recordings_and_archives_raises(tmp_path):
    recording, archive, picture = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with wave.open(recording, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(4000))
    Image.new("RGB", (32, 32)).save(picture, "JPEG")
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("train/airplane/0.jpg", "test/bird/0.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    path, messages = tmp_path / "file", []
    for content, first, read in (
        (recording.getvalue(), 44, lambda path: read_wav(path, 8000)), (archive.getvalue(), 4096, _read_archive),
    ):  # fmt: skip
        for changed in mutations(content, 200, first):
            path.write_bytes(changed)
            try:
                read(path)
            except InputError as error:
                messages.append(str(error))
    assert len(messages) > 200
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", "[" * 50_000 + "]" * 50_000, "not a table of layer and sparsity"),
        ("b.json", '{"\\ud800": 0.5}', "not a table of layer and sparsity"),
        ("b.json", '{"a": 1' + "0" * 5000 + "}", "not a table of layer and sparsity"),
        ("b.json", '{"a": 0.5, "a": 0.7}', "has layer 'a' twice"),
        ("b.json", '{"a\\u001b[2J": 2}', r"b.json: the sparsity of layer 'a\\x1b\[2J' must be in"),
        ("b.csv", "layer,sparsity\n" + "a" * 200_000 + ",0.5\n", "field larger than field limit"),
        ("b.csv", "layer,sparsity\na,0.5\na,0.7\n", "has layer 'a' twice"),
        ("b.csv", "layer,sparsity\na,0.5,0.7\n", "a row has more cells"),
        ("b.csv", 'layer,sparsity\n"a,0.5\n', "not a table of layer and sparsity"),
        ("b.csv", "x" * (2**25 + 1), "larger than 33,554,432 bytes"),
    ],
    ids=str.split("deep surrogate digits twice escape field csv_twice cells quote large"),
)
def test_damaged_budgets_raise(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        Budget.load(tmp_path / name)
    assert "\n" not in str(raised.value)


NAMES = ("=1+1", "+a", "-b", "@c", "'=d", "'e", "\tf", "plain", "")


def test_names_are_no_formulas_in_csv_files(tmp_path):
    assert [unescape_cell(escape_cell(name)) for name in NAMES] == list(NAMES)
    budget = Budget(dict.fromkeys(NAMES, 0.5))
    budget.save(tmp_path / "b.csv")
    assert Budget.load(tmp_path / "b.csv") == budget
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in NAMES if name})
    for text in ((tmp_path / "b.csv").read_text(), sparing.report(model).to_csv()):
        cells = [row[0] for row in csv.reader(io.StringIO(text))]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]


def test_names_do_not_control_the_terminal():
    table = str(sparing.report(nn.ModuleDict({"a\x1b[2J\u202eb": nn.Linear(2, 2)})))
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert r"a\x1b[2J\u202eb" in table
    assert printable("90 % ± 1\tof x\n") == "90 % ± 1\tof x\n"


@functools.cache
def resnet18():
    return sparing.models.resnet18().state_dict()


def release(**changes):
    state = {f"module.{name}": tensor for name, tensor in resnet18().items()}
    return {"state_dict": state | {f"module.{name}": change(state) for name, change in changes.items()}}


FIRST, FC = "module.conv1.weight", "module.fc.weight"
THRESHOLD = "layer1.0.conv1.sparseThreshold"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("conv1.weight", lambda s: s[FIRST].to("meta"), "has no values"),
        ("conv1.weight", lambda s: s[FIRST].to_sparse(), "layout torch.sparse_coo"),
        ("conv1.weight", lambda s: s[FIRST].to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        ("conv1.weight", lambda s: s[FIRST].to(torch.complex64), "dtype torch.complex64"),
        ("conv1.weight", lambda s: s[FIRST].long(), "has dtype torch.int64, expected torch.float32"),
        ("conv1.weight", lambda s: torch.nested.nested_tensor([s[FIRST][0]]), "'conv1.weight' has dtype"),
        ("fc.weight", lambda s: torch.zeros(1).expand(10**12, 512), "more elements than the file has numbers"),
        ("fc.weight", lambda s: torch.zeros(1).expand(10**9, 512, 1, 1), "more elements than the file has numbers"),
        (THRESHOLD, lambda s: torch.full((1, 1), float("nan")), "is NaN"),
        (THRESHOLD, lambda s: torch.ones(1, 1, device="meta"), "has no values"),
        (THRESHOLD, lambda s: torch.ones(1, 1).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=str.split("meta sparse float8 complex integer nested huge huge_1x1 nan_s meta_s sparse_s"),
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_odd_tensors_in_a_checkpoint_raise(tmp_path, name, change, message):
    torch.save(release(**{name: change}), tmp_path / "c.pth")
    with pytest.raises(sparing.CheckpointError, match=message):
        str_release.convert(tmp_path / "c.pth", "resnet18")


def test_a_tensor_twice_in_a_checkpoint_raises(tmp_path):
    content = release()
    content["state_dict"]["conv1.weight"] = torch.ones(64, 3, 7, 7)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(sparing.CheckpointError, match="has tensor 'conv1.weight' twice"):
        str_release.convert(tmp_path / "c.pth", "resnet18")


def test_every_failed_write_is_one_sentence_with_the_path(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "nowhere" / "x", tmp_path, tmp_path / "loop" / "x", "/dev/full", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"^{path} cannot be written: [^\n]+$"), atomic_write(path) as temporary:
            temporary.write_text("content")
    with pytest.raises(InputError, match="x cannot be written: .*No such file"), atomic_write(tmp_path / "x"):
        save_file({"a": torch.ones(2)}, tmp_path / "nowhere" / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (sparing.STR, "init"),
        (sparing.STR, "scale"),
        (sparing.DST, "alpha"),
        (functools.partial(sparing.VariationalDropout, kl_weight=1.0), "cut"),
        (functools.partial(sparing.DSR, sparsity=0.5), "threshold"),
        (functools.partial(sparing.GraSP, sparsity=0.5), "probe"),
        (functools.partial(sparing.ContinuousSparsification, weight=1.0), "final_temperature"),
    ],
)
@pytest.mark.parametrize("number", [1e300, 10**30, 2**63])
def test_numbers_that_no_tensor_holds_raise(make, field, number):
    with pytest.raises(InputError, match=f"{field} must be"):
        make(**{field: number})
