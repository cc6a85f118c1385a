"""Interface between data sets and training."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from sparing.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Self = TypeVar("Self", bound="SplitDataset")


class Batches(Protocol):
    """Iterable of batches `(*inputs, labels)`, ready for `model(*inputs)`, on the device of the data set.

    In distributed training, each rank gets its share of every global batch.
    """

    epoch: int
    """Set it before each pass: order and augmentation depend only on the seed and the epoch."""

    start: int
    """Set it before each pass: number of batches to leave out at the beginning; a resumed run has had them."""

    def __len__(self) -> int:
        """Return the number of batches per pass."""

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
        return {
            **{f"{split} examples": self.size(split) for split in SPLITS},
            **self.model_arguments(),
            "input_size": self.input_size,
        }


def content_hash(*tensors: Tensor) -> str:
    """Return a short hash of the bytes of some tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor.numel():  # an empty array of NumPy has strides that view() refuses
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_split(split: str) -> Split:
    """Return the name of a split if it is valid.

    Raises:
        InputError: it is not "train", "validation" or "test".
    """
    if split not in ("train", "validation", "test"):
        raise InputError(f"unknown split {split!r}; choose from train, validation, test")
    return split  # type: ignore[return-value]
