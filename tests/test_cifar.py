"""CIFAR-10 from generated files of both kinds: every pixel in its place, nothing lost unnoticed."""

import io
import tarfile

import pytest
import torch
from PIL import Image

from sparing import InputError
from sparing.data import DATASETS
from sparing.data.cifar import CLASSES, RECORD, cifar10, cifar10_jpeg


def binary(folder, per_class=2):
    """Batches whose image i of label l is i in red, l in green and the column in blue."""
    folder.mkdir()
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = torch.empty(10 * per_class, RECORD, dtype=torch.uint8)
        records[:, 0] = torch.arange(10).repeat(per_class)
        planes = records[:, 1:].view(-1, 3, 32, 32)
        planes[:, 0] = torch.arange(10 * per_class, dtype=torch.uint8)[:, None, None]
        planes[:, 1] = records[:, 0][:, None, None]
        planes[:, 2] = torch.arange(32, dtype=torch.uint8)
        (folder / name).write_bytes(bytes(records.flatten().tolist()))
    return folder


def picture(index, label, size=32):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (10 * label, 10 * index, 200)).save(file, "JPEG", quality=100)
    return file.getvalue()


def jpeg(path, counts=None, kind="w:xz", prefix="", wrong=None):
    """An archive of pictures whose red is ten times the label, and whose green tells them apart."""
    with tarfile.open(path, kind) as archive:
        for part, count in (counts or {"train": 10, "test": 1}).items():
            for index in range(count):
                for label, name in enumerate(CLASSES):
                    content = wrong if wrong and (part, index, label) == ("train", 0, 0) else picture(index, label)
                    member = tarfile.TarInfo(f"{prefix}{part}/{name}/{index:04d}.jpg")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


def test_the_binary_files_are_read_to_the_last_pixel(tmp_path):
    data = cifar10(str(binary(tmp_path / "batches")))
    assert (data.size("train"), data.size("validation"), data.size("test")) == (90, 10, 20)
    assert data.input_size == (1, 3, 32, 32)
    for part in (data.train, data.validation, data.test):
        assert torch.equal(part.pixels[:, 1, 0, 0].long(), part.labels)
        assert torch.equal(part.pixels[:, 0, 0, 0].long() % 10, part.labels)
        assert torch.equal(part.pixels[:, 2], torch.arange(32, dtype=torch.uint8).expand(len(part), 32, 32))
    assert data.validation.labels.bincount().tolist() == [1] * 10
    assert (data.shift, data.flip, data.num_classes) == (4, True, 10)


@pytest.mark.parametrize(("name", "kind"), [("a.tar.xz", "w:xz"), ("a.tar.gz", "w:gz"), ("a.tar", "w")])
def test_the_archive_is_read_to_the_last_picture(tmp_path, name, kind):
    data = cifar10_jpeg(str(jpeg(tmp_path / name, kind=kind, prefix="./")))
    assert (data.size("train"), data.size("validation"), data.size("test")) == (90, 10, 10)
    for part in (data.train, data.validation, data.test):
        # A JPEG file of one color keeps it within a step or two.
        assert ((part.pixels[:, 0, 16, 16].long() - 10 * part.labels).abs() <= 2).all()
        assert ((part.pixels[:, 2].long() - 200).abs() <= 2).all()
    greens = torch.cat([data.train.pixels, data.validation.pixels])[:, 1, 0, 0]
    assert ((greens.long() + 5) // 10).bincount().tolist() == [10] * 10


def test_the_pictures_are_decoded_once(tmp_path, monkeypatch):
    archive = jpeg(tmp_path / "a.tar.xz")
    first = cifar10_jpeg(str(archive))
    opened = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("decoded again"))
    second = cifar10_jpeg(str(archive))
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).pixels, getattr(second, part).pixels)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)
    monkeypatch.setattr(tarfile, "open", opened)
    jpeg(archive, {"train": 20, "test": 2})
    assert cifar10_jpeg(str(archive)).size("test") == 20, "another archive under the old name"
    (tmp_path / "a.tar.xz.safetensors").write_bytes(b"damaged")
    assert cifar10_jpeg(str(archive)).size("test") == 20
    assert cifar10_jpeg(str(archive), shift=0, flip=False).shift == 0


def test_a_folder_that_cannot_be_written_costs_the_decoding_only(tmp_path):
    archive = jpeg(tmp_path / "a.tar.xz")
    (tmp_path / "a.tar.xz.safetensors").mkdir()
    assert cifar10_jpeg(str(archive)).size("test") == 10


def test_both_are_named_in_recipes():
    assert {"cifar10", "cifar10_jpeg"} <= DATASETS.keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), "data_batch_3.bin: cannot be read .No such file"),
        (lambda f: (f / "test_batch.bin").write_bytes(b"x" * 5000), "test_batch.bin: 5,000 bytes are no whole number"),
        (lambda f: (f / "data_batch_1.bin").write_bytes(b""), "data_batch_1.bin: 0 bytes are no whole number"),
        (lambda f: (f / "data_batch_1.bin").write_bytes(b"\x0b" * RECORD), "has label 11; this is no batch of CIFAR"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(bytes(RECORD) + b"\x03" * RECORD),
            r"test classes have \[1, 0, 0, 1, 0",
        ),
    ],
)
def test_damaged_binary_files_are_named(tmp_path, spoil, message):
    folder = binary(tmp_path / "batches")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        cifar10(str(folder))


def test_a_damaged_archive_is_named(tmp_path):
    archive = jpeg(tmp_path / "a.tar.xz")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a.tar.xz: damaged, or no archive of JPEG files"):
        cifar10_jpeg(str(archive))
    for wrong, message in ((b"no picture", "damaged"), (picture(0, 0, 16), r"0000.jpg has \(16, 16\) pixels")):
        with pytest.raises(InputError, match=message):
            cifar10_jpeg(str(jpeg(archive, wrong=wrong)))
    with pytest.raises(InputError, match="its training classes have .*0, 0, 0"):
        cifar10_jpeg(str(jpeg(archive, {"test": 1})))
    assert not archive.with_name("a.tar.xz.safetensors.tmp").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar10_jpeg"])
def test_missing_data_says_where_to_get_it(tmp_path, name):
    with pytest.raises(InputError, match=f"data {name}: no .*absent; .*data.root"):
        DATASETS[name](str(tmp_path / "absent"))
