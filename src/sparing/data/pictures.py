"""Image files: decoded and augmented in worker processes with torchvision, normalized on the device.

Worker processes return uint8 pixels, which take a quarter of the memory and transfer time of float32.
"""

import hashlib
import math
import os
import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparing.data.base import Shares, Split, Splits
from sparing.errors import InputError, SparsityWarning

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and std per channel of the ImageNet training images, for pixels in [0, 1]; the usual constants."""
EVALUATION_BATCH = 256
"""Images per batch and rank in evaluation. Results do not depend on it."""
# The formats that torchvision's ImageFolder accepts. Pillow supports more; some of these run external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
# Maximum number of warnings about unreadable images; further ones are only counted.
MAX_WARNINGS = 10


@dataclass(frozen=True)
class ImageFiles(ABC):
    """Names and labels of the images of a split.

    They are NumPy arrays, whose memory the worker processes share with the main process. A list of strings would be
    copied into every worker, because Python writes reference counts into the strings.

    Attributes:
        names: fixed-width bytes, (N,).
        labels: int64, (N,).
    """

    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def path(self, index: int) -> str:
        """Return where an image is, for messages."""

    @abstractmethod
    def open(self, index: int) -> str | BinaryIO:
        """Return the encoded image: a path, or a file."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the images in the order of an epoch."""
        return torch.randperm(len(self), generator=generator)


@dataclass(frozen=True)
class FileData(Splits[ImageFiles]):
    """Image data set in files, returned by `imagenet`, `image_folder` and `webdataset`.

    The images of a training step and their crops and flips depend only on (seed, epoch), not on the number of
    workers or ranks.

    Attributes:
        train: training split.
        validation: validation split.
        test: test split.
        num_classes: number of classes; labels are 0 to num_classes − 1.
        resolution: height and width of the network input, in pixels.
        workers: number of decoding processes.
        max_corrupt: maximum fraction of unreadable images in a split.
        device: device of the batches.
        classes: class names, indexed by label, if they are known.
    """

    num_classes: int
    resolution: int
    workers: int
    max_corrupt: float
    device: torch.device = torch.device("cpu")
    classes: tuple[str, ...] = ()

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, 3, H, W)."""
        return (1, 3, self.resolution, self.resolution)

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": 3}

    def to(self, device: torch.device) -> "FileData":
        return replace(self, device=device)

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "ImageLoader":
        return ImageLoader(self, "train", batch_size, shuffle=True, seed=seed, rank=rank, ranks=ranks)

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> "ImageLoader":
        return ImageLoader(self, split, EVALUATION_BATCH * ranks, rank=rank, ranks=ranks)


class ImageLoader(Shares):
    """Iterable of batches on the device: normalized images (N, 3, H, W), float32, and labels (N,).

    Training images are cropped and flipped at random. Unreadable images cause a warning, up to a maximum number: in
    training, the next readable one replaces them; in evaluation, they are skipped.

    Args:
        data: the data set.
        split: "train", "validation" or "test".
        batch_size: images per batch, over all ranks.
        shares: `shuffle` (and augment), `seed`, `rank` and `ranks` of `Shares`.

    Attributes:
        epoch: epoch of the next pass; set it before each training pass.
        start: number of batches that the next pass leaves out at the beginning. They are not decoded.
        examples: number of images in the split, over all ranks.
        unreadable: number of unreadable images in the last pass.
        skipped: file name → reason, for every unreadable image so far.
        waited_seconds: time the last pass waited for the worker processes, in seconds. GPU work is asynchronous,
            so on a GPU this is an upper bound of its idle time.
    """

    def __init__(self, data: FileData, split: Split, batch_size: int, **shares: Any) -> None:
        self._files: ImageFiles = getattr(data, split)
        super().__init__(len(self._files), batch_size, **shares)
        self.unreadable = 0
        self.skipped: dict[str, str] = {}
        self.waited_seconds = 0.0
        self._split, self._device, self._max_corrupt = split, data.device, data.max_corrupt
        self._limit = max_unreadable(data.max_corrupt, self.examples)
        # Scaled to pixels from 0 to 255.
        self._mean, self._std = (255 * torch.tensor(each, device=data.device).view(-1, 1, 1) for each in (MEAN, STD))
        self._plan: list[tuple[int, NDArray[np.int64]]] = []
        self._batches = DataLoader(
            DecodedBatches(self._files, data.resolution, self.seed, self.shuffle, self._limit if self.shuffle else 0),
            batch_size=None,  # the data set returns batches
            sampler=self._plan,
            num_workers=data.workers,
            persistent_workers=self.shuffle and data.workers > 0,
            pin_memory=data.device.type == "cuda",
            # A DataLoader draws a number per pass, which would change the global random state of a resumed run.
            generator=torch.Generator(),
            worker_init_fn=ignore_stop_signals,
        )

    def order(self, generator: torch.Generator) -> Tensor:
        return self._files.order(generator) if self.shuffle else super().order(generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited_seconds, self.unreadable = 0.0, 0
        order = self.order(self.generator())
        self._plan[:] = [(self.epoch, order[own].numpy()) for own in self.positions()]
        clock = time.perf_counter()
        for pixels, labels, unreadable in self._batches:
            self.waited_seconds += time.perf_counter() - clock
            self.unreadable += len(unreadable)
            for file, reason in unreadable:
                self._skip(file, reason)
            if pixels is not None:
                images = pixels.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)
                yield images, labels.to(self._device, non_blocking=True)
            clock = time.perf_counter()

    def _skip(self, file: str, reason: str) -> None:
        """Count an unreadable image and warn; raise InputError above the maximum number."""
        if file in self.skipped:
            return
        self.skipped[file] = reason
        count, which = len(self.skipped), f"{file} ({reason})"
        if count > self._limit:
            raise InputError(
                f"{count} of {self.examples} images of the {self._split} split cannot be read, the last one is "
                f"{which}; max_corrupt={self._max_corrupt:g} allows {self._limit}: repair the files or raise it"
            )
        if count <= MAX_WARNINGS:
            rest = "; further unreadable images are counted without a warning" if count == MAX_WARNINGS else ""
            where = f"is skipped in the {self._split} split ({count} of {self._limit} allowed)"
            warnings.warn(f"{which} cannot be read and {where}{rest}", SparsityWarning, stacklevel=3)


class DecodedBatches(Dataset[tuple[Tensor | None, Tensor, list[tuple[str, str]]]]):
    """Decodes a batch, given as (epoch, indices): pixels, uint8, (N, 3, H, W), labels, and unreadable files.

    The random numbers of the augmentation of an image depend only on (seed, epoch, index). In place of an unreadable
    image, up to `replacements` following ones are tried. Without any readable image, pixels are None.
    """

    def __init__(self, files: ImageFiles, size: int, seed: int, augment: bool, replacements: int) -> None:
        self._files, self._seed, self._replacements = files, seed, replacements
        self._transform = training_transform(size) if augment else evaluation_transform(size)

    def __getitem__(self, key: tuple[int, NDArray[np.int64]]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
        epoch, indices = key
        pixels, labels, unreadable = [], [], []
        for index in indices.tolist():
            for position in range(index, index + self._replacements + 1):
                position %= len(self._files)
                try:
                    image = decode(self._files.open(position))
                except Exception as error:  # A damaged file can raise almost any type of exception.
                    unreadable.append((self._files.path(position), one_line(error)))
                    continue
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(hash_seed(self._seed, epoch, index))
                    pixels.append(self._transform(image))
                labels.append(int(self._files.labels[position]))
                break
        return torch.stack(pixels) if pixels else None, torch.tensor(labels, dtype=torch.int64), unreadable


def max_unreadable(max_corrupt: float, examples: int) -> int:
    """Return ⌊max_corrupt · examples⌋. A small tolerance corrects for rounding: 0.29 of 100 is 29, not 28."""
    return math.floor(max_corrupt * examples + 1e-9)


def decode(file: str | BinaryIO) -> "Image":
    """Decode an image file to RGB.

    The format is detected from the content, not from the file name. Gray and CMYK images are converted. The EXIF
    orientation is ignored, because published networks are trained and evaluated on the pixels as stored.

    Raises:
        Exception: Pillow cannot decode the file. A damaged file can raise almost any type of exception.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, str) and not os.path.isfile(file):
        raise ValueError("not a regular file")  # reading a pipe could wait for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata, which is not used.
        try:
            with Image.open(file, formats=FORMATS) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            # Pillow's message repeats the path, or contains the memory address of the stream.
            raise ValueError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error


def one_line(error: Exception) -> str:
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def training_transform(size: int) -> Callable[["Image"], Tensor]:
    """Return the augmentation of the STR paper, from an image to pixels, uint8, (3, size, size).

    A random crop of 8 to 100% of the area with an aspect ratio of 3/4 to 4/3, resized to (size, size), and a
    horizontal flip with probability 0.5.
    """
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])  # type: ignore[no-any-return]


def evaluation_transform(size: int) -> Callable[["Image"], Tensor]:
    """Return the evaluation transform: resize the shorter side to size · 256/224, then crop the center."""
    from torchvision.transforms import v2

    shorter = round(size * 256 / 224)
    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])  # type: ignore[no-any-return]


def hash_seed(*parts: object) -> int:
    """Return a 32-bit seed that depends only on the arguments and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def require_torchvision(data: str) -> None:
    """Raise InputError if torchvision is not installed, or was built for another version of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise InputError(f"data {data} needs torchvision ({error}): pip install 'sparing[imagenet]'") from error
    except RuntimeError as error:
        # The operators of torchvision load only with the build of torch they were compiled for.
        raise InputError(
            f"data {data}: this torchvision was not built for torch {torch.__version__} ({one_line(error)}); install "
            "torch and torchvision from the same index, see pytorch.org (CUDA wheels do not load with a CPU torch)"
        ) from error


def ignore_stop_signals(worker: int) -> None:
    """Let a worker process outlive the signals that stop a run: the main process ends it after it has saved the run."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def default_workers() -> int:
    """Return one worker process per available core, at most 16. Ranks of torchrun on a host share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_arguments(data: str, size: int, workers: int | None, max_corrupt: float) -> int:
    """Check the arguments that all data sets of image files share, and return the number of workers."""
    check_count(data, "size", size, least=1)
    if isinstance(max_corrupt, bool) or not isinstance(max_corrupt, int | float) or not 0 <= max_corrupt <= 1:
        raise InputError(f"data {data}: max_corrupt must be in [0, 1], got {max_corrupt!r}")
    if workers is None:
        return default_workers()
    check_count(data, "workers", workers, least=0)
    return workers


def check_count(data: str, name: str, value: int, least: int) -> None:
    """Raise InputError if an argument is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"data {data}: {name} must be an integer >= {least}, got {value!r}")
