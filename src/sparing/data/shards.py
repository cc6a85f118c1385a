"""Image data sets in tar shards (webdataset format), on a disk or a web server."""

import glob
import itertools
import math
import os
import random
import re
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from io import BytesIO
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sparing.data.base import Split, SplitDataset
from sparing.data.pictures import (
    EVALUATION_BATCH,
    DecodedBatch,
    DecodedImage,
    ImageLoader,
    Transform,
    Unreadable,
    check_arguments,
    check_count,
    collate,
    decode,
    default_workers,
    evaluation_transform,
    hash_seed,
    ignore_stop_signals,
    max_unreadable,
    one_line,
    require_torchvision,
    seeded,
    training_transform,
)
from sparing.data.tar import read_tar
from sparing.errors import InputError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""File name extensions of images in a shard, by priority."""

URL = re.compile(r"https?://", re.IGNORECASE)

MAX_SHARDS = 10**6
"""Maximum number of shards that braces expand to."""

TIMEOUT_SECONDS = 60
"""Time after which a web server that sends nothing counts as failed."""

RETRY_SECONDS = (1, 5)
"""Waiting times before a shard is requested again, if the server fails or does not answer."""

Sample = Mapping[str, Any]
"""`__key__`, `__url__` and the bytes of each file of an example, by extension."""


def webdataset(
    train: str | list[str],
    test: str | list[str],
    train_examples: int,
    test_examples: int,
    num_classes: int,
    validation: str | list[str] | None = None,
    validation_examples: int = 0,
    size: int = 224,
    shuffle: int = 1000,
    workers: int | None = None,
    max_corrupt: float = 0.001,
) -> "ShardData":
    """Load images from tar shards, which are read sequentially: for slow disks, network storage and web servers.

    An example is an image `<key>.jpg` (or .jpeg, .png, .webp) and its label `<key>.cls`, a decimal number. Shards
    are given as paths with braces (`train-{000..146}.tar`) or wildcards (`train-*.tar`), or as http or https URLs
    with braces.

    Each worker of each rank reads its own shards. In training, the shards are assigned at random every epoch, and
    the worker shuffles examples in a buffer. A worker that reaches the end of its shards before the epoch has its
    number of batches starts again. So each image appears exactly once per epoch if all shards have the same size
    and their number is a multiple of ranks × workers; otherwise about once. In evaluation, each image appears
    exactly once.

    The order depends on seed, epoch, number of ranks and number of workers. The crop and flip of an image depend
    on seed and epoch.

    Args:
        train: training shards.
        test: test shards. For ImageNet, use `val`, as the labels of its own test set are not public.
        train_examples: number of images in `train`. It determines the number of steps per epoch.
        test_examples: number of images in `test`.
        num_classes: number of classes; labels are 0 to num_classes − 1.
        validation: validation shards, such as the last shards of ImageNet's `train`. With None there is no
            validation split, and the last epoch is the result of the run.
        validation_examples: number of images in `validation`.
        size: height and width of the network input, in pixels.
        shuffle: size of the shuffle buffer of each worker, in encoded images (about 100 kB each for ImageNet).
        workers: number of reading and decoding processes. None uses one per core, at most 16, divided among the
            ranks that torchrun starts on the host. 0 reads in the main process. At most one per shard of a rank.
        max_corrupt: maximum fraction of unreadable images in a split. In training, an unreadable image is
            replaced by the next one in the shard. In evaluation, it is skipped.

    Raises:
        InputError: torchvision or webdataset is not installed; a shard is missing, or is in two splits; an argument
            is out of range. While reading: a shard is damaged, a server does not answer, the shards have fewer images
            than promised (in evaluation also if they have more), or a label is not in the range of the classes.

    Examples:
        >>> data = webdataset("train-{000..146}.tar", "val-*.tar", 1281167, 50000, 1000)  # doctest: +SKIP
        >>> data.size("train")  # doctest: +SKIP
        1281167
    """
    check_arguments("webdataset", size, workers, max_corrupt)
    counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    for split, count in counts.items():
        check_count("webdataset", f"{split}_examples", count, least=0 if split == "validation" else 1)
    check_count("webdataset", "num_classes", num_classes, least=1)
    check_count("webdataset", "shuffle", shuffle, least=0)
    if bool(validation) != bool(validation_examples):
        raise InputError("data webdataset: give both validation and validation_examples, or neither")
    require_torchvision("webdataset")
    splits = {
        split: expand_shards(split, shards)
        for split, shards in {"train": train, "validation": validation or [], "test": test}.items()
    }
    for one, other in itertools.combinations(splits, 2):
        if both := sorted(set(splits[one]) & set(splits[other])):
            raise InputError(f"data webdataset: shard {both[0]} is in {one} and in {other}; remove it from one of them")
    return ShardData(
        shards=splits,  # type: ignore[arg-type]
        examples=counts,  # type: ignore[arg-type]
        num_classes=num_classes,
        resolution=size,
        shuffle=shuffle,
        workers=default_workers() if workers is None else workers,
        max_corrupt=max_corrupt,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True)
class ShardData(SplitDataset):
    """Image data set in tar shards, returned by `webdataset`.

    Attributes:
        shards: paths and URLs of "train", "validation" and "test".
        examples: number of images in each split.
        num_classes: number of classes; labels are 0 to num_classes − 1.
        resolution: height and width of the network input, in pixels.
        shuffle: size of the shuffle buffer of each worker, in encoded images.
        workers: number of reading and decoding processes.
        max_corrupt: maximum fraction of unreadable images in a split.
        device: device of the batches.
    """

    shards: Mapping[Split, list[str]]
    examples: Mapping[Split, int]
    num_classes: int
    resolution: int
    shuffle: int
    workers: int
    max_corrupt: float
    device: torch.device

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, 3, H, W)."""
        return (1, 3, self.resolution, self.resolution)

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": 3}

    def size(self, split: Split) -> int:
        return self.examples[split]

    def fingerprint(self) -> dict[str, object]:
        names = {str(split): " ".join(map(os.path.basename, shards)) for split, shards in self.shards.items()}
        return {**super().fingerprint(), **names}

    def to(self, device: torch.device) -> "ShardData":
        return replace(self, device=device)

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> ImageLoader:
        shards = self.shards["train"]
        if len(shards) < ranks:
            raise InputError(
                f"data webdataset: {ranks} ranks need at least {ranks} training shards, got {len(shards)}; "
                "write more, smaller shards"
            )
        full, rest = divmod(self.examples["train"], batch_size)
        batches = [batch_size] * full + [rest] * (rest >= ranks)
        dataset = TrainingShards(
            shards,
            # The shares of the ranks differ by at most one image.
            [size // ranks + (rank < size % ranks) for size in batches],
            training_transform(self.resolution),
            self.num_classes,
            max_replacements=max_unreadable(self.max_corrupt, self.examples["train"]),
            shuffle=self.shuffle,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        return self._loader("train", dataset, len(batches), len(shards) // ranks, keep_workers=True)

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> ImageLoader:
        own = self.shards[split][rank::ranks]
        dataset = EvaluationShards(own, evaluation_transform(self.resolution), self.num_classes)
        # An estimate: the number of images in the shards of this rank is not known in advance.
        steps = -(-self.examples[split] // (ranks * EVALUATION_BATCH))
        return self._loader(split, dataset, steps, len(own), keep_workers=False)

    def _loader(
        self,
        split: Split,
        dataset: "TrainingShards | EvaluationShards",
        steps: int,
        max_workers: int,
        keep_workers: bool,
    ) -> ImageLoader:
        workers = min(self.workers, max_workers)
        loader = DataLoader(
            dataset,
            batch_size=None,  # The data set yields batches.
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=self.device.type == "cuda",
            # A separate generator: a DataLoader draws a number per pass, which would change the global random
            # state of a resumed run.
            generator=torch.Generator(),
            worker_init_fn=ignore_stop_signals,
        )
        return ImageLoader(
            loader, dataset, steps, device=self.device, split=split, examples=self.examples[split],
            max_corrupt=self.max_corrupt, after_pass=partial(self._check_count, dataset, split),
        )  # fmt: skip

    def _check_count(self, dataset: "TrainingShards | EvaluationShards", split: Split) -> None:
        """Check the number of training examples, once every shard was read to its end."""
        found = dataset.count_examples() if isinstance(dataset, TrainingShards) else None
        if found is not None and found < self.examples[split]:
            raise InputError(
                f"data webdataset: the shards of train have {found} examples, but train_examples is "
                f"{self.examples[split]}: add the missing shards, or correct train_examples"
            )


class TrainingShards(IterableDataset[DecodedBatch]):
    """This rank's share of each training batch, read from a random share of the shards.

    Args:
        shards: shards of all ranks, at least ranks × workers.
        sizes: number of images of this rank, for each batch of an epoch.
        transform: function from an image to pixels, uint8, (3, H, W).
        num_classes: number of classes; labels are 0 to num_classes − 1.
        max_replacements: maximum number of following images to try in place of an unreadable one.
        shuffle: size of the shuffle buffer, in encoded images.
        seed: seed of the run.
        rank: rank whose share is returned.
        ranks: number of ranks.
    """

    def __init__(
        self,
        shards: list[str],
        sizes: list[int],
        transform: Transform,
        num_classes: int,
        *,
        max_replacements: int,
        shuffle: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        # In shared memory, so that persistent workers see the epoch that the main process sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._start = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counts = torch.full((len(shards),), -1, dtype=torch.int64).share_memory_()
        self._shards = shards
        self._sizes = sizes
        self._transform = transform
        self._num_classes = num_classes
        self._max_replacements = max_replacements
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._ranks = ranks

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def start(self) -> int:
        return int(self._start)

    @start.setter
    def start(self, start: int) -> None:
        self._start.fill_(start)

    def count_examples(self) -> int | None:
        """Return the number of examples of all shards, or None until this rank has read all of them to their end."""
        return None if bool((self._counts < 0).any()) else int(self._counts.sum())

    def __iter__(self) -> Iterator[DecodedBatch]:
        return errors_as_batches(self._batches())

    def _batches(self) -> Iterator[DecodedBatch]:
        worker, workers = _worker()
        epoch, start = self.epoch, self.start
        # The DataLoader takes batches from its workers in turn, beginning with the first one.
        worker = (worker + start) % workers
        generator = torch.Generator().manual_seed(hash_seed(self._seed, epoch))
        order = torch.randperm(len(self._shards), generator=generator).tolist()
        own = order[self._rank :: self._ranks][worker::workers]
        samples = self._samples(own, epoch, random.Random(hash_seed(self._seed, epoch, self._rank, worker)))
        examples = decode_samples(samples, self._transform, self._num_classes, self._max_replacements)
        for number in range(worker, len(self._sizes), workers):
            # Decoded also if it is left out: which examples replace unreadable ones depends on it.
            batch = collate(list(itertools.islice(examples, self._sizes[number])))
            if number >= start:
                yield batch

    def _samples(self, own: list[int], epoch: int, rng: random.Random) -> Iterator[Sample]:
        """Repeat the shuffled examples of some shards forever, each with the seed of its augmentation."""
        import webdataset

        for repetition in itertools.count():
            empty = True
            # One buffer per repetition, so that no image appears twice before each has appeared once.
            shuffled = webdataset.shuffle(self._shuffle, initial=self._shuffle, rng=rng)
            for sample in shuffled(self._read(own)):
                empty = False
                yield {**sample, "seed": (self._seed, epoch, repetition, sample["__key__"])}
            if empty:
                names = ", ".join(self._shards[index] for index in own)
                raise InputError(f"data webdataset: no examples in {names}")

    def _read(self, own: list[int]) -> Iterator[Sample]:
        for index in own:
            count = 0
            for sample in read_shards([self._shards[index]]):
                count += 1
                yield sample
            self._counts[index] = count


class EvaluationShards(IterableDataset[DecodedBatch]):
    """All images of some shards, in order.

    Args:
        shards: shards of this rank.
        transform: function from an image to pixels, uint8, (3, H, W).
        num_classes: number of classes; labels are 0 to num_classes − 1.
    """

    def __init__(self, shards: list[str], transform: Transform, num_classes: int) -> None:
        self.epoch = self.start = 0
        self._shards = shards
        self._transform = transform
        self._num_classes = num_classes

    def __iter__(self) -> Iterator[DecodedBatch]:
        return errors_as_batches(self._batches())

    def _batches(self) -> Iterator[DecodedBatch]:
        worker, workers = _worker()
        samples = ({**sample, "seed": ()} for sample in read_shards(self._shards[worker::workers]))
        examples = decode_samples(samples, self._transform, self._num_classes, max_replacements=0)
        while batch := list(itertools.islice(examples, EVALUATION_BATCH)):
            yield collate(batch)


def errors_as_batches(batches: Iterator[DecodedBatch]) -> Iterator[DecodedBatch]:
    """Yield the batches; turn an InputError into a last batch that contains its message.

    A DataLoader adds a traceback to the message of an exception in a worker process, but does not change a batch.
    """
    try:
        yield from batches
    except InputError as error:
        yield DecodedBatch(None, torch.empty(0, dtype=torch.int64), [], error=str(error))


def expand_shards(split: str, shards: str | list[str]) -> list[str]:
    """Expand the braces and wildcards in paths and URLs of shards.

    Args:
        split: name of the split, for messages.
        shards: one or more paths or URLs.

    Returns:
        One path or URL per shard.

    Raises:
        InputError: webdataset is not installed; a shard is missing, or is neither a path nor an http(s) URL.
    """
    try:
        import webdataset  # noqa: F401 (reading needs it)
        from braceexpand import braceexpand
    except ImportError as error:
        raise InputError(f"data webdataset needs webdataset ({error}): pip install 'sparing[imagenet]'") from error
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if _max_expansion(pattern) > MAX_SHARDS:
            raise InputError(
                f"data webdataset: {split} shards {pattern!r} cannot be expanded (more than {MAX_SHARDS:,} names)"
            )
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise InputError(f"data webdataset: {split} shards {pattern!r} cannot be expanded ({error})") from error
        for name in names:
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
            if not matching or not os.path.isfile(matching[0]):
                raise InputError(f"data webdataset: {split} shard {name} not found")
            # An absolute path is never taken for a URL, whatever the name of the file.
            found += map(os.path.abspath, matching)
    return found


def _max_expansion(pattern: str) -> float:
    """Return an upper bound of the number of names that the braces of a pattern expand to."""
    total = 1.0
    while group := re.search(r"\{([^{}]*)\}", pattern):
        bounds = re.match(r"(-?\d{1,18})\.\.(-?\d{1,18})(?!\d)", group[1])
        if bounds:
            total *= abs(int(bounds[2]) - int(bounds[1])) + 1
        elif ".." in group[1]:  # from letter to letter, or numbers that are too large
            total *= math.inf if re.search(r"\d{19}", group[1]) else 52
        else:
            total *= group[1].count(",") + 1
        pattern = pattern[: group.start()] + pattern[group.end() :]
    return total


def read_shards(shards: Iterable[str]) -> Iterator[Sample]:
    """Yield the encoded examples of tar files in order.

    Raises:
        InputError: a shard is missing, truncated, damaged or not a tar file, or a server does not answer.
    """
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        try:
            with open_shard(shard) as stream:
                files = read_tar(stream, _is_wanted)
                yield from group_by_keys({"__url__": shard, "fname": name, "data": data} for name, data in files)
        except (OSError, EOFError, ValueError, HTTPException, tarfile.TarError) as error:
            raise InputError(f"data webdataset: shard {shard} cannot be read ({_describe(error)})") from error


def _is_wanted(name: str) -> bool:
    """Return whether a file belongs to an example. webdataset reserves the names `__...__`."""
    return name.lower().endswith((".cls", *(f".{each}" for each in IMAGE_EXTENSIONS))) and not name.startswith("__")


def open_shard(shard: str) -> BinaryIO:
    """Open a local file, or request an http or https URL.

    Raises:
        OSError, HTTPException: the file cannot be read; the server fails, or sends nothing for `TIMEOUT_SECONDS`.
    """
    if not URL.match(shard):
        return open(shard, "rb")
    opener = urllib.request.OpenerDirector()
    for handler in (  # those of urlopen without file:, ftp: and data:, to which a server could redirect
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    for seconds in RETRY_SECONDS:
        try:
            return opener.open(shard, timeout=TIMEOUT_SECONDS)  # type: ignore[no-any-return]
        except OSError as error:
            if isinstance(error, HTTPError) and error.code < 500:
                raise
            time.sleep(seconds)
    return opener.open(shard, timeout=TIMEOUT_SECONDS)  # type: ignore[no-any-return]


def decode_samples(
    samples: Iterable[Sample], transform: Transform, num_classes: int, max_replacements: int
) -> Iterator[DecodedImage]:
    """Decode and transform encoded examples.

    Unreadable images are dropped and passed along with the next readable one. After more than `max_replacements`
    unreadable images in a row, an example without pixels is yielded.

    Raises:
        InputError: a label is not in the range of the classes.
    """
    unreadable: list[Unreadable] = []
    for sample in samples:
        name = f"{sample['__url__']}: {sample['__key__']}"
        try:
            label = _label(sample)
            image = decode(BytesIO(_encoded_image(sample)))
        except Exception as error:  # A damaged image can raise almost any type of exception.
            unreadable.append(Unreadable(name, one_line(error)))
            if len(unreadable) > max_replacements:
                yield DecodedImage(None, 0, unreadable)
                unreadable = []
            continue
        if not 0 <= label < num_classes:
            raise InputError(
                f"data webdataset: {name}: labels must be from 0 to {num_classes - 1} with "
                f"num_classes={num_classes}, got {label}"
            )
        with seeded(*sample["seed"]):
            yield DecodedImage(transform(image), label, unreadable)
        unreadable = []


def _label(sample: Sample) -> int:
    if "cls" not in sample:
        raise ValueError("no .cls file")
    return int(sample["cls"])


def _encoded_image(sample: Sample) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            content: bytes = sample[extension]
            return content
    raise ValueError(f"no .{', .'.join(IMAGE_EXTENSIONS[:-1])} or .{IMAGE_EXTENSIONS[-1]} file")


def _describe(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers with status {error.code}"
    if isinstance(error, URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, TimeoutError):
        return f"the server sends nothing for {TIMEOUT_SECONDS} seconds"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error.args[0] if error.args and isinstance(error.args[0], Exception) else error)


def _worker() -> tuple[int, int]:
    """Return the index of this worker process and the number of workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
