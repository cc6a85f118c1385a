"""Shapes of the tensors of the engine, at any batch size.

A tensor is `Images` [images, channels, height, width] or a `Matrix` [rows, columns], whose columns are the channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparing.engine.checks import require_integer
from sparing.errors import InputError


@dataclass(frozen=True)
class Count:
    """A size that may be a multiple of the batch size.

    Attributes:
        factor: the size, or the size divided by the batch size.
        per_sample: whether the batch size multiplies the factor.
    """

    factor: int
    per_sample: bool = False

    def __post_init__(self) -> None:
        require_integer("a size", self.factor, 0, 2**62)

    def at(self, batch: int) -> int:
        """Return the size at a batch size."""
        return self.factor * batch if self.per_sample else self.factor

    def __str__(self) -> str:
        if not self.per_sample:
            return str(self.factor)
        return "batch" if self.factor == 1 else f"{self.factor} * batch"


def product(counts: Sequence[Count]) -> Count | None:
    """Return the product of sizes, or None if it is not a multiple of the batch size, such as its square."""
    per_sample = sum(count.per_sample for count in counts)
    return Count(math.prod(count.factor for count in counts), per_sample == 1) if per_sample < 2 else None


def describe(shape: Sequence[Count]) -> str:
    """Return a shape for a message, such as [batch, 3, 32, 32]."""
    return f"[{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class Images:
    """Shape of a tensor [images, channels, height, width]."""

    images: Count
    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        require_integer("the number of images", self.images.factor)
        for name in ("channels", "height", "width"):
            require_integer(name, getattr(self, name))

    @property
    def numel(self) -> Count:
        return Count(self.images.factor * self.channels * self.height * self.width, self.images.per_sample)

    @property
    def pixels(self) -> "Matrix":
        """Shape of one number per channel of each image."""
        return Matrix(self.images, self.channels)

    def at(self, batch: int) -> tuple[int, int, int, int]:
        """Return images, channels, height and width at a batch size."""
        return self.images.at(batch), self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"[{self.images}, {self.channels}, {self.height}, {self.width}]"


@dataclass(frozen=True)
class Matrix:
    """Shape of a tensor [rows, channels]: tokens and features, or images of one pixel."""

    rows: Count
    channels: int

    def __post_init__(self) -> None:
        require_integer("the number of rows", self.rows.factor)
        require_integer("channels", self.channels)

    @property
    def numel(self) -> Count:
        return Count(self.rows.factor * self.channels, self.rows.per_sample)

    def at(self, batch: int) -> tuple[int, int, int, int]:
        """Return images, channels, height and width at a batch size: one image, one pixel per row."""
        return 1, self.channels, 1, self.rows.at(batch)

    def __str__(self) -> str:
        return f"[{self.rows}, {self.channels}]"


Shape = Images | Matrix


@dataclass(frozen=True)
class Window:
    """Window of a convolution or pooling. Each pair is vertical, horizontal."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InputError(f"{name} must be a pair of integers, got {pair!r}")
            for number in pair:
                require_integer(name, number, 0 if name == "padding" else 1)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output for those of the input."""
        numbers = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in numbers)
        return height, width
