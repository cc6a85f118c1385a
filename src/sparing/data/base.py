"""Interface between data sets and training, and what data sets held in memory share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparing.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Self = TypeVar("Self", bound="SplitDataset")
Rows = TypeVar("Rows", bound="Examples")
Part = TypeVar("Part", bound=Sized)


class Batches(Protocol):
    """Iterable of batches `(*inputs, labels)`, ready for `model(*inputs)`, on the device of the data set.

    In distributed training, each rank gets its share of every global batch.
    """

    epoch: int
    """Set it before each pass: order and augmentation depend only on the seed and the epoch."""

    start: int
    """Set it before each pass: number of batches to leave out at the beginning; a resumed run has had them."""

    def __len__(self) -> int:
        """Return the number of batches per pass, without regard to `start`."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


class SplitDataset(ABC):
    """Abstract data set with three splits.

    Train on "train", make every choice (hyperparameters, best epoch) on "validation", and evaluate "test"
    once, at the end.

    Attributes:
        num_classes: number of classes; labels are 0 to num_classes − 1.
        input_size: shape of a batch of one example, as the model receives it: (1, ...).
    """

    num_classes: int
    input_size: tuple[int, ...]

    @abstractmethod
    def model_arguments(self) -> dict[str, int]:
        """Return the arguments that a model needs to fit the data, such as `num_classes` and `in_channels`."""

    @abstractmethod
    def size(self, split: Split) -> int:
        """Return the number of examples in a split."""

    @abstractmethod
    def to(self: Self, device: torch.device) -> Self:
        """Return the same data set with its batches on another device."""

    @abstractmethod
    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Batches:
        """Return shuffled, augmented batches of the training split.

        Args:
            batch_size: examples per batch, over all ranks. The last batch of a pass may be smaller, but it
                has at least one example per rank.
            seed: seed of order and augmentation.
            rank: rank whose share of each batch is returned.
            ranks: number of ranks.
        """

    @abstractmethod
    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> Batches:
        """Return batches of a split in order, without augmentation; each example appears once over all ranks."""

    def fingerprint(self) -> dict[str, object]:
        """Return what tells this data from other data. All ranks must have the same."""
        sizes = {f"{split} examples": self.size(split) for split in SPLITS}
        return {**sizes, **self.model_arguments(), "input_size": self.input_size}


class Shares:
    """Base class of batches: which examples this rank has of each batch. This depends only on (seed, epoch).

    Args:
        count: number of examples, over all ranks; `evaluate` compares it with what came.
        batch_size: examples per batch, over all ranks; the last batch may be smaller.
        shuffle: draw a new order every epoch, and drop a last batch with fewer examples than ranks.
        seed: seed of the order.
        rank: rank whose share of each batch is returned.
        ranks: number of ranks.
    """

    def __init__(
        self, count: int, batch_size: int, *, shuffle: bool = False, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.count = self.examples = count
        self.rank, self.ranks = rank, ranks
        self.epoch = self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest >= self.ranks if self.shuffle else rest > self.rank)

    def generator(self) -> torch.Generator:
        """Return a new generator for the epoch, on the CPU: its numbers do not depend on the device or the ranks."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the examples of all ranks in the order of the epoch."""
        return torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)

    def positions(self) -> Iterator[Tensor]:
        """Yield this rank's positions in the order, for each batch from `start` on."""
        for batch in torch.arange(self.count).split(self.batch_size)[self.start : len(self)]:
            yield batch.tensor_split(self.ranks)[self.rank]


class Examples:
    """Base class of dataclasses of tensors with one row per example."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self: Rows, index: Tensor) -> Rows:
        return self._each(lambda tensor: tensor[index])

    def to(self: Rows, device: torch.device) -> Rows:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
        changed = {name: change(tensor) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Splits(SplitDataset, Generic[Part]):
    """Base class of data sets that have their splits as attributes: tensors on the device of training."""

    train: Part
    validation: Part
    test: Part

    def check_labels(self, num_classes: int) -> None:
        """Raise InputError unless all labels are int64 in [0, num_classes)."""
        for split in SPLITS:
            labels = getattr(self, split).labels
            if labels.dtype != torch.int64 or labels.ndim != 1:
                what = f"{labels.dtype} of shape {tuple(labels.shape)}"
                raise InputError(f"data: labels of the {split} split must be int64 of shape (N,), got {what}")
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise InputError(
                    f"data: labels of the {split} split must be from 0 to num_classes - 1 = {num_classes - 1}, got "
                    f"{int(wrong[0])}"
                )

    def size(self, split: Split) -> int:
        return len(getattr(self, split))

    def fingerprint(self) -> dict[str, object]:
        return super().fingerprint() | {split: content_hash(*vars(getattr(self, split)).values()) for split in SPLITS}

    def to(self: Self, device: torch.device) -> Self:
        return replace(self, **{split: getattr(self, split).to(device) for split in SPLITS})  # type: ignore[type-var]


def content_hash(*values: Any) -> str:
    """Return a short hash of the bytes of tensors and arrays; other values are left out."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor) and value.numel():  # an empty array of NumPy has strides that view() refuses
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def check_split(split: str) -> Split:
    """Return the name of a split if it is "train", "validation" or "test"; else raise InputError."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose from train, validation, test")
    return split
