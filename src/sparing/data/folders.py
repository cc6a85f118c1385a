"""ImageNet, and other image data sets with one folder per class."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sparing.data.base import Split, SplitDataset, content_hash
from sparing.data.pictures import (
    EVALUATION_BATCH,
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
from sparing.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name extensions of images: those of torchvision's ImageFolder."""


def imagenet(
    root: str,
    size: int = 224,
    validation_per_class: int = 10,
    workers: int | None = None,
    max_corrupt: float = 0.001,
) -> "FolderData":
    """Load images with one folder per class: `root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`.

    The number and names of the classes are arbitrary. Classes are sorted by name and labelled 0, 1, ...; for
    ImageNet this is the usual order.

    The labels of ImageNet's own test set are not public, and papers report the accuracy on `val`. So `val` is the
    *test* split here. The *validation* split is held out of `train`. It does not depend on the seed of the run.

    Training images are cropped and flipped at random (`RandomResizedCrop`, `RandomHorizontalFlip`). In
    evaluation, images are resized to size · 256/224 and center-cropped.

    Args:
        root: folder that contains `train` and `val`.
        size: height and width of the network input, in pixels.
        validation_per_class: images per class held out of `train`. With 0, the network trains on all images, as
            in the paper. Then there is no validation split, and the last epoch is the result of the run.
        workers: number of decoding processes. None uses one per core, at most 16, divided among the ranks that
            torchrun starts on the host. 0 decodes in the main process. Results do not depend on it.
        max_corrupt: maximum fraction of unreadable images in a split. In training, an unreadable image is
            replaced by the next one in the folder. In evaluation, it is skipped.

    Raises:
        InputError: torchvision is not installed; the folder layout is different; a class has no images, or not
            more than `validation_per_class`.

    Examples:
        >>> data = imagenet("imagenet", size=160)  # doctest: +SKIP
        >>> data.size("train"), data.size("validation"), data.size("test")  # doctest: +SKIP
        (1271167, 10000, 50000)
    """
    return _load("imagenet", root, size, validation_per_class, workers, max_corrupt, has_test=False)


def image_folder(
    root: str,
    size: int = 224,
    validation_per_class: int = 10,
    workers: int | None = None,
    max_corrupt: float = 0.001,
) -> "FolderData":
    """Load your own images, with one folder per class: `root/train/<class>/*.jpg`, `root/val/...`, `root/test/...`.

    With a folder `test`, `val` is the validation split and `test` the test split. Without it, `val` is the test split,
    and the validation split is held out of `train`, as for `imagenet`. Everything else is as for `imagenet`.

    Args:
        root: folder that contains `train`, `val` and possibly `test`.
        size: height and width of the network input, in pixels.
        validation_per_class: images per class held out of `train` if there is no folder `test`.
        workers: number of decoding processes, see `imagenet`.
        max_corrupt: maximum fraction of unreadable images in a split, see `imagenet`.

    Raises:
        InputError: as for `imagenet`.

    Examples:
        >>> image_folder("flowers").classes  # doctest: +SKIP
        ('daisy', 'rose', 'tulip')
    """
    has_test = (Path(root).expanduser() / "test").is_dir()
    return _load("image_folder", root, size, validation_per_class, workers, max_corrupt, has_test)


def _load(
    name: str, root: str, size: int, validation_per_class: int, workers: int | None, max_corrupt: float, has_test: bool
) -> "FolderData":
    check_arguments(name, size, workers, max_corrupt)
    check_count(name, "validation_per_class", validation_per_class, least=0)
    base = Path(root).expanduser()
    if not base.is_dir():
        raise InputError(
            f"data {name}: root {root} is not a directory; set data.root to the folder that contains train/ and val/"
        )
    for folder in ("train", "val"):
        if not (base / folder).is_dir():
            raise InputError(f"data {name}: {root} has no directory {folder}/; {_contents(base)}")
    require_torchvision(name)
    classes = _classes(base / "train")
    files = {"train": ImageFiles.scan(base / "train", classes)}
    for folder in ("val", "test") if has_test else ("val",):
        _check_same_classes(classes, _classes(base / folder), base, folder)
        files[folder] = ImageFiles.scan(base / folder, classes)
    if has_test:
        train, validation, test = files["train"], files["val"], files["test"]
    else:
        train, validation = _hold_out(files["train"], classes, validation_per_class)
        test = files["val"]
    return FolderData(
        splits={"train": train, "validation": validation, "test": test},
        classes=classes,
        resolution=size,
        workers=default_workers() if workers is None else workers,
        max_corrupt=max_corrupt,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True)
class ImageFiles:
    """File names and labels of the images of a split.

    The names are stored in one NumPy array, whose memory the worker processes share with the main process. A
    list of strings would be copied into every worker, because Python writes reference counts into the strings.

    Attributes:
        folder: folder that the names are relative to.
        names: file names, fixed-width bytes, (N,).
        labels: int64, (N,).
    """

    folder: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    @classmethod
    def scan(cls, folder: Path, classes: tuple[str, ...]) -> "ImageFiles":
        """List the images in the class folders, sorted by name.

        Raises:
            InputError: a class has no images.
        """
        from torchvision.datasets import ImageFolder

        index = {name: label for label, name in enumerate(classes)}
        samples = ImageFolder.make_dataset(str(folder), index, is_valid_file=_is_image, allow_empty=True)
        labels = np.array([label for _, label in samples], dtype=np.int64)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            names = [classes[label] for label in empty]
            hidden = [name for name in names if not os.access(folder / name, os.R_OK | os.X_OK)]
            why = f"; no permission to read {_first_few(hidden)}" if hidden else ""
            raise InputError(f"images: {len(empty)} classes of {folder} have no images: {_first_few(names)}{why}")
        prefix = os.path.join(folder, "")
        encoded = [os.fsencode(path.removeprefix(prefix)) for path, _ in samples]
        return cls(folder, np.array(encoded, dtype=np.bytes_), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return str(self.folder / os.fsdecode(bytes(self.names[index])))

    def subset(self, index: NDArray[Any]) -> "ImageFiles":
        return replace(self, names=self.names[index], labels=self.labels[index])


@dataclass(frozen=True)
class FolderData(SplitDataset):
    """Image data set with one folder per class, returned by `imagenet` and `image_folder`.

    The images of a training step and their crops and flips depend only on (seed, epoch), not on the number of
    workers or ranks.

    Attributes:
        splits: files of "train", "validation" and "test".
        classes: class names, indexed by label.
        resolution: height and width of the network input, in pixels.
        workers: number of decoding processes.
        max_corrupt: maximum fraction of unreadable images in a split.
        device: device of the batches.
    """

    splits: Mapping[Split, ImageFiles]
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

    def size(self, split: Split) -> int:
        return len(self.splits[split])

    def fingerprint(self) -> dict[str, object]:
        names = {
            str(split): content_hash(torch.from_numpy(files.names.view(np.uint8)), torch.from_numpy(files.labels))
            for split, files in self.splits.items()
        }
        return {**super().fingerprint(), **names}

    def to(self, device: torch.device) -> "FolderData":
        return replace(self, device=device)

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> ImageLoader:
        files = self.splits["train"]
        # After this many failures in a row, the maximum number of unreadable images is exceeded.
        max_replacements = max_unreadable(self.max_corrupt, len(files))
        dataset = ImageDataset(files, training_transform(self.resolution), seed, max_replacements)
        sampler = TrainingSampler(len(files), batch_size, seed, rank, ranks)
        return self._loader("train", dataset, sampler, keep_workers=True)

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> ImageLoader:
        files = self.splits[split]
        dataset = ImageDataset(files, evaluation_transform(self.resolution), seed=0, max_replacements=0)
        return self._loader(split, dataset, EvaluationSampler(len(files), rank, ranks), keep_workers=False)

    def _loader(
        self,
        split: Split,
        dataset: "ImageDataset",
        sampler: "TrainingSampler | EvaluationSampler",
        keep_workers: bool,
    ) -> ImageLoader:
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=keep_workers and self.workers > 0,
            pin_memory=self.device.type == "cuda",
            # A separate generator: a DataLoader draws a number per pass, which would change the global random
            # state of a resumed run.
            generator=torch.Generator(),
            worker_init_fn=ignore_stop_signals,
        )
        return ImageLoader(
            loader, sampler, len(sampler), device=self.device, split=split, examples=len(dataset.files),
            max_corrupt=self.max_corrupt,
        )  # fmt: skip


class ImageDataset(Dataset[DecodedImage]):
    """Decoded and transformed images, indexed by (epoch, index).

    The random numbers of the transform depend only on (seed, epoch, index).

    Args:
        files: files and labels of the images.
        transform: function from an image to pixels, uint8, (3, H, W).
        seed: seed of the run.
        max_replacements: maximum number of following images to try in place of an unreadable one.
    """

    def __init__(self, files: ImageFiles, transform: Transform, seed: int, max_replacements: int) -> None:
        self.files = files
        self._transform = transform
        self._seed = seed
        self._max_replacements = max_replacements

    def __getitem__(self, key: tuple[int, int]) -> DecodedImage:
        epoch, index = key
        unreadable: list[Unreadable] = []
        for offset in range(self._max_replacements + 1):
            position = (index + offset) % len(self.files)
            path, label = self.files.path(position), int(self.files.labels[position])
            try:
                image = decode(path)
            except Exception as error:  # A damaged file can raise almost any type of exception.
                unreadable.append(Unreadable(path, one_line(error)))
                continue
            with seeded(self._seed, epoch, index):
                return DecodedImage(self._transform(image), label, unreadable)
        return DecodedImage(None, label, unreadable)


class TrainingSampler:
    """Sample this rank's share of each training batch, as lists of (epoch, index), in a new order every epoch.

    A last batch with fewer images than ranks is dropped, so that every rank has images of every batch.

    Args:
        count: number of images.
        batch_size: images per batch, over all ranks.
        seed: seed of the run.
        rank: rank whose share is returned.
        ranks: number of ranks.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        self.epoch = 0
        self.start = 0
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
        generator = torch.Generator().manual_seed(hash_seed(self._seed, epoch))
        order = torch.randperm(self._count, generator=generator)
        for batch in order.split(self._batch_size)[self.start : len(self)]:
            yield [(epoch, index) for index in batch.tensor_split(self._ranks)[self._rank].tolist()]


class EvaluationSampler:
    """Sample this rank's share of a split in order, as lists of (0, index): each image once over all ranks.

    Args:
        count: number of images.
        rank: rank whose share is returned.
        ranks: number of ranks.
    """

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        self.epoch = self.start = 0
        self._share = torch.arange(count).tensor_split(ranks)[rank]

    def __len__(self) -> int:
        return -(-len(self._share) // EVALUATION_BATCH)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._share.split(EVALUATION_BATCH)[
            : len(self)
        ]:  # split() of an empty share gives one empty batch
            yield [(0, index) for index in batch.tolist()]


def _classes(folder: Path) -> tuple[str, ...]:
    """List the names of the class folders, sorted.

    Raises:
        InputError: there are no class folders, or there are images outside of them.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"images: {folder} cannot be read ({error.strerror})") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())
    if loose:
        raise InputError(
            f"images: {folder} has {len(loose)} images outside of class folders ({_first_few(loose)}) and "
            f"{len(classes)} class folders; move every image to {folder.name}/<class>/. For ImageNet's val, the page "
            "ImageNet of the documentation has a shell command that does this with LOC_val_solution.csv"
        )
    if not classes:
        raise InputError(f"images: {folder} has no class folders; {_contents(folder)}")
    return tuple(classes)


def _check_same_classes(train: tuple[str, ...], test: tuple[str, ...], base: Path, folder: str) -> None:
    for here, there, names in (
        ("train/", f"{folder}/", sorted(set(train) - set(test))),
        (f"{folder}/", "train/", sorted(set(test) - set(train))),
    ):
        if names:
            raise InputError(
                f"images: {len(names)} classes of {base}/{here} are not in {there} ({_first_few(names)}); "
                "both folders must have the same classes"
            )


def _hold_out(files: ImageFiles, classes: tuple[str, ...], per_class: int) -> tuple[ImageFiles, ImageFiles]:
    """Divide the training images into training and validation split, by a hash of the file names.

    With a hash, adding or removing an image changes the split of at most one other image.

    Raises:
        InputError: a class would have no training images left.
    """
    counts = np.bincount(files.labels)
    if counts.min() <= per_class:
        least = int(counts.argmin())
        raise InputError(
            f"images: class {classes[least]} has {counts[least]} images in train/, but "
            f"validation_per_class={per_class}; it must be smaller, so that training images are left"
        )
    hashes = np.array([hash_seed(bytes(name)) for name in files.names])
    by_hash = np.lexsort((hashes, files.labels))
    # by_hash is sorted by class, then by hash: hold out the first images of each class.
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(files), dtype=bool)
    held[by_hash[np.arange(len(files)) - starts < per_class]] = True
    return files.subset(~held), files.subset(held)


def _is_image(name: str) -> bool:
    # Copies from macOS contain a hidden metadata file ._x.JPEG for every x.JPEG.
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _contents(folder: Path) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f"it contains {_first_few(names)}" if names else "it is empty"
