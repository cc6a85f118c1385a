"""Pictures in the shards of the webdataset format: tar files, on a disk or behind a web server."""

import glob
import itertools
import os
import random
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sparing.data.base import Data, Part
from sparing.data.pictures import (
    EVALUATION_BATCH,
    Decoded,
    Example,
    Loaded,
    Transform,
    Unreadable,
    allowed,
    check_arguments,
    check_count,
    collate,
    decode,
    default_workers,
    evaluation_transform,
    hashed,
    reason,
    require_torchvision,
    seeded,
    training_transform,
)
from sparing.errors import InputError

PICTURES = ("jpg", "jpeg", "png", "webp")
"""Endings of a picture in a shard; the first one that an example has is read."""

Raw = Mapping[str, Any]


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
    """Pictures in tar shards, read from front to end: the layout for slow disks, network storage and web servers.

    An example is a picture `<key>.jpg` (or .jpeg, .png, .webp) and beside it `<key>.cls`, its label in digits.
    Shards are named by paths, with braces (`train-{000..146}.tar`) or wildcards (`train-*.tar`), or by http and
    https addresses, with braces, which the program `curl` fetches.

    Every rank, and every worker of a rank, reads shards of its own: in training a new random share of them each
    epoch, mixed in a buffer. A reader that is through with its shards before the epoch's number of batches is
    full begins them again; so every picture comes once an epoch only where the shards are of one size and their
    number divides by ranks × workers, and about once elsewhere. In evaluation every picture comes exactly once.
    Order follows from the seed, the epoch and the numbers of ranks and workers, cropping and flipping of a
    picture from seed and epoch alone.

    Args:
        train: shards to train on.
        test: shards for the number reported at the end; for ImageNet those of `val`, whose labels are public.
        train_examples: pictures in `train`, which decides the steps of an epoch.
        test_examples: pictures in `test`.
        num_classes: the labels are 0 to num_classes − 1.
        validation: shards by which choices are made, such as the last few of those of ImageNet's `train`. None:
            there is no validation part, and the last epoch is what counts.
        validation_examples: pictures in `validation`.
        size: height and width at which the network sees a picture, in pixels.
        shuffle: encoded pictures, of some 100 kB each, that every worker holds to mix them.
        workers: processes that read and decode. None takes one a core, at most 16, shared with the other ranks
            that torchrun starts on the machine; 0 does it in the program itself. Never more than a rank has shards.
        max_corrupt: fraction of a part that may be unreadable. In training the next picture of the shard stands
            in for such a one; elsewhere it is left out and the count is smaller.

    Raises:
        InputError: torchvision or webdataset is missing; a shard is not there, or in two parts; a number is no
            count. While reading: a shard is damaged, or a label is none of the classes.

    Examples:
        >>> data = webdataset("train-{000..146}.tar", "val-*.tar", 1281167, 50000, 1000)  # doctest: +SKIP
        >>> data.size("train")  # doctest: +SKIP
        1281167
    """
    check_arguments("webdataset", size, workers, max_corrupt)
    counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    for part, count in counts.items():
        check_count("webdataset", f"{part}_examples", count, least=0 if part == "validation" else 1)
    check_count("webdataset", "num_classes", num_classes, least=1)
    check_count("webdataset", "shuffle", shuffle, least=0)
    if bool(validation) != bool(validation_examples):
        raise InputError("data webdataset: validation and validation_examples must be given together")
    require_torchvision("webdataset")
    parts = {
        part: expand_shards(part, shards)
        for part, shards in {"train": train, "validation": validation or [], "test": test}.items()
    }
    for one, other in itertools.combinations(parts, 2):
        if both := sorted(set(parts[one]) & set(parts[other])):
            raise InputError(f"data webdataset: shard {both[0]} is in {one} and in {other}; the parts must differ")
    return ShardData(
        shards=parts,  # type: ignore[arg-type]
        examples=counts,  # type: ignore[arg-type]
        num_classes=num_classes,
        resolution=size,
        shuffle=shuffle,
        workers=default_workers() if workers is None else workers,
        max_corrupt=max_corrupt,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True)
class ShardData(Data):
    """Pictures in tar shards; what `webdataset` returns.

    Attributes:
        shards: paths and addresses of "train", "validation" and "test".
        examples: pictures in each.
        num_classes: the labels are 0 to num_classes − 1.
        resolution: height and width of the pictures as the model gets them.
        shuffle: encoded pictures that a worker holds to mix them.
        workers: processes that read and decode.
        max_corrupt: fraction of a part that may be unreadable.
        device: where the batches go.
    """

    shards: Mapping[Part, list[str]]
    examples: Mapping[Part, int]
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

    def size(self, part: Part) -> int:
        return self.examples[part]

    def to(self, device: torch.device) -> "ShardData":
        return replace(self, device=device)

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Loaded:
        shards = self.shards["train"]
        if len(shards) < ranks:
            raise InputError(
                f"data webdataset: {ranks} ranks need as many shards to train on; there are {len(shards)}: "
                "write more of fewer pictures"
            )
        full, rest = divmod(self.examples["train"], batch_size)
        # What a rank has of each batch: shares differ by one picture at most.
        batches = [batch_size] * full + [rest] * (rest >= ranks)
        pictures = Mixed(
            shards,
            [size // ranks + (rank < size % ranks) for size in batches],
            training_transform(self.resolution),
            self.num_classes,
            stand_ins=allowed(self.max_corrupt, self.examples["train"]),
            shuffle=self.shuffle,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        return self._loaded("train", pictures, len(batches), len(shards) // ranks, keep_workers=True)

    def evaluation(self, part: Part, rank: int = 0, ranks: int = 1) -> Loaded:
        own = self.shards[part][rank::ranks]
        pictures = Once(own, evaluation_transform(self.resolution), self.num_classes)
        # An estimate: what this rank's shards hold is known when they have been read.
        steps = -(-self.examples[part] // (ranks * EVALUATION_BATCH))
        return self._loaded(part, pictures, steps, len(own), keep_workers=False)

    def _loaded(
        self, part: Part, pictures: "Mixed | Once", steps: int, most_workers: int, keep_workers: bool
    ) -> Loaded:
        workers = min(self.workers, most_workers)
        loader = DataLoader(
            pictures,
            batch_size=None,  # the workers make batches
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=self.device.type == "cuda",
            # Its own, since a loader draws a number every pass, which a resumed run would have to draw as well.
            generator=torch.Generator(),
        )
        return Loaded(
            loader, pictures, steps, device=self.device, part=part, examples=self.examples[part],
            max_corrupt=self.max_corrupt,
        )  # fmt: skip


class Mixed(IterableDataset[Decoded]):
    """This rank's share of each training batch, from a random share of the shards.

    Args:
        shards: of all ranks, at least as many as there are ranks and workers.
        sizes: pictures this rank has of each batch of an epoch.
        transform: from an image to uint8 (3, H, W).
        num_classes: the labels are 0 to num_classes − 1.
        stand_ins: pictures to try in place of one that cannot be read.
        shuffle: encoded pictures held to mix them.
        seed: of the run.
        rank: whose share.
        ranks: how many there are.
    """

    def __init__(
        self,
        shards: list[str],
        sizes: list[int],
        transform: Transform,
        num_classes: int,
        *,
        stand_ins: int,
        shuffle: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        # In shared memory: workers that live on see the epoch that the program sets.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._shards = shards
        self._sizes = sizes
        self._transform = transform
        self._num_classes = num_classes
        self._stand_ins = stand_ins
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

    def __iter__(self) -> Iterator[Decoded]:
        return failing_last(self._batches())

    def _batches(self) -> Iterator[Decoded]:
        worker, workers = _worker()
        epoch = self.epoch
        generator = torch.Generator().manual_seed(hashed(self._seed, epoch))
        order = torch.randperm(len(self._shards), generator=generator).tolist()
        own = [self._shards[index] for index in order][self._rank :: self._ranks][worker::workers]
        raw = self._laps(own, epoch, random.Random(hashed(self._seed, epoch, self._rank, worker)))
        examples = decoded(raw, self._transform, self._num_classes, self._stand_ins)
        # The loader takes batches from its workers in turn.
        for size in self._sizes[worker::workers]:
            yield collate(list(itertools.islice(examples, size)))

    def _laps(self, shards: list[str], epoch: int, chance: random.Random) -> Iterator[Raw]:
        """The examples of the shards, over and over, each with what its augmentation follows from."""
        import webdataset

        for lap in itertools.count():
            empty = True
            # Mixed lap by lap: no picture comes a second time before each has come once.
            mixed = webdataset.shuffle(self._shuffle, initial=self._shuffle, rng=chance)
            for sample in mixed(read_shards(shards)):
                empty = False
                yield {**sample, "seed": (self._seed, epoch, lap, sample["__key__"])}
            if empty:
                raise InputError(f"data webdataset: no examples in {', '.join(shards)}")


class Once(IterableDataset[Decoded]):
    """All that some shards hold, in order.

    Args:
        shards: of this rank.
        transform: from an image to uint8 (3, H, W).
        num_classes: the labels are 0 to num_classes − 1.
    """

    def __init__(self, shards: list[str], transform: Transform, num_classes: int) -> None:
        self.epoch = 0
        self._shards = shards
        self._transform = transform
        self._num_classes = num_classes

    def __iter__(self) -> Iterator[Decoded]:
        return failing_last(self._batches())

    def _batches(self) -> Iterator[Decoded]:
        worker, workers = _worker()
        raw = ({**sample, "seed": ()} for sample in read_shards(self._shards[worker::workers]))
        examples = decoded(raw, self._transform, self._num_classes, stand_ins=0)
        while batch := list(itertools.islice(examples, EVALUATION_BATCH)):
            yield collate(batch)


def failing_last(batches: Iterator[Decoded]) -> Iterator[Decoded]:
    """The batches, and as the last one the InputError that ends them, if one does.

    Between processes an exception loses its type and gets a traceback in its message; a batch arrives as it is.
    """
    try:
        yield from batches
    except InputError as error:
        yield Decoded(None, torch.empty(0, dtype=torch.int64), [], failure=str(error))


def expand_shards(part: str, shards: str | list[str]) -> list[str]:
    """The shards that paths and addresses with braces and wildcards name.

    Args:
        part: for messages.
        shards: one or more of them.

    Raises:
        InputError: webdataset is missing; a shard is not there, or neither a path nor an http address.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise InputError(f"data webdataset needs webdataset ({error}): pip install 'sparing[imagenet]'") from error
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        try:
            names = expand_urls(os.path.expanduser(pattern))
        except (ValueError, AssertionError) as error:
            raise InputError(f"data webdataset: {part} shards {pattern!r} cannot be expanded ({error})") from error
        for name in names:
            scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", name)
            if scheme is not None and scheme[1].lower() not in ("http", "https"):
                # webdataset knows more of them; "pipe:" would run a program that a recipe names.
                raise InputError(f"data webdataset: {part} shard {name!r}: choose from paths, http: and https:")
            matching = sorted(glob.glob(name)) if scheme is None and glob.has_magic(name) else [name]
            if not matching or (scheme is None and not os.path.isfile(matching[0])):
                raise InputError(f"data webdataset: {part} shard {name} is not there")
            found += matching
    return found


def read_shards(shards: Iterable[str]) -> Iterator[Raw]:
    """The examples of tar files, as webdataset groups them: `__key__`, `__url__`, and the bytes by ending.

    Raises:
        InputError: a shard is not there, truncated, or no tar file.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        try:
            with gopen(shard) as stream:
                yield from group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise InputError(f"data webdataset: shard {shard} cannot be read ({_why(error)})") from error


def decoded(raw: Iterable[Raw], transform: Transform, num_classes: int, stand_ins: int) -> Iterator[Example]:
    """Examples with pixels, and one without wherever more than `stand_ins` in a row cannot be read.

    Raises:
        InputError: a label is none of the classes.
    """
    unreadable: list[Unreadable] = []
    for sample in raw:
        name = f"{sample['__url__']}: {sample['__key__']}"
        try:
            label = _label(sample)
            image = decode(BytesIO(_picture(sample)))
        except Exception as error:  # Pillow raises almost anything on damaged bytes
            unreadable.append(Unreadable(name, reason(error)))
            if len(unreadable) > stand_ins:
                yield Example(None, 0, unreadable)
                unreadable = []
            continue
        if not 0 <= label < num_classes:
            raise InputError(
                f"data webdataset: {name} has label {label}; with num_classes={num_classes} the last is "
                f"{num_classes - 1}"
            )
        with seeded(*sample["seed"]):
            yield Example(transform(image), label, unreadable)
        unreadable = []


def _label(sample: Raw) -> int:
    if "cls" not in sample:
        raise ValueError("no .cls")
    return int(sample["cls"])


def _picture(sample: Raw) -> bytes:
    for ending in PICTURES:
        if ending in sample:
            content: bytes = sample[ending]
            return content
    raise ValueError(f"none of .{', .'.join(PICTURES)}")


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # webdataset adds more to `args`, of which the first is what happened; of curl it is the whole command.
    said = str(error.args[0])
    status = re.search(r"'curl'.*exit (\d+)", said)
    return f"curl ended with status {status[1]}" if status else said


def _worker() -> tuple[int, int]:
    """The number of this worker process, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
