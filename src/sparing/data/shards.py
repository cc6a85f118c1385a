"""Images in tar shards (webdataset format), read in any order by an index of their members.

The readers of the package webdataset are not used: they stream shards, so order and number of the examples depend on
ranks and workers, and a run cannot go on in mid-epoch without reading it again; they run commands in names of shards,
take a cut shard for a whole one, and allocate what a header asks for.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.data.cache import cached
from sparing.data.download import download
from sparing.data.pictures import FileData, ImageFiles, check_arguments, check_count, one_line, require_torchvision
from sparing.data.tar import MAX_MEMBER_BYTES, read_tar
from sparing.errors import InputError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""File name extensions of images in a shard, by priority."""
URL = re.compile(r"https?://", re.IGNORECASE)
MAX_SHARDS = 10**6
"""Maximum number of shards that braces expand to."""
DAMAGES = (OSError, EOFError, ValueError, tarfile.TarError)


def webdataset(
    train: str | list[str],
    test: str | list[str],
    train_examples: int,
    test_examples: int,
    num_classes: int,
    validation: str | list[str] | None = None,
    validation_examples: int = 0,
    size: int = 224,
    shuffle: int = 10_000,
    workers: int | None = None,
    max_corrupt: float = 0.001,
    cache: str | None = None,
) -> FileData:
    """Load images from tar shards: for storage on which a million single files are slow, and for web servers.

    An example is an image `<key>.jpg` (or .jpeg, .png, .webp) and its label `<key>.cls`, a decimal number. Shards
    are given as paths with braces (`train-{000..146}.tar`) or wildcards (`train-*.tar`), or as http or https URLs
    with braces. They must not be compressed.

    The first time, all shards are scanned, and an index of their members is written beside the first one or in
    `cache`. Shards on web servers are downloaded to `cache` before. So each image appears exactly once per epoch, and
    order, crop and flip depend only on seed and epoch. The order of an epoch is that of the shards, at random, with the
    images shuffled among `shuffle` neighbours: reads stay close together.

    Args:
        train: training shards.
        test: test shards. For ImageNet, use `val`, as the labels of its own test set are not public.
        train_examples: number of images in `train`.
        test_examples: number of images in `test`.
        num_classes: number of classes; labels are 0 to num_classes − 1.
        validation: validation shards, such as the last shards of ImageNet's `train`. With None there is no
            validation split, and the last epoch is the result of the run.
        validation_examples: number of images in `validation`.
        size: height and width of the network input, in pixels.
        shuffle: number of images that are shuffled together. Shards should be written in random order, too.
        workers: number of decoding processes, see `imagenet`.
        max_corrupt: maximum fraction of unreadable images in a split, see `imagenet`.
        cache: folder for the index, and for shards of web servers, which need it.

    Raises:
        InputError: torchvision is not installed; a shard is missing, damaged, or in two splits; a server does not
            answer; the shards do not have the number of images that was promised, or labels out of range.

    Examples:
        >>> data = webdataset("train-{000..146}.tar", "val-*.tar", 1281167, 50000, 1000)  # doctest: +SKIP
        >>> data.size("train")  # doctest: +SKIP
        1281167
    """
    workers = check_arguments("webdataset", size, workers, max_corrupt)
    promised = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    for split, count in promised.items():
        check_count("webdataset", f"{split}_examples", count, least=0 if split == "validation" else 1)
    check_count("webdataset", "num_classes", num_classes, least=1)
    check_count("webdataset", "shuffle", shuffle, least=0)
    if bool(validation) != bool(validation_examples):
        raise InputError("data webdataset: give both validation and validation_examples, or neither")
    require_torchvision("webdataset")
    given = {"train": train, "validation": validation or [], "test": test}
    shards = {split: expand_shards(split, patterns) for split, patterns in given.items()}
    for one, other in itertools.combinations(shards, 2):
        if both := sorted(set(shards[one]) & set(shards[other])):
            raise InputError(f"data webdataset: shard {both[0]} is in {one} and in {other}; remove it from one of them")
    splits = {split: ShardFiles.scan(names, cache, shuffle) for split, names in shards.items()}
    for split, files in splits.items():
        if len(files) != promised[split]:
            raise InputError(
                f"data webdataset: the shards of {split} have {len(files)} examples, but {split}_examples is "
                f"{promised[split]}: correct it, or complete the shards"
            )
        wrong = np.flatnonzero(files.labels >= num_classes)
        if len(wrong):
            raise InputError(
                f"data webdataset: {files.path(wrong[0])}: labels must be from 0 to {num_classes - 1} with "
                f"num_classes={num_classes}, got {files.labels[wrong[0]]}"
            )
    return FileData(splits["train"], splits["validation"], splits["test"], num_classes, size, workers, max_corrupt)


@dataclass(frozen=True)
class ShardFiles(ImageFiles):
    """Images in shards. A row of `places` is the number of the shard, and offset and size in it."""

    places: NDArray[np.int64]
    shards: list[str]
    shuffle: int

    @classmethod
    def scan(cls, shards: list[str], cache: str | None, shuffle: int) -> "ShardFiles":
        """Download shards with a URL, and index all."""
        if not shards:
            empty = np.empty(0, dtype=np.int64)
            return cls(np.empty(0, dtype=np.bytes_), empty, empty.reshape(0, 3), [], shuffle)
        if cache is None and any(map(URL.match, shards)):
            raise InputError("data webdataset: set data.cache to a folder on a disk that holds the shards of the URLs")
        folder = Path(os.path.dirname(shards[0]) if cache is None else cache).expanduser()
        files = [str(download(shard, folder, _check)) if URL.match(shard) else shard for shard in shards]
        # Relative to the folder, so that it can be moved, and shards of the same name are not mixed up in one cache.
        status = [(os.path.relpath(file, folder), (each := os.stat(file)).st_size, each.st_mtime_ns) for file in files]
        path = folder / f".index-{hashlib.sha256(repr(status).encode()).hexdigest()[:16]}.safetensors"
        index = cached(path, (1, status), lambda: _index(files), lambda found: _is_index(found, len(files)))
        names, rows = index["names"].numpy(), index["rows"].numpy()
        places, labels = np.ascontiguousarray(rows[:, :3]), np.ascontiguousarray(rows[:, 3])
        return cls(names.view(f"S{names.shape[1]}").reshape(len(rows)), labels, places, files, shuffle)

    def path(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}: {os.fsdecode(bytes(self.names[index]))}"

    def open(self, index: int) -> BinaryIO:
        shard, offset, size = self.places[index].tolist()
        with open(self.shards[shard], "rb", buffering=0) as file:
            file.seek(offset)
            return BytesIO(file.read(size))

    def order(self, generator: torch.Generator) -> Tensor:
        shards = torch.arange(len(self)).split(np.bincount(self.places[:, 0]).tolist())
        order = torch.cat([shards[shard] for shard in torch.randperm(len(shards), generator=generator).tolist()])
        if self.shuffle < 2:
            return order
        windows = order.split(self.shuffle)
        return torch.cat([each[torch.randperm(len(each), generator=generator)] for each in windows])


def _index(files: list[str]) -> dict[str, Tensor]:
    """Return the keys of the examples in shards, and rows of shard, offset, size and label."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(scan_shard, range(len(files)), files))
    names = np.concatenate([names for names, _ in found])
    if not len(names):
        raise InputError(f"data webdataset: no examples in {', '.join(files[:3])}")
    rows = torch.from_numpy(np.concatenate([rows for _, rows in found]))
    return {"names": torch.from_numpy(names.view(np.uint8).reshape(len(names), -1)), "rows": rows}


def _is_index(found: dict[str, Tensor], shards: int) -> bool:
    """Return whether tensors can be what `_index` returns for that many shards."""
    names, rows = found["names"], found["rows"]
    most = rows.amax(0).tolist()
    return (
        (names.dtype, rows.dtype) == (torch.uint8, torch.int64)
        and names.shape == (len(rows), max(names.shape[1], 1))
        and rows.shape == (len(rows), 4)
        and int(rows.min()) >= 0
        and most[0] < shards
        and most[2] <= MAX_MEMBER_BYTES
    )


def scan_shard(number: int, file: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Return the keys of the examples in a shard, and rows of `number`, offset, size and label, in order.

    Raises:
        InputError: the shard is missing, truncated, damaged or not a tar file; an example lacks its image or label.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, bytes] = {}
    rows = []
    try:
        with open(file, "rb") as stream:
            for member, content in read_tar(stream, "r:"):
                match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name, re.DOTALL)
                key, extension = (match[1], match[2].lower()) if match else ("", "")
                if extension not in ("cls", *IMAGE_EXTENSIONS):
                    continue
                if extension in found.setdefault(key, {}):
                    raise ValueError(f"{member.name} is there twice")
                found[key][extension] = member.offset_data, member.size
                if extension == "cls" and member.size <= 1024:
                    labels[key] = content()
        for key, parts in found.items():
            image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
            if image is None or not re.fullmatch(rb"\s*\d{1,9}\s*", labels.get(key, b"")):
                what = f"image {key}.jpg" if image is None else f"decimal number in {key}.cls"
                raise ValueError(f"example {key} has no {what}")
            rows.append((number, *image, int(labels[key])))
    except DAMAGES as error:
        raise InputError(f"data webdataset: shard {file} cannot be read ({one_line(error)})") from error
    names = np.array([os.fsencode(key) for key in found], dtype=np.bytes_)
    return names, np.array(rows, dtype=np.int64).reshape(-1, 4)


def expand_shards(split: str, patterns: str | list[str]) -> list[str]:
    """Return one absolute path or URL per shard, from paths and URLs with braces and wildcards.

    Raises:
        InputError: a shard is missing, or is neither a path nor an http(s) URL.
    """
    found: list[str] = []
    given = [patterns] if isinstance(patterns, str) else patterns
    for name in itertools.chain.from_iterable(_braces(split, pattern) for pattern in given):
        if URL.match(name):
            found.append(name)
            continue
        if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
            raise InputError(
                f"data webdataset: {split} shard {name!r} must be a path or an http: or https: URL; "
                f"write ./{name} for a file whose name begins with {scheme[0]}"
            )
        path = os.path.expanduser(name)
        matching = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not matching or not all(map(os.path.isfile, matching)):  # reading a pipe could wait for ever
            raise InputError(f"data webdataset: {split} shard {name} not found, or not a file")
        # An absolute path is never taken for a URL, whatever the name of the file.
        found += map(os.path.abspath, matching)
    return found


def _braces(split: str, pattern: str) -> Iterator[str]:
    """Expand {000..146} and {a,b} in a pattern."""
    choices = []
    for number, text in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        bounds = re.fullmatch(r"(\d{1,99})\.\.(\d{1,99})", text)
        if number % 2 == 0:
            choices.append([text])
        elif bounds:
            first, last = int(bounds[1]), int(bounds[2])
            choices.append([f"{n:0{len(bounds[1])}}" for n in range(first, min(last, first + MAX_SHARDS) + 1)])
        else:
            choices.append(text.split(","))
        if math.prod(map(len, choices)) > MAX_SHARDS:
            raise InputError(f"data webdataset: {split} shards {pattern!r} are more than {MAX_SHARDS:,} names")
    return map("".join, itertools.product(*choices))


def _check(shard: BinaryIO) -> None:
    for _ in read_tar(shard, "r:"):
        pass
