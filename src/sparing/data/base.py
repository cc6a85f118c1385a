"""What training asks of a data set."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from sparing.errors import InputError

Part = Literal["train", "validation", "test"]
Own = TypeVar("Own", bound="Data")


class Batches(Protocol):
    """An iterable of `(*inputs, labels)`, ready for `model(*inputs)`, on the device of the data.

    Over several ranks each gets its share of every global batch.
    """

    epoch: int
    """Set before each pass; order and augmentation follow from the seed and from it alone."""

    def __len__(self) -> int:
        """Batches a pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


class Data(ABC):
    """Abstract: a data set in three parts, "train", "validation" (for every choice), "test" (used once, at the end).

    Attributes:
        num_classes: the labels are 0 to num_classes − 1.
        input_size: the shape of one example as the model gets it, with a leading 1.
    """

    num_classes: int
    input_size: tuple[int, ...]

    @abstractmethod
    def model_arguments(self) -> dict[str, int]:
        """What a model must be built with to fit, such as `num_classes` and `in_channels`."""

    @abstractmethod
    def size(self, part: Part) -> int:
        """Examples in one part."""

    @abstractmethod
    def to(self: Own, device: torch.device) -> Own:
        """The same data with its batches on another device."""

    @abstractmethod
    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> Batches:
        """Shuffled, augmented batches of the training part.

        Args:
            batch_size: examples a batch over all ranks; the last batch of a pass may be smaller, but
                has an example for every rank.
            seed: of order and augmentation.
            rank: whose share.
            ranks: how many there are.
        """

    @abstractmethod
    def evaluation(self, part: Part, rank: int = 0, ranks: int = 1) -> Batches:
        """One part in order, without augmentation; over all ranks each example comes exactly once."""


def check_part(part: str) -> Part:
    """The name of a part.

    Raises:
        InputError: it is none.
    """
    if part not in ("train", "validation", "test"):
        raise InputError(f"unknown part {part!r}; choose from train, validation, test")
    return part  # type: ignore[return-value]
