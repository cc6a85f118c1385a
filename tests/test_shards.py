"""Image data sets in tar shards: index, order, shares of the ranks, damaged shards and images, web servers."""

import functools
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparing import InputError, SparsityWarning
from sparing.data import DATASETS
from sparing.data.pictures import decode
from sparing.data.shards import ShardFiles
from test_cifar import _no_checksum as _no_checksum
from test_cifar import forge_cache
from test_imagenet import color_numbers, concatenated, equal, imagenet, noise_image, number_to_color, one_pass
from test_imagenet import textures as textures

ROOT = Path(__file__).parent.parent

# Raised on a machine with fewer cores than the workers of a test.
pytestmark = [
    pytest.mark.usefixtures("vision_operators"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def write_shard(path, examples, extension="JPEG"):
    """Write a tar file of examples (key, image or bytes, label), in that order."""
    with tarfile.open(path, "w") as tar:
        for key, image, label in examples:
            content = io.BytesIO()
            if isinstance(image, bytes):
                content.write(image)
            else:
                image.save(content, format="JPEG", quality=90)
            for name, data in ((f"{key}.{extension}", content.getvalue()), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def uniform_images(first, count):
    return [(f"{n:05}", Image.new("RGB", (40, 50), number_to_color(n)), n // 10) for n in range(first, first + count)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """15 shards of 10 uniform images and five of 7, each with its own color."""
    root = tmp_path_factory.mktemp("shards")
    for index in range(15):
        write_shard(root / f"train-{index:03}.tar", uniform_images(10 * index, 10))
    for index in range(5):
        write_shard(root / f"val-{index}.tar", uniform_images(200 + 7 * index, 7))
    return root


def webdataset(root, size=32, workers=0, **changes):
    arguments = {
        "train": f"{root}/train-{{000..011}}.tar", "train_examples": 120,
        "validation": [f"{root}/train-012.tar", f"{root}/train-01[34].tar"], "validation_examples": 30,
        "test": f"{root}/val-{{0,1,2,3,4}}.tar", "test_examples": 35, "num_classes": 24,
    }  # fmt: skip
    return DATASETS["webdataset"](size=size, workers=workers, **arguments | changes)


def all_color_numbers(batches):
    return [n for pixels, _ in batches for n in color_numbers(pixels)]


def test_splits_classes_and_shapes(shards):
    data = webdataset(shards)
    assert [data.size(split) for split in ("train", "validation", "test")] == [120, 30, 35]
    assert data.input_size == (1, 3, 32, 32)
    assert data.model_arguments() == {"num_classes": 24, "in_channels": 3}
    batches = data.training(50, seed=0)
    assert len(batches) == 3
    assert [tuple(pixels.shape) for pixels, _ in one_pass(batches)] == [(50, 3, 32, 32)] * 2 + [(20, 3, 32, 32)]


@pytest.mark.parametrize("shuffle", [0, 25, 10_000])
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 2)])
def test_batches_do_not_depend_on_ranks_and_workers(shards, ranks, workers, shuffle):
    """Each image is there once per epoch, also if the shards cannot be divided among the ranks and workers."""
    whole = one_pass(webdataset(shards, shuffle=shuffle).training(32, 0))
    data = webdataset(shards, workers=workers, shuffle=shuffle)
    shares = [one_pass(data.training(32, 0, rank, ranks)) for rank in range(ranks)]
    assert equal(concatenated(shares), whole)
    assert sorted(all_color_numbers(whole)) == list(range(120))
    assert all(torch.equal(labels, torch.tensor(color_numbers(pixels)) // 10) for pixels, labels in whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_begins_at_any_batch_and_decodes_no_other(shards, monkeypatch, workers):
    batches = webdataset(shards, workers=workers).training(16, seed=1)
    whole = one_pass(batches, 2)
    batches.start = len(batches) - 2
    decoded = []
    monkeypatch.setattr("sparing.data.pictures.decode", lambda file: decoded.append(1) or decode(file))
    assert equal(one_pass(batches, 2), whole[-2:])
    assert workers or len(decoded) == 16 + 8


def test_the_order_depends_on_seed_and_epoch(shards):
    def order(seed, epoch, **changes):
        return all_color_numbers(one_pass(webdataset(shards, **changes).training(30, seed), epoch))

    assert order(0, 1) == order(0, 1)
    # Without shuffling, only the order of the shards is random; with it, also that of neighbouring images.
    unshuffled, *others = (order(*each, shuffle=0) for each in ((0, 1), (0, 2), (1, 1)))
    assert unshuffled not in others
    assert [number % 10 for number in unshuffled] == list(range(10)) * 12
    near = order(0, 1, shuffle=20)
    assert near != unshuffled
    assert all(sorted(near[i : i + 20]) == sorted(unshuffled[i : i + 20]) for i in range(0, 120, 20))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_evaluation_yields_each_image_once(shards, ranks, monkeypatch):
    monkeypatch.setattr("sparing.data.pictures.EVALUATION_BATCH", 4)
    data = webdataset(shards, workers=1)
    for split, wanted in (("test", range(200, 235)), ("validation", range(120, 150))):
        shares = [data.evaluation(split, rank, ranks) for rank in range(ranks)]
        assert sorted(n for share in shares for n in all_color_numbers(share)) == list(wanted)


def test_a_damaged_image_is_replaced_in_training_and_skipped_in_evaluation(shards, tmp_path):
    examples = uniform_images(0, 10)
    examples[3] = ("00003", b"not an image", 0)
    write_shard(tmp_path / "train.tar", examples)
    one = {"train": f"{tmp_path}/train.tar", "train_examples": 10, "max_corrupt": 0.1, "shuffle": 0}
    with pytest.warns(SparsityWarning, match=r"train.tar: 00003 \(not a JPEG.* \(1 of 1 allowed\)"):
        assert all_color_numbers(one_pass(webdataset(shards, **one).training(5, 0))) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    data = webdataset(shards, test=f"{tmp_path}/train.tar", test_examples=10, max_corrupt=0.1)
    with pytest.warns(SparsityWarning):
        assert all_color_numbers(data.evaluation("test")) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match="1 of 10 images of the train split .*max_corrupt=0.001 allows 0"):
        one_pass(webdataset(shards, **one | {"max_corrupt": 0.001}).training(5, 0))


def tar_of_files(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0_txt": b"", "0_cls": b"1"}, "example 0 has no image 0.jpg"),
        ({"0_jpg": b""}, "example 0 has no decimal number in 0.cls"),
        ({"0_jpg": b"", "0_cls": b"cat"}, "example 0 has no decimal number in 0.cls"),
        ({"0_jpg": b"", "0_cls": b"1" * 5000}, "example 0 has no decimal number in 0.cls"),
        ({"0_jpg": b"", "0_JPG": b"", "0_cls": b"1"}, "0.JPG is there twice"),
        ({"0_md": b""}, "no examples in .*train.tar"),
        ({"0_jpg": b"", "0_cls": b"24"}, r"train.tar: 0: labels must be from 0 to 23 with num_classes=24, got 24"),
        ({"0_jpg": b"", "0_cls": b"1", "1_jpg": b"", "1_cls": b"1"}, "train have 2 examples, but train_examples is 1"),
    ],
)
def test_shards_of_another_content_are_rejected(shards, tmp_path, files, message):
    tar_of_files(tmp_path / "train.tar", **files)
    with pytest.raises(InputError, match=f"^data webdataset: .*{message}"):
        webdataset(shards, train=f"{tmp_path}/train.tar", train_examples=1)


@pytest.mark.parametrize("damage", ["truncated in an image", "cut between images", "not a tar file", "compressed"])
def test_a_damaged_shard_is_rejected(shards, tmp_path, damage):
    path = tmp_path / "train.tar"
    write_shard(path, uniform_images(0, 10))
    whole = path.read_bytes()
    damages = {"truncated in an image": whole[: 4 * 1024 + 700], "not a tar file": b"no tar " * 1000}
    damages |= {"cut between images": whole[: 4 * 1024], "compressed": __import__("gzip").compress(whole)}
    path.write_bytes(damages[damage])
    message = rf"^data webdataset: shard {re.escape(str(path))} cannot be read \([^\n]*\)$"
    with pytest.raises(InputError, match=message):
        webdataset(shards, train=str(path), train_examples=10)


def test_fewer_examples_than_promised_are_an_error(shards):
    for split, count in (("train", 120), ("validation", 30), ("test", 35)):
        with pytest.raises(InputError, match=f"of {split} have {count} examples, but {split}_examples is {count + 1}"):
            webdataset(shards, **{f"{split}_examples": count + 1})


def test_the_fingerprint_tells_shards_apart(shards):
    none = {"validation": None, "validation_examples": 0}
    first, again, other = (
        webdataset(shards, train=f"{shards}/train-{{{numbers}}}.tar", train_examples=20, **none).fingerprint()
        for numbers in ("000,001", "000..001", "000,002")
    )
    assert first == again
    assert {key for key in first if first[key] != other[key]} == {"train"}


def test_the_index_is_kept_until_a_shard_changes(shards, tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", uniform_images(0, 10))
    load = functools.partial(webdataset, shards, train=f"{tmp_path}/a.tar", cache=str(tmp_path / "index"))
    first = one_pass(load(train_examples=10).training(5, 0))
    with monkeypatch.context() as patch:
        patch.setattr("sparing.data.shards.scan_shard", lambda *args: pytest.fail("scanned again"))
        assert equal(one_pass(load(train_examples=10).training(5, 0)), first)
    write_shard(tmp_path / "a.tar", uniform_images(0, 12))
    assert load(train_examples=12).size("train") == 12


def test_shards_of_the_same_name_size_and_time_do_not_share_an_index(tmp_path):
    labels = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        shard = tmp_path / folder / "0.tar"
        tar_of_files(shard, a_jpg=b"", a_cls=str(number).encode())
        os.utime(shard, (0, 0))
        labels += ShardFiles.scan([str(shard)], str(tmp_path / "cache"), 0).labels.tolist()
    assert labels == [0, 1]


@pytest.mark.parametrize(
    "forge",
    [
        lambda index: {"rows": index["rows"]},
        lambda index: index | {"names": index["names"][:5]},
        lambda index: index | {"names": index["names"].float()},
        lambda index: index | {"rows": index["rows"] + 1},
        lambda index: index | {"rows": index["rows"] * 2**40},
        lambda index: index | {"rows": -index["rows"]},
        lambda index: index | {"rows": index["rows"].double()},
        lambda index: index | {"rows": index["rows"][:, :2].contiguous()},
        lambda index: index | {"rows": index["rows"][:, 0].contiguous()},
    ],
)
@pytest.mark.usefixtures("_no_checksum")
def test_a_forged_index_is_written_again(shards, tmp_path, forge):
    write_shard(tmp_path / "a.tar", uniform_images(0, 10))
    load = functools.partial(webdataset, shards, train=f"{tmp_path}/a.tar", train_examples=10)
    load()
    (path,) = tmp_path.glob(".index-*")
    right = path.read_bytes()
    forge_cache(path, forge)
    load()
    assert path.read_bytes() == right


@pytest.mark.slow
def test_write_shards_keeps_images_and_labels(textures, tmp_path):
    script = ROOT / "examples" / "04_write_shards.py"
    command = [sys.executable, str(script), str(textures / "train"), str(tmp_path / "train"), "3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    names = [f"{tmp_path}/train-000{number}.tar" for number in range(3)]
    assert printed == [
        *(f"{n}: {c}" for n, c in zip(names, (12, 12, 11), strict=True)),
        "35 images of 5 classes in 3 shards",
    ]
    assert sorted(map(str, tmp_path.iterdir())) == names
    tars = DATASETS["webdataset"](names[:2], names[2], 24, 11, 5, size=32, workers=0)
    folders = imagenet(textures, validation_per_class=0).train
    wanted = {(label, str(decode(folders.path(i)).tobytes())) for i, label in enumerate(folders.labels)}
    splits = [tars.train, tars.test]
    assert {(x.labels[i], str(decode(x.open(i)).tobytes())) for x in splits for i in range(len(x))} == wanted
    keys = [bytes(name) for name in splits[0].names]
    assert sorted(keys) != keys


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_shards_on_a_web_server_are_downloaded_once(shards, tmp_path):
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SilentHandler, directory=shards)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        given = {"train": f"{address}/train-{{000..001}}.tar", "train_examples": 20}
        with pytest.raises(InputError, match=r"set data\.cache to a folder"):
            webdataset(shards, **given)
        given["cache"] = str(tmp_path / "cache")
        first = one_pass(webdataset(shards, **given).training(5, 0))
        assert sorted(all_color_numbers(first)) == list(range(20))
        server.shutdown()
    # The server is gone.
    assert equal(one_pass(webdataset(shards, **given).training(5, 0)), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "pipe:cat a.tar"}, "train shard 'pipe:cat a.tar' must be a path or an http: or https: URL"),
        ({"train": "s3://bucket/a.tar"}, "must be a path or an http: or https: URL"),
        ({"test": "{root}/nothing-*.tar"}, "test shard .*/nothing-\\*.tar not found"),
        ({"test": "{root}/val-{{3..7}}.tar"}, "test shard .*/val-5.tar not found"),
        ({"test": "{root}/val-{{3..7.tar"}, "not found|cannot be expanded"),
        ({"validation": "{root}/train-011.tar"}, "train-011.tar is in train and in validation; remove it from one"),
        ({"validation": "{root}/val-0.tar"}, "val-0.tar is in validation and in test; remove it from one"),
        ({"validation": None}, "give both validation and validation_examples, or neither"),
        ({"train_examples": 0}, "train_examples must be an integer >= 1, got 0"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"shuffle": -1}, "shuffle must be an integer >= 0, got -1"),
        ({"size": "224"}, "size must be an integer >= 1, got '224'"),
    ],
)
def test_invalid_arguments_are_rejected(shards, arguments, message):
    given = {k: v.format(root=shards) if isinstance(v, str) and k != "size" else v for k, v in arguments.items()}
    with pytest.raises(InputError, match=message):
        webdataset(shards, **given)


def test_the_crop_of_an_image_does_not_depend_on_its_batch(shards, tmp_path):
    for index in range(2):
        write_shard(tmp_path / f"{index}.tar", [(f"{n}", noise_image(n), n) for n in (2 * index, 2 * index + 1)])

    def crops(batch_size):
        data = webdataset(shards, train=f"{tmp_path}/{{0,1}}.tar", train_examples=4)
        batches = one_pass(data.training(batch_size, 0))
        return {int(label): crop for batch in batches for crop, label in zip(*batch, strict=True)}

    alone, together = crops(1), crops(4)
    assert alone.keys() == {0, 1, 2, 3}
    assert all(torch.equal(alone[label], together[label]) for label in alone)


def test_the_index_and_names_are_arrays(shards):
    """Worker processes share arrays with the main process; lists of strings would be copied into each of them."""
    files = webdataset(shards).train
    assert all(isinstance(each, np.ndarray) for each in (files.names, files.labels, files.places))
