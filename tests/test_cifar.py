"""CIFAR-10 loaders on generated files: pixels, labels, splits, cache, and damaged or missing files."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparing import InputError, SparsityWarning
from sparing.data import DATASETS
from sparing.data.cifar import CLASSES, RECORD_BYTES, cifar10, cifar10_jpeg


def write_binary(folder, per_class=2):
    """Write batch files in which red is the image index, green the label and blue the column."""
    folder.mkdir()
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = torch.empty(10 * per_class, RECORD_BYTES, dtype=torch.uint8)
        records[:, 0] = torch.arange(10).repeat(per_class)
        planes = records[:, 1:].view(-1, 3, 32, 32)
        planes[:, 0] = torch.arange(10 * per_class, dtype=torch.uint8)[:, None, None]
        planes[:, 1] = records[:, 0][:, None, None]
        planes[:, 2] = torch.arange(32, dtype=torch.uint8)
        (folder / name).write_bytes(bytes(records.flatten().tolist()))
    return folder


def encoded_jpeg(index, label, size=32):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (10 * label, 10 * index, 200)).save(file, "JPEG", quality=100)
    return file.getvalue()


def write_archive(path, counts=None, kind="w:xz", prefix="", wrong=None):
    """Write an archive of JPEG files in which red is 10 · label and green is 10 · image index.

    `wrong` replaces the content of the first training image.
    """
    with tarfile.open(path, kind) as archive:
        for split, count in (counts or {"train": 10, "test": 1}).items():
            for index in range(count):
                for label, name in enumerate(CLASSES):
                    content = (
                        wrong if wrong and (split, index, label) == ("train", 0, 0) else encoded_jpeg(index, label)
                    )
                    member = tarfile.TarInfo(f"{prefix}{split}/{name}/{index:04d}.jpg")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_reads_pixels_labels_and_splits_of_the_binary_files(tmp_path):
    data = cifar10(str(write_binary(tmp_path / "batches")))
    assert (data.size("train"), data.size("validation"), data.size("test")) == (90, 10, 20)
    assert data.input_size == (1, 3, 32, 32)
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.pixels[:, 1, 0, 0].long(), split.labels)
        assert torch.equal(split.pixels[:, 0, 0, 0].long() % 10, split.labels)
        assert torch.equal(split.pixels[:, 2], torch.arange(32, dtype=torch.uint8).expand(len(split), 32, 32))
    assert data.validation.labels.bincount().tolist() == [1] * 10
    assert (data.shift, data.flip, data.num_classes) == (4, True, 10)


@pytest.mark.parametrize(("name", "kind"), [("a.tar.xz", "w:xz"), ("a.tar.gz", "w:gz"), ("a.tar", "w")])
def test_cifar10_jpeg_reads_every_image_of_an_archive(tmp_path, name, kind):
    data = cifar10_jpeg(str(write_archive(tmp_path / name, kind=kind, prefix="./")))
    assert (data.size("train"), data.size("validation"), data.size("test")) == (90, 10, 10)
    for split in (data.train, data.validation, data.test):
        # JPEG compression changes the color of a uniform image by at most 2.
        assert ((split.pixels[:, 0, 16, 16].long() - 10 * split.labels).abs() <= 2).all()
        assert ((split.pixels[:, 2].long() - 200).abs() <= 2).all()
    greens = torch.cat([data.train.pixels, data.validation.pixels])[:, 1, 0, 0]
    assert ((greens.long() + 5) // 10).bincount().tolist() == [10] * 10


def test_decoded_images_are_cached_until_the_archive_changes(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "a.tar.xz")
    first = cifar10_jpeg(str(archive))
    opened = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("decoded again"))
    second = cifar10_jpeg(str(archive))
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).pixels, getattr(second, split).pixels)
        assert torch.equal(getattr(first, split).labels, getattr(second, split).labels)
    monkeypatch.setattr(tarfile, "open", opened)
    write_archive(archive, {"train": 20, "test": 2})
    assert cifar10_jpeg(str(archive)).size("test") == 20, "the cache of the old archive was used"
    (tmp_path / "a.tar.xz.safetensors").write_bytes(b"damaged")
    assert cifar10_jpeg(str(archive)).size("test") == 20
    assert cifar10_jpeg(str(archive), shift=0, flip=False).shift == 0


def forge_cache(path, forge):
    """Change the tensors of a cache file and keep its key."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(forge(load_file(path)), path, metadata)


@pytest.fixture
def _no_checksum(monkeypatch):
    """The checksum of a cache file that is forged with care is right."""
    monkeypatch.setattr("sparing.data.cache.checksum", lambda key, tensors: repr(key))


def flip(name):
    """Return a function that changes one number of a tensor, so that its shape and range stay."""

    def change(found):
        flat = found[name].flatten()
        return found | {name: torch.cat([1 - flat[:1], flat[1:]]).view(found[name].shape)}

    return change


@pytest.mark.parametrize(
    "forge",
    [
        lambda found: {"train.pixels": found["train.pixels"]},
        lambda found: found | {"train.pixels": found["train.pixels"].float()},
        lambda found: found | {"train.pixels": found["train.pixels"][1:].clone()},
        lambda found: found | {"train.labels": found["train.labels"] - 1},
        lambda found: found | {"train.labels": found["train.labels"] + 1},
        lambda found: found | {"train.labels": found["train.labels"].double()},
        lambda found: found | {"train.labels": found["train.labels"][None]},
        lambda found: found | {"test.pixels": torch.empty(0), "test.labels": torch.empty(0).long()},
    ],
)
@pytest.mark.usefixtures("_no_checksum")
def test_a_forged_cache_of_images_is_written_again(tmp_path, forge):
    archive, cache = write_archive(tmp_path / "a.tar"), tmp_path / "a.tar.safetensors"
    cifar10_jpeg(str(archive))
    right = cache.read_bytes()
    forge_cache(cache, forge)
    cifar10_jpeg(str(archive))
    assert cache.read_bytes() == right


def test_a_cache_with_one_wrong_pixel_is_written_again(tmp_path):
    archive, cache = write_archive(tmp_path / "a.tar"), tmp_path / "a.tar.safetensors"
    cifar10_jpeg(str(archive))
    right = cache.read_bytes()
    forge_cache(cache, flip("test.pixels"))
    cifar10_jpeg(str(archive))
    assert cache.read_bytes() == right


def test_cifar10_jpeg_works_if_the_cache_cannot_be_written(tmp_path):
    archive = write_archive(tmp_path / "a.tar.xz")
    (tmp_path / "a.tar.xz.safetensors").mkdir()
    with pytest.warns(
        SparsityWarning, match="cannot be written: not a regular file; every run computes its content again"
    ):
        assert cifar10_jpeg(str(archive)).size("test") == 10


def test_both_loaders_are_registered():
    assert {"cifar10", "cifar10_jpeg"} <= DATASETS.keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), "data_batch_3.bin: cannot be read .No such file"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(b"x" * 5000),
            "test_batch.bin: the size of 5,000 bytes is not a multiple of 3,073",
        ),
        (
            lambda f: (f / "data_batch_1.bin").write_bytes(b""),
            "data_batch_1.bin: the size of 0 bytes is not a multiple",
        ),
        (
            lambda f: (f / "data_batch_1.bin").write_bytes(b"\x0b" * RECORD_BYTES),
            "from 0 to 9, got 11; this is not a CIFAR-10",
        ),
        (
            lambda f: (f / "test_batch.bin").write_bytes(bytes(RECORD_BYTES) + b"\x03" * RECORD_BYTES),
            r"test classes must have equal numbers of images, got \[1, 0, 0, 1, 0",
        ),
    ],
)
def test_cifar10_error_names_the_damaged_file(tmp_path, spoil, message):
    folder = write_binary(tmp_path / "batches")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        cifar10(str(folder))


def test_cifar10_jpeg_rejects_damaged_and_wrong_archives(tmp_path):
    archive = write_archive(tmp_path / "a.tar.xz")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a.tar.xz: damaged, or not an archive of JPEG files"):
        cifar10_jpeg(str(archive))
    for wrong, message in (
        (b"no image", "damaged"),
        (encoded_jpeg(0, 0, 16), r"0000.jpg must have 32×32 pixels, got \(16, 16\)"),
    ):
        with pytest.raises(InputError, match=message):
            cifar10_jpeg(str(write_archive(archive, wrong=wrong)))
    with pytest.raises(InputError, match="the training classes must have equal numbers of images, got .*0, 0, 0"):
        cifar10_jpeg(str(write_archive(archive, {"test": 1})))
    assert not archive.with_name("a.tar.xz.safetensors.tmp").exists()


@pytest.mark.parametrize(
    "name", ["mnist", "fashion_mnist", "cifar10", "cifar10_jpeg", "har2", "google12", "spoken_digits"]
)
def test_a_root_may_begin_with_the_home_directory(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}/absent"):
        DATASETS[name]("~/absent")


@pytest.mark.parametrize("name", ["cifar10", "cifar10_jpeg"])
def test_missing_data_error_tells_how_to_get_it(tmp_path, name):
    with pytest.raises(InputError, match=f"data {name}: .*absent not found; .*data.root"):
        DATASETS[name](str(tmp_path / "absent"))
