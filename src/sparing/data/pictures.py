"""Image decoding and augmentation in worker processes, and normalization on the device.

Worker processes return uint8 pixels, which take a quarter of the memory and transfer time of float32. The
device converts them to floating point.
"""

import contextlib
import hashlib
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import default_collate

from sparing.errors import InputError, SparsityWarning

if TYPE_CHECKING:
    from PIL.Image import Image

Transform: TypeAlias = Callable[["Image"], Tensor]
"""Function from a decoded image to pixels, uint8, (3, H, W)."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and std per channel of the ImageNet training images, for pixels in [0, 1]; the usual constants."""
EVALUATION_BATCH = 256
"""Images per batch in evaluation. Results do not depend on it."""

# The formats that torchvision's ImageFolder accepts. Pillow supports more; some of these run external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")

# Maximum number of warnings about unreadable images; further ones are only counted.
MAX_WARNINGS = 10


class Unreadable(NamedTuple):
    """Image that cannot be read."""

    file: str
    reason: str


class DecodedImage(NamedTuple):
    """Image as decoded by a worker process."""

    pixels: Tensor | None
    """uint8, (3, H, W); None if neither the image nor a replacement can be read."""
    label: int
    unreadable: list[Unreadable]
    """Images that were tried before this one."""


class DecodedBatch(NamedTuple):
    """Batch as returned by a worker process."""

    pixels: Tensor | None
    """uint8, (N, 3, H, W); None if no image of the batch can be read."""
    labels: Tensor
    unreadable: list[Unreadable]
    error: str | None = None
    """Message of an InputError that was raised in the worker process."""


class HasEpoch(Protocol):
    """Object that orders or augments examples depending on the epoch."""

    epoch: int
    start: int


class ImageLoader:
    """Iterable of batches on the device: normalized images (N, 3, H, W), float32, and labels (N,).

    Unreadable images are skipped with a warning, up to a maximum number.

    Args:
        batches: iterable of decoded batches, such as a `torch.utils.data.DataLoader`.
        source: object whose `epoch` and `start` are set before each pass.
        steps: batches per pass.
        device: device of the batches.
        split: "train", "validation" or "test", for messages.
        examples: number of images in the split.
        max_corrupt: maximum fraction of unreadable images in the split.
        after_pass: called at the end of each pass, for checks.

    Attributes:
        epoch: epoch of the next pass; set it before each training pass.
        start: number of batches that the next pass leaves out at the beginning.
        examples: number of images in the split, over all ranks.
        unreadable: number of unreadable images in the last pass.
        skipped: file name → reason, for every unreadable image so far.
        waited_seconds: time the last pass waited for the worker processes, in seconds. GPU work is asynchronous,
            so on a GPU this is an upper bound of its idle time.
    """

    def __init__(
        self,
        batches: Iterable[DecodedBatch],
        source: HasEpoch,
        steps: int,
        *,
        device: torch.device,
        split: str,
        examples: int,
        max_corrupt: float,
        after_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.examples = examples
        self.unreadable = 0
        self.skipped: dict[str, str] = {}
        self.waited_seconds = 0.0
        self._batches = batches
        self._source = source
        self._steps = steps
        self._device = device
        self._split = split
        self._max_corrupt = max_corrupt
        self._after_pass = after_pass
        # Scaled to pixels from 0 to 255.
        self._mean = 255 * torch.tensor(MEAN, device=device).reshape(-1, 1, 1)
        self._std = 255 * torch.tensor(STD, device=device).reshape(-1, 1, 1)

    @property
    def epoch(self) -> int:
        return self._source.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._source.epoch = epoch

    @property
    def start(self) -> int:
        return self._source.start

    @start.setter
    def start(self, start: int) -> None:
        self._source.start = start

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited_seconds = 0.0
        self.unreadable = 0
        clock = time.perf_counter()
        batches = iter(self._batches)
        while True:
            batch = next(batches, None)
            self.waited_seconds += time.perf_counter() - clock
            if batch is None:
                self._after_pass()
                return
            if batch.error is not None:
                raise InputError(batch.error)
            self.unreadable += len(batch.unreadable)
            for unreadable in batch.unreadable:
                self._skip(unreadable)
            if batch.pixels is not None:
                yield self._normalized(batch.pixels), batch.labels.to(self._device, non_blocking=True)
            clock = time.perf_counter()

    def _normalized(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)

    def _skip(self, unreadable: Unreadable) -> None:
        """Count an unreadable image and warn; raise InputError above the maximum number."""
        if unreadable.file in self.skipped:
            return
        self.skipped[unreadable.file] = unreadable.reason
        limit, count = max_unreadable(self._max_corrupt, self.examples), len(self.skipped)
        which = f"{unreadable.file} ({unreadable.reason})"
        if count > limit:
            raise InputError(
                f"{count} of {self.examples} images of the {self._split} split cannot be read, the last one is "
                f"{which}; max_corrupt={self._max_corrupt:g} allows {limit}: repair the files or raise max_corrupt"
            )
        if count <= MAX_WARNINGS:
            rest = "; further unreadable images are counted without a warning" if count == MAX_WARNINGS else ""
            message = f"{which} cannot be read and is skipped in the {self._split} split ({count} of {limit} allowed)"
            warnings.warn(message + rest, SparsityWarning, stacklevel=3)


def max_unreadable(max_corrupt: float, examples: int) -> int:
    """Return the maximum number of unreadable examples: ⌊max_corrupt · examples⌋.

    A small tolerance corrects for rounding: 0.29 of 100 is 29, not 28.
    """
    return math.floor(max_corrupt * examples + 1e-9)


def collate(examples: list[DecodedImage]) -> DecodedBatch:
    """Stack the readable images to a batch. Runs in the worker process."""
    readable = [example for example in examples if example.pixels is not None]
    pixels = default_collate([example.pixels for example in readable]) if readable else None
    labels = torch.tensor([example.label for example in readable], dtype=torch.int64)
    return DecodedBatch(pixels, labels, [each for example in examples for each in example.unreadable])


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


def training_transform(size: int) -> Transform:
    """Return the training augmentation of the STR paper.

    A random crop of 8 to 100% of the area with an aspect ratio of 3/4 to 4/3, resized to (size, size), and a
    horizontal flip with probability 0.5.

    Args:
        size: height and width of the result, in pixels.
    """
    from torchvision.transforms import v2

    transform: Transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return transform


def evaluation_transform(size: int) -> Transform:
    """Return the evaluation transform: resize the shorter side to size · 256/224, then crop the center.

    Args:
        size: height and width of the result, in pixels.
    """
    from torchvision.transforms import v2

    shorter = round(size * 256 / 224)
    transform: Transform = v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])
    return transform


def hash_seed(*parts: object) -> int:
    """Return a 32-bit seed that depends only on the arguments and is the same on every machine.

    Examples:
        >>> hash_seed(0, 1, 2) == hash_seed(0, 1, 2) != hash_seed(0, 12)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed torch's CPU generator with `hash_seed(*parts)` inside the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_seed(*parts))
        yield


def require_torchvision(data: str) -> None:
    """Check that torchvision can be imported.

    Args:
        data: name of the data set that needs it, for the message.

    Raises:
        InputError: torchvision is not installed, or was built for another version of torch.
    """
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
    """Return the default number of worker processes: one per available core, at most 16.

    Under torchrun, the ranks of a host share the cores evenly.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_arguments(data: str, size: int, workers: int | None, max_corrupt: float) -> None:
    """Check the arguments that all data sets of image files share.

    Raises:
        InputError: an argument is out of range.
    """
    check_count(data, "size", size, least=1)
    if workers is not None:
        check_count(data, "workers", workers, least=0)
    if isinstance(max_corrupt, bool) or not isinstance(max_corrupt, int | float) or not 0 <= max_corrupt <= 1:
        raise InputError(f"data {data}: max_corrupt must be in [0, 1], got {max_corrupt!r}")


def check_count(data: str, name: str, value: int, least: int) -> None:
    """Check that an argument is an integer of at least `least`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"data {data}: {name} must be an integer >= {least}, got {value!r}")
