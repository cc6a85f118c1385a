"""Pictures from files: decoding and augmentation in worker processes, normalization on the device.

Worker processes hand over uint8 pixels, a quarter of what float32 would take through shared memory
and over the bus; the device makes floating point of them.
"""

import contextlib
import hashlib
import math
import os
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
"""From a decoded picture to uint8, (3, H, W)."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the pixels of ImageNet's training part, in units of [0, 1]; every published recipe uses these."""
EVALUATION_BATCH = 256
"""Pictures a batch where no gradient is taken. Results do not depend on it."""

# Those that torchvision's ImageFolder knows by extension. Pillow knows more, some of which start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")

# Each file that cannot be read is warned of, up to this many; the rest are counted.
WARNINGS = 10


class Unreadable(NamedTuple):
    """A picture that was left out."""

    file: str
    reason: str


class Example(NamedTuple):
    """One picture as a worker decoded it; without pixels if it cannot be read and nothing stands in for it."""

    pixels: Tensor | None
    """uint8, (3, H, W)."""
    label: int
    unreadable: list[Unreadable]
    """Files that were tried before this one."""


class Decoded(NamedTuple):
    """A batch as a worker hands it over."""

    pixels: Tensor | None
    """uint8, (N, 3, H, W); None if no picture of the batch can be read."""
    labels: Tensor
    unreadable: list[Unreadable]
    failure: str | None = None
    """Why the run cannot go on, where that came up in the worker."""


class Source(Protocol):
    """What decides which pictures come in an epoch."""

    epoch: int


class Loaded:
    """Batches on the device, (N, 3, H, W) float32 and labels (N,), from an iterable of decoded ones.

    A picture that cannot be read is left out with a warning, up to a limit.

    Args:
        batches: decoded batches, such as a `torch.utils.data.DataLoader` gives.
        source: told the epoch before each pass.
        steps: batches a pass.
        device: where the batches go.
        part: "train", "validation" or "test", for messages.
        examples: pictures in the part.
        max_corrupt: fraction of them that may be unreadable.

    Attributes:
        epoch: the epoch of the next pass; set it before each one in training.
        skipped: file → why it cannot be read, for every file left out so far.
        waited_seconds: time of the last pass spent waiting for the workers. On a GPU, which runs behind the
            program, an upper bound of the time it had nothing to do.
    """

    def __init__(
        self,
        batches: Iterable[Decoded],
        source: Source,
        steps: int,
        *,
        device: torch.device,
        part: str,
        examples: int,
        max_corrupt: float,
    ) -> None:
        self.skipped: dict[str, str] = {}
        self.waited_seconds = 0.0
        self._batches = batches
        self._source = source
        self._steps = steps
        self._device = device
        self._part = part
        self._examples = examples
        self._max_corrupt = max_corrupt
        # To be used on values of 0 to 255.
        self._mean = 255 * torch.tensor(MEAN, device=device).reshape(-1, 1, 1)
        self._std = 255 * torch.tensor(STD, device=device).reshape(-1, 1, 1)

    @property
    def epoch(self) -> int:
        return self._source.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._source.epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited_seconds = 0.0
        clock = time.perf_counter()
        batches = iter(self._batches)
        while True:
            decoded = next(batches, None)
            self.waited_seconds += time.perf_counter() - clock
            if decoded is None:
                return
            if decoded.failure is not None:
                raise InputError(decoded.failure)
            for unreadable in decoded.unreadable:
                self._skip(unreadable)
            if decoded.pixels is not None:
                yield self._normalized(decoded.pixels), decoded.labels.to(self._device, non_blocking=True)
            clock = time.perf_counter()

    def _normalized(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)

    def _skip(self, unreadable: Unreadable) -> None:
        if unreadable.file in self.skipped:
            return
        self.skipped[unreadable.file] = unreadable.reason
        limit, count = allowed(self._max_corrupt, self._examples), len(self.skipped)
        which = f"{unreadable.file} ({unreadable.reason})"
        if count > limit:
            raise InputError(
                f"{count} of {self._examples} pictures of the part {self._part!r} cannot be read, the last {which}; "
                f"max_corrupt={self._max_corrupt:g} allows {limit}: mend the files or raise it"
            )
        if count <= WARNINGS:
            rest = "; further ones are counted without a warning" if count == WARNINGS else ""
            message = f"{which} cannot be read and is left out of the part {self._part!r}, {count} of {limit} allowed"
            warnings.warn(message + rest, SparsityWarning, stacklevel=3)


def allowed(max_corrupt: float, examples: int) -> int:
    """How many of the examples may be unreadable: ⌊max_corrupt · examples⌋, 29 and not 28 for 0.29 of 100."""
    return math.floor(max_corrupt * examples + 1e-9)


def collate(examples: list[Example]) -> Decoded:
    """A batch of those examples that have pixels; runs in the worker."""
    readable = [example for example in examples if example.pixels is not None]
    pixels = default_collate([example.pixels for example in readable]) if readable else None
    labels = torch.tensor([example.label for example in readable], dtype=torch.int64)
    return Decoded(pixels, labels, [each for example in examples for each in example.unreadable])


def decode(file: str | BinaryIO) -> "Image":
    """An RGB image from a file, by what is in it and not by its name; gray and CMYK are converted.

    The orientation that a camera noted is not applied: the networks of the literature were trained and
    evaluated on the pixels as they are stored.

    Raises:
        Exception: whatever Pillow finds to be wrong with the file, which may be almost anything.
    """
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata nobody reads
        try:
            with Image.open(file, formats=FORMATS) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            # Pillow's message repeats the path, or gives the address of the bytes.
            raise ValueError(f"is no {', '.join(FORMATS)}") from error


def reason(error: Exception) -> str:
    """What went wrong, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def training_transform(size: int) -> Transform:
    """The paper's augmentation: a crop of 8 to 100 % of the area, of ratio 3/4 to 4/3, and a flip half of the time.

    Args:
        size: height and width of the result, which is uint8, (3, size, size).
    """
    from torchvision.transforms import v2

    transform: Transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return transform


def evaluation_transform(size: int) -> Transform:
    """The middle `size` × `size` pixels of the picture with its shorter side at 256/224 of that.

    Args:
        size: height and width of the result, which is uint8, (3, size, size).
    """
    from torchvision.transforms import v2

    shorter = round(size * 256 / 224)
    transform: Transform = v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])
    return transform


def hashed(*parts: object) -> int:
    """A 32-bit seed that follows from its parts alone, on every machine.

    Examples:
        >>> hashed(0, 1, 2) == hashed(0, 1, 2) != hashed(0, 12)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Within the block torch's random numbers on the CPU follow from `parts`; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hashed(*parts))
        yield


def require_torchvision(data: str) -> None:
    """Raise InputError if torchvision cannot be imported, and say what to do.

    Args:
        data: the data set that needs it.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise InputError(f"data {data} needs torchvision ({error}): pip install 'sparing[imagenet]'") from error
    except RuntimeError as error:
        # Its operators load against the very build of torch they were made for.
        raise InputError(
            f"data {data}: this torchvision was not built for torch {torch.__version__} ({reason(error)}); wheels for "
            "a GPU do not load beside a torch without one: install both from the same index, see pytorch.org"
        ) from error


def default_workers() -> int:
    """A process for every core this one may use, at most 16; ranks that torchrun starts here share them evenly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_arguments(data: str, size: int, workers: int | None, max_corrupt: float) -> None:
    """Raise InputError for what no data set of pictures can use."""
    check_count(data, "size", size, least=1)
    if workers is not None:
        check_count(data, "workers", workers, least=0)
    if isinstance(max_corrupt, bool) or not isinstance(max_corrupt, int | float) or not 0 <= max_corrupt <= 1:
        raise InputError(f"data {data}: max_corrupt must be a fraction from 0 to 1, got {max_corrupt!r}")


def check_count(data: str, name: str, value: int, least: int) -> None:
    """Raise InputError for what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"data {data}: {name} must be a whole number, {least} or more, got {value!r}")
