"""ImageNet, or any pictures laid out like it: a folder a class."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sparing.data.base import Data, Part
from sparing.data.pictures import (
    EVALUATION_BATCH,
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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of the files that are taken for pictures: those of torchvision's ImageFolder."""


def imagenet(
    root: str,
    size: int = 224,
    validation_per_class: int = 10,
    workers: int | None = None,
    max_corrupt: float = 0.001,
) -> "FolderData":
    """Pictures in a folder a class: `root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`.

    Any number of classes with any names will do; sorted by name they are the labels 0, 1, ..., which for
    ImageNet's is the usual order. The labels of ImageNet's own test part are not public, so what the
    literature reports is `val`, and that makes `val` the *test* part here: no choice may look at it. The
    *validation* part, by which choices are made, is held out of `train`, the same pictures whatever the
    seed of the run.

    Training pictures are cropped and flipped at random (`RandomResizedCrop`, `RandomHorizontalFlip`);
    the others are scaled to 256/224 of `size` and cut in the middle.

    Args:
        root: the folder that holds `train` and `val`.
        size: height and width at which the network sees a picture, in pixels.
        validation_per_class: pictures of each class held out of `train`. With 0 every one is trained on,
            as in the paper; then there is no validation part, and the last epoch is what counts.
        workers: processes that decode. None takes one a core, at most 16, shared with the other ranks that
            torchrun starts on the machine; 0 decodes in the program itself. Results do not depend on it.
        max_corrupt: fraction of a part that may be unreadable. In training the next picture of the folder
            stands in for such a one; elsewhere it is left out and the count is smaller.

    Raises:
        InputError: torchvision is missing; the folders are not as above; a class has no pictures, or too few.

    Examples:
        >>> data = imagenet("imagenet", size=160)  # doctest: +SKIP
        >>> data.size("train"), data.size("validation"), data.size("test")  # doctest: +SKIP
        (1271167, 10000, 50000)
    """
    check_arguments("imagenet", size, workers, max_corrupt)
    check_count("imagenet", "validation_per_class", validation_per_class, least=0)
    base = Path(root).expanduser()
    if not base.is_dir():
        raise InputError(f"data imagenet: root {root} is not a directory; it must hold train/ and val/")
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise InputError(f"data imagenet: {root} has no directory {part}/; {_found(base)}")
    require_torchvision("imagenet")
    classes = _classes(base / "train")
    _check_same(classes, _classes(base / "val"), base)
    train, test = Files.listed(base / "train", classes), Files.listed(base / "val", classes)
    train, validation = _hold_out(train, classes, validation_per_class)
    return FolderData(
        parts={"train": train, "validation": validation, "test": test},
        classes=classes,
        resolution=size,
        workers=default_workers() if workers is None else workers,
        max_corrupt=max_corrupt,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True)
class Files:
    """Pictures and their labels, without reading them.

    The names are one block of bytes, which worker processes share with the program: a list of strings
    would be copied into each, since Python counts references inside the strings.

    Attributes:
        folder: what the names are relative to.
        names: bytes of one width, (N,).
        labels: int64, (N,).
    """

    folder: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    @classmethod
    def listed(cls, folder: Path, classes: tuple[str, ...]) -> "Files":
        """All the pictures in the folders of the classes, in an order that follows from the names.

        Raises:
            InputError: a class has none.
        """
        from torchvision.datasets import ImageFolder

        index = {name: label for label, name in enumerate(classes)}
        samples = ImageFolder.make_dataset(str(folder), index, is_valid_file=_is_picture, allow_empty=True)
        labels = np.array([label for _, label in samples], dtype=np.int64)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            names = [classes[label] for label in empty]
            hidden = [name for name in names if not os.access(folder / name, os.R_OK | os.X_OK)]
            why = f"; no permission to read {_some(hidden)}" if hidden else ""
            raise InputError(f"data imagenet: no picture in {len(empty)} classes of {folder}: {_some(names)}{why}")
        prefix = os.path.join(folder, "")
        encoded = [os.fsencode(path.removeprefix(prefix)) for path, _ in samples]
        return cls(folder, np.array(encoded, dtype=np.bytes_), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return str(self.folder / os.fsdecode(bytes(self.names[index])))

    def chosen(self, index: NDArray[Any]) -> "Files":
        return replace(self, names=self.names[index], labels=self.labels[index])


@dataclass(frozen=True)
class FolderData(Data):
    """Pictures in files; what `imagenet` returns.

    Which pictures a training step sees, and how they are cropped and flipped, follows from (seed, epoch)
    alone: the numbers of workers and of ranks change nothing.

    Attributes:
        parts: "train", "validation" and "test".
        classes: the name of each label.
        resolution: height and width of the pictures as the model gets them.
        workers: processes that decode.
        max_corrupt: fraction of a part that may be unreadable.
        device: where the batches go.
    """

    parts: Mapping[Part, Files]
    classes: tuple[str, ...]
    resolution: int
    workers: int
    max_corrupt: float
    device: torch.device

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.classes)

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, 3, H, W)."""
        return (1, 3, self.resolution, self.resolution)

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": 3}

    def size(self, part: Part) -> int:
        return len(self.parts[part])

    def to(self, device: torch.device) -> "FolderData":
        return replace(self, device=device)

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Loaded:
        files = self.parts["train"]
        # As many as may be unreadable are tried for one picture: then one can be read, or the limit is passed.
        stand_ins = allowed(self.max_corrupt, len(files))
        pictures = Pictures(files, training_transform(self.resolution), seed, stand_ins)
        return self._loaded("train", pictures, Shuffled(len(files), batch_size, seed, rank, ranks), keep_workers=True)

    def evaluation(self, part: Part, rank: int = 0, ranks: int = 1) -> Loaded:
        files = self.parts[part]
        pictures = Pictures(files, evaluation_transform(self.resolution), seed=0, stand_ins=0)
        return self._loaded(part, pictures, InOrder(len(files), rank, ranks), keep_workers=False)

    def _loaded(self, part: Part, pictures: "Pictures", order: "Shuffled | InOrder", keep_workers: bool) -> Loaded:
        loader = DataLoader(
            pictures,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=keep_workers and self.workers > 0,
            pin_memory=self.device.type == "cuda",
            # Its own, since a loader draws a number every pass, which a resumed run would have to draw as well.
            generator=torch.Generator(),
        )
        return Loaded(
            loader, order, len(order), device=self.device, part=part, examples=len(pictures.files),
            max_corrupt=self.max_corrupt,
        )  # fmt: skip


class Pictures(Dataset[Example]):
    """Pictures by (epoch, index), decoded and transformed.

    What is random in the transform follows from (seed, epoch, index) alone.

    Args:
        files: where they are.
        transform: from an image to uint8 (3, H, W).
        seed: of the run.
        stand_ins: following pictures to try in place of one that cannot be read.
    """

    def __init__(self, files: Files, transform: Transform, seed: int, stand_ins: int) -> None:
        self.files = files
        self._transform = transform
        self._seed = seed
        self._stand_ins = stand_ins

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        unreadable: list[Unreadable] = []
        for step in range(self._stand_ins + 1):
            place = (index + step) % len(self.files)
            path, label = self.files.path(place), int(self.files.labels[place])
            try:
                image = decode(path)
            except Exception as error:  # Pillow raises almost anything on a damaged file
                unreadable.append(Unreadable(path, reason(error)))
                continue
            with seeded(self._seed, epoch, index):
                return Example(self._transform(image), label, unreadable)
        return Example(None, label, unreadable)


class Shuffled:
    """This rank's share of each training batch, as lists of (epoch, index): a new order every epoch.

    A last batch with fewer pictures than ranks is left out, so that each rank has its share of every batch.

    Args:
        count: pictures in all.
        batch_size: pictures a batch, over all ranks.
        seed: of the run.
        rank: whose share.
        ranks: how many there are.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        self.epoch = 0
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._ranks = ranks

    def __len__(self) -> int:
        full, rest = divmod(self._count, self._batch_size)
        return full + (rest >= self._ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(hashed(self._seed, epoch))
        order = torch.randperm(self._count, generator=generator)
        for batch in order.split(self._batch_size)[: len(self)]:
            yield [(epoch, index) for index in batch.tensor_split(self._ranks)[self._rank].tolist()]


class InOrder:
    """This rank's share of a part, as lists of (0, index): each picture once over all ranks.

    Args:
        count: pictures in all.
        rank: whose share.
        ranks: how many there are.
    """

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        self.epoch = 0
        self._share = torch.arange(count).tensor_split(ranks)[rank]

    def __len__(self) -> int:
        return -(-len(self._share) // EVALUATION_BATCH)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._share.split(EVALUATION_BATCH)[: len(self)]:  # an empty share splits into one empty batch
            yield [(0, index) for index in batch.tolist()]


def _classes(folder: Path) -> tuple[str, ...]:
    """The names of the class folders, sorted.

    Raises:
        InputError: there are none, or pictures lie beside them.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"data imagenet: {folder} cannot be read ({error.strerror})") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_picture(entry.name) and entry.is_file())
    if loose:
        raise InputError(
            f"data imagenet: {folder} has {len(loose)} pictures outside of class folders ({_some(loose)}) and "
            f"{len(classes)} class folders; every picture must be in {folder.name}/<class>/. ImageNet's val comes "
            "unsorted: LOC_val_solution.csv of the download names the class of each, and the documentation of sparing "
            "has the line that moves them (ImageNet, Folders)"
        )
    if not classes:
        raise InputError(f"data imagenet: {folder} has no class folders; {_found(folder)}")
    return tuple(classes)


def _check_same(train: tuple[str, ...], test: tuple[str, ...], base: Path) -> None:
    for here, there, names in (
        ("train/", "val/", sorted(set(train) - set(test))),
        ("val/", "train/", sorted(set(test) - set(train))),
    ):
        if names:
            raise InputError(
                f"data imagenet: {len(names)} classes of {base}/{here} are not in {there} ({_some(names)}); "
                "both must have the same"
            )


def _hold_out(files: Files, classes: tuple[str, ...], per_class: int) -> tuple[Files, Files]:
    """Training and validation part, by a hash of the names: a picture more or less moves no other one.

    Raises:
        InputError: a class would have nothing left to train on.
    """
    counts = np.bincount(files.labels)
    if counts.min() <= per_class:
        least = int(counts.argmin())
        raise InputError(
            f"data imagenet: class {classes[least]} has {counts[least]} pictures in train/; "
            f"validation_per_class={per_class} would leave none to train on"
        )
    hashes = np.array([hashed(bytes(name)) for name in files.names])
    by_hash = np.lexsort((hashes, files.labels))
    # Sorted by class and then by hash: the first ones of each class.
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(files), dtype=bool)
    held[by_hash[np.arange(len(files)) - starts < per_class]] = True
    return files.chosen(~held), files.chosen(held)


def _is_picture(name: str) -> bool:
    # Copying from some systems leaves a hidden file ._x.JPEG beside every x.JPEG.
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _found(folder: Path) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f"it holds {_some(names)}" if names else "it is empty"
