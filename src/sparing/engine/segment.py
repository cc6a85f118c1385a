"""Segments: operations of the engine that run one after another."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparing.engine.checks import require
from sparing.engine.operations import Convolution, Copy, Operation
from sparing.engine.shapes import Count, Images, Shape, describe, product


@dataclass(frozen=True)
class Port:
    """A tensor that enters or leaves a segment.

    Attributes:
        tensor: its number.
        channels_last: whether the channels are the last dimension of the data.
        shape: shape of the PyTorch tensor. Its data is contiguous and in the order that `channels_last` says.
    """

    tensor: int
    channels_last: bool
    shape: tuple[Count, ...]

    def at(self, batch: int) -> tuple[int, ...]:
        """Return the shape of the PyTorch tensor at a batch size."""
        return tuple(count.at(batch) for count in self.shape)

    def check(self, shapes: Sequence[Shape]) -> None:
        shape = shapes[self.tensor]
        fits = product(self.shape) == shape.numel and type(self.channels_last) is bool
        require(fits, f"a tensor of shape {describe(self.shape)} cannot be {shape}")
        require(self.channels_last or isinstance(shape, Images), "a matrix must have its channels last")


@dataclass(frozen=True, eq=False)
class Segment:
    """Operations that run one after another, without PyTorch between them.

    Attributes:
        tensors: shape of each tensor.
        operations: in the order of execution. Each tensor is written once, but `Copy` writes some of its channels.
        inputs: tensors from outside.
        outputs: tensors for outside.

    Raises:
        InputError: an operation does not fit the tensors, or reads a tensor before it is written.
    """

    tensors: tuple[Shape, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __post_init__(self) -> None:
        numbers = range(len(self.tensors))
        remaining = [shape.channels for shape in self.tensors]  # channels of each tensor that are not written yet
        filled: dict[int, list[tuple[int, int]]] = {}  # ranges of channels that Copy wrote

        def check_number(number: object) -> None:
            require(type(number) is int and number in numbers, f"there is no tensor {number!r}")

        for port in self.inputs:
            check_number(port.tensor)
            port.check(self.tensors)
            require(remaining[port.tensor] > 0, f"tensor {port.tensor} is written twice")
            remaining[port.tensor] = 0
        for operation in self.operations:
            name = type(operation).__name__
            for number in (*operation.reads, operation.output):
                check_number(number)
            for number in operation.reads:
                require(remaining[number] == 0, f"{name} reads tensor {number} before it is written")
            operation.check(self.tensors)
            output = operation.output
            first, count = 0, self.tensors[output].channels
            if isinstance(operation, Copy):
                first, count = operation.output_first, operation.channels
            ranges = filled.setdefault(output, [])
            overlaps = any(first < end and begin < first + count for begin, end in ranges)
            require(remaining[output] >= count and not overlaps, f"{name} writes tensor {output} twice")
            ranges.append((first, first + count))
            remaining[output] -= count
        for port in self.outputs:
            check_number(port.tensor)
            port.check(self.tensors)
            require(remaining[port.tensor] == 0, f"output {port.tensor} is not written")

    @property
    def is_per_sample(self) -> bool:
        """Whether samples are computed apart from one another, and follow one another in inputs and outputs."""
        ports = (*self.inputs, *self.outputs)
        sizes = [shape.images if isinstance(shape, Images) else shape.rows for shape in self.tensors]
        # With tokens first, rows of different samples alternate.
        interleaved = any(getattr(operation, "tokens_first", False) for operation in self.operations)
        per_sample = all(size.per_sample for size in sizes) and all(p.shape and p.shape[0].per_sample for p in ports)
        return per_sample and not interleaved

    @property
    def convolutions(self) -> list[Convolution]:
        return [operation for operation in self.operations if isinstance(operation, Convolution)]
