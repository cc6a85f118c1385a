"""Operations of the engine, and plans that run them.

A `Segment` is a list of operations on numbered tensors. It does not depend on the batch size. A `Plan` is a segment for
one batch size and number of threads: the C++ side of kernels/engine.h with memory and layouts.

A tensor is `Images` [images, channels, height, width] or a `Matrix` [rows, columns], whose columns are the channels.
Each operation is a small data class that says which tensors it reads and writes. `Segment` checks that all of them fit
together, whether they come from a traced model or from a file.
"""

import ctypes
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.engine import library as compiled
from sparing.errors import InputError

# In the order of the enums of engine.h.
ACTIVATIONS = (
    "identity", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid",
)  # fmt: skip
POOLS = ("maximum", "average", "average_without_padding")
BINARIES = ("add", "multiply")

LARGEST = 2**31 - 1
"""Maximum size of a dimension, and maximum number of weights of a convolution."""


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
        _require_integer("a size", self.factor, 0, 2**62)

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


@dataclass(frozen=True)
class Images:
    """Shape of a tensor [images, channels, height, width]."""

    images: Count
    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _require_integer("the number of images", self.images.factor)
        for name in ("channels", "height", "width"):
            _require_integer(name, getattr(self, name))

    @property
    def numel(self) -> Count:
        return Count(self.images.factor * self.channels * self.height * self.width, self.images.per_sample)

    def at(self, batch: int) -> tuple[int, int, int, int]:
        """Return images, channels, height and width at a batch size."""
        return self.images.at(batch), self.channels, self.height, self.width


@dataclass(frozen=True)
class Matrix:
    """Shape of a tensor [rows, channels]: tokens and features, or images of one pixel."""

    rows: Count
    channels: int

    def __post_init__(self) -> None:
        _require_integer("the number of rows", self.rows.factor)
        _require_integer("channels", self.channels)

    @property
    def numel(self) -> Count:
        return Count(self.rows.factor * self.channels, self.rows.per_sample)

    @property
    def height(self) -> int:
        return 1

    def at(self, batch: int) -> tuple[int, int, int, int]:
        """Return images, channels, height and width at a batch size: one image, one pixel per row."""
        return 1, self.channels, 1, self.rows.at(batch)


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
                _require_integer(name, number, 0 if name == "padding" else 1)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output for those of the input."""
        numbers = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in numbers)
        return height, width

    def structure(self) -> compiled.Window:
        return compiled.Window(*self.kernel, *self.stride, *self.padding, *self.dilation)


@dataclass(frozen=True, eq=False)
class Operation:
    """Base class: an operation that writes the tensor `output`."""

    output: int

    NUMBERS: ClassVar[tuple[str, ...]] = ("input",)  # the fields that are tensors to read

    @property
    def reads(self) -> list[int]:
        """Numbers of the tensors that it reads."""
        return [number for name in self.NUMBERS if (number := getattr(self, name)) is not None]

    def check(self, shapes: Sequence[Shape]) -> None:
        """Raise InputError unless the operation fits the shapes of the tensors."""
        raise NotImplementedError

    def add_to(self, library: Any, plan: int) -> int:
        """Add the operation to a plan. Return what the C function returns."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """output = activation(convolution(input) + bias + residual), with the nonzero weights of each filter in CSR format.

    Attributes:
        starts: int32 [filters + 1], the index of the first weight of each filter, and the number of weights.
        columns: int32, (channel * kernel height + y) * kernel width + x of each weight, ascending per filter.
        values: float32, the weights.
        bias: float32 [filters].
        residual: number of a tensor with the shape of the output, or None.
    """

    input: int
    residual: int | None
    window: Window
    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor
    activation: str = "identity"

    NUMBERS = ("input", "residual")

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        if self.residual is not None and shapes[self.residual] != target:
            raise InputError(f"the residual must have shape {target}, got {shapes[self.residual]}")
        _require_tensor("starts", self.starts, torch.int32, target.channels + 1)
        _require_tensor("values", self.values, torch.float32, len(self.values))
        _require_tensor("columns", self.columns, torch.int32, len(self.values))
        _require_tensor("bias", self.bias, torch.float32, target.channels)
        _require_choice("activation", self.activation, ACTIVATIONS)
        counts = self.starts.long().diff()
        if int(self.starts[0]) != 0 or int(self.starts[-1]) != len(self.values) or bool((counts < 0).any()):
            raise InputError(f"starts must ascend from 0 to the number of weights, {len(self.values)}")
        limit = source.channels * self.window.kernel[0] * self.window.kernel[1]
        if len(self.columns):
            # One ascending sequence of all filters is a check without a loop.
            filters = torch.arange(len(counts)).repeat_interleave(counts)
            columns = self.columns.long()
            if int(columns.min()) < 0 or int(columns.max()) >= limit:
                raise InputError(f"columns must be in [0, {limit}), got {int(columns.min())} to {int(columns.max())}")
            if bool(((filters * limit + columns).diff() <= 0).any()):
                raise InputError("columns of a filter must ascend")

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_convolution(
            plan, self.input, self.output, -1 if self.residual is None else self.residual, self.window.structure(),
            self.starts.data_ptr(), self.columns.data_ptr(), self.values.data_ptr(), self.bias.data_ptr(),
            ACTIVATIONS.index(self.activation),
        )  # fmt: skip
        return number


@dataclass(frozen=True, eq=False)
class Depthwise(Operation):
    """Convolution of each channel with a filter of its own. weight: [channels, height, width], bias: [channels]."""

    input: int
    window: Window
    weight: Tensor
    bias: Tensor
    activation: str = "identity"

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        _require(source.channels == target.channels, "a depthwise convolution must keep the number of channels")
        _require_tensor("weight", self.weight, torch.float32, source.channels, *self.window.kernel)
        _require_tensor("bias", self.bias, torch.float32, source.channels)
        _require_choice("activation", self.activation, ACTIVATIONS)

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_depthwise(
            plan, self.input, self.output, self.window.structure(), self.weight.data_ptr(), self.bias.data_ptr(),
            ACTIVATIONS.index(self.activation),
        )  # fmt: skip
        return number


@dataclass(frozen=True, eq=False)
class Pool(Operation):
    """Maximum or average of each window."""

    input: int
    window: Window
    kind: str

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        _require(source.channels == target.channels, "pooling must keep the number of channels")
        _require_choice("kind", self.kind, POOLS)
        for kernel, padding in zip(self.window.kernel, self.window.padding, strict=True):
            _require(2 * padding <= kernel, f"padding of pooling must be at most half of the kernel, got {self.window}")
        _require(self.kind == "maximum" or self.window.dilation == (1, 1), "average pooling must not be dilated")

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_pool(
            plan, self.input, self.output, self.window.structure(), POOLS.index(self.kind)
        )
        return number


@dataclass(frozen=True, eq=False)
class Mean(Operation):
    """Average of each channel of each image: from images [N, C, H, W] to a matrix [N, C]."""

    input: int

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        fits = isinstance(source, Images) and target == Matrix(source.images, source.channels)
        _require(fits, f"the mean of {source} must not be {target}")

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_mean(plan, self.input, self.output)
        return number


@dataclass(frozen=True, eq=False)
class Affine(Operation):
    """output = activation(input * scale + bias), with a number per channel. None is a scale of 1 or a bias of 0."""

    input: int
    scale: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "identity"

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _require(source == target, f"input and output must have one shape, got {source} and {target}")
        for name, tensor in (("scale", self.scale), ("bias", self.bias)):
            if tensor is not None:
                _require_tensor(name, tensor, torch.float32, source.channels)
        _require_choice("activation", self.activation, ACTIVATIONS)

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_affine(
            plan, self.input, self.output, None if self.scale is None else self.scale.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(), ACTIVATIONS.index(self.activation),
        )  # fmt: skip
        return number


@dataclass(frozen=True, eq=False)
class Binary(Operation):
    """output = activation(input + other) or activation(input * other).

    `other` has the shape of `input`, or is a matrix [N, C] for images [N, C, H, W].
    """

    input: int
    other: int
    kind: str
    activation: str = "identity"

    NUMBERS = ("input", "other")

    def check(self, shapes: Sequence[Shape]) -> None:
        source, other, target = shapes[self.input], shapes[self.other], shapes[self.output]
        _require(source == target, f"input and output must have one shape, got {source} and {target}")
        is_gate = isinstance(source, Images) and other == Matrix(source.images, source.channels)
        _require(other == source or is_gate, f"{other} does not fit {source}")
        _require_choice("kind", self.kind, BINARIES)
        _require_choice("activation", self.activation, ACTIVATIONS)

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_binary(
            plan, self.input, self.other, self.output, BINARIES.index(self.kind), ACTIVATIONS.index(self.activation)
        )
        return number


@dataclass(frozen=True, eq=False)
class Copy(Operation):
    """Copy channels [input_first, input_first + channels) to the output, from its channel output_first on."""

    input: int
    input_first: int
    output_first: int
    channels: int

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        same = (
            source.images == target.images and (source.height, source.width) == (target.height, target.width)
            if isinstance(source, Images) and isinstance(target, Images)
            else isinstance(source, Matrix) and isinstance(target, Matrix) and source.rows == target.rows
        )  # fmt: skip
        _require(same, f"channels cannot be copied from {source} to {target}")
        _require_integer("channels", self.channels)
        for first, shape in ((self.input_first, source), (self.output_first, target)):
            _require_integer("the first channel", first, 0)
            last = first + self.channels
            _require(last <= shape.channels, f"channels [{first}, {last}) are not in {shape}")

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_copy(
            plan, self.input, self.input_first, self.output, self.output_first, self.channels
        )
        return number


@dataclass(frozen=True, eq=False)
class LayerNorm(Operation):
    """Normalize each position over its channels. weight and bias: [channels]."""

    input: int
    weight: Tensor
    bias: Tensor
    epsilon: float

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _require(source == target, f"input and output must have one shape, got {source} and {target}")
        _require_tensor("weight", self.weight, torch.float32, source.channels)
        _require_tensor("bias", self.bias, torch.float32, source.channels)
        fits = type(self.epsilon) is float and math.isfinite(self.epsilon) and self.epsilon >= 0
        _require(fits, f"epsilon must be a number of at least 0, got {self.epsilon!r}")

    def add_to(self, library: Any, plan: int) -> int:
        number: int = library.sparing_layer_norm(
            plan, self.input, self.output, self.weight.data_ptr(), self.bias.data_ptr(), self.epsilon
        )
        return number


OPERATIONS = (Convolution, Depthwise, Pool, Mean, Affine, Binary, Copy, LayerNorm)


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
        _require(fits, f"a tensor of shape {self.shape} cannot be {shape}")
        _require(self.channels_last or isinstance(shape, Images), "a matrix must have its channels last")


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
            _require(type(number) is int and number in numbers, f"there is no tensor {number!r}")

        for port in self.inputs:
            check_number(port.tensor)
            port.check(self.tensors)
            _require(remaining[port.tensor] > 0, f"tensor {port.tensor} is written twice")
            remaining[port.tensor] = 0
        for operation in self.operations:
            name = type(operation).__name__
            for number in (*operation.reads, operation.output):
                check_number(number)
            for number in operation.reads:
                _require(remaining[number] == 0, f"{name} reads tensor {number} before it is written")
            operation.check(self.tensors)
            output = operation.output
            first, count = 0, self.tensors[output].channels
            if isinstance(operation, Copy):
                first, count = operation.output_first, operation.channels
            ranges = filled.setdefault(output, [])
            overlaps = any(first < end and begin < first + count for begin, end in ranges)
            _require(remaining[output] >= count and not overlaps, f"{name} writes tensor {output} twice")
            ranges.append((first, first + count))
            remaining[output] -= count
        for port in self.outputs:
            check_number(port.tensor)
            port.check(self.tensors)
            _require(remaining[port.tensor] == 0, f"output {port.tensor} is not written")

    @property
    def is_per_sample(self) -> bool:
        """Whether samples are computed apart from one another, and follow one another in inputs and outputs."""
        ports = (*self.inputs, *self.outputs)
        sizes = [shape.images if isinstance(shape, Images) else shape.rows for shape in self.tensors]
        return all(size.per_sample for size in sizes) and all(port.shape and port.shape[0].per_sample for port in ports)

    @property
    def convolutions(self) -> list[Convolution]:
        return [operation for operation in self.operations if isinstance(operation, Convolution)]


CACHE = 8 * 2**20
"""Bytes of the tensors of a plan, beyond which a large batch runs in parts."""

PLANS = 4
"""Maximum number of batch sizes whose plans are kept."""


class Plans:
    """A segment with its plans, one per batch size.

    A large batch runs in parts whose tensors stay in the cache of the processor: ResNet-50 takes 1.7 times as long per
    image if each operation runs on 16 images before the next one.

    Args:
        segment: what to run.
        threads: number of threads.
    """

    def __init__(self, segment: Segment, threads: int):
        self.segment, self.threads = segment, threads
        self._clear()

    def _clear(self) -> None:
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._bytes = 0  # of a plan for one sample
        self._lock = threading.Lock()
        self._process = os.getpid()

    def run(self, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
        """Run the operations. Calls from several threads wait for one another.

        Args:
            inputs: one float32 tensor on the CPU per input of the segment, of the shape of its port.
            batch: batch size.

        Returns:
            One new tensor per output of the segment.

        Raises:
            InputError: the inputs have other shapes; the library of the engine is missing, or refuses the operations.
        """
        segment = self.segment
        given = [tensor.detach().contiguous() for tensor in inputs]
        for tensor, port in zip(given, segment.inputs, strict=True):
            shape = port.at(batch)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise InputError(
                    f"the engine needs a float32 tensor of shape {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
        results = [torch.empty(port.at(batch)) for port in segment.outputs]
        if self._process != os.getpid():  # a forked process has no threads of the plans
            self._clear()
        with self._lock:
            step = self._find_step(batch)
            for first in range(0, batch, step):
                count = min(step, batch - first)
                self._find(count).run(
                    [_part(tensor, first, count, batch) for tensor in given],
                    [_part(tensor, first, count, batch) for tensor in results],
                )
        return results

    def profile(self) -> list[tuple[str, float]]:
        """Return name and seconds of each operation in the last part of the next run, or of the last run."""
        return next(reversed(self._plans.values())).profile()

    def _find_step(self, batch: int) -> int:
        """Return the number of samples that run at once."""
        if batch == 1 or not self.segment.is_per_sample:
            return batch
        if not self._bytes:
            self._bytes = self._find(1).bytes
        return min(batch, max(self.threads, CACHE // self._bytes))

    def _find(self, batch: int) -> "Plan":
        if batch not in self._plans:
            self._plans[batch] = Plan(self.segment, batch, self.threads)
        self._plans.move_to_end(batch)
        while len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return self._plans[batch]


class Plan:
    """A segment for one batch size, ready to run: the C++ side, with memory and layouts.

    Args:
        segment: what to run.
        batch: batch size.
        threads: number of threads.

    Raises:
        InputError: the library of the engine is missing, or refuses the operations.
    """

    def __init__(self, segment: Segment, batch: int, threads: int):
        self._library = library = compiled.library()
        handle = library.sparing_plan(threads)
        if not handle:
            raise InputError(f"the engine cannot make a plan: {_error(library)}")
        self._handle: int = handle
        weakref.finalize(self, _free, library, handle, os.getpid())
        for shape in segment.tensors:
            self._check(library.sparing_tensor(handle, *shape.at(batch)))
        for port in segment.inputs:
            self._check(library.sparing_input(handle, port.tensor, int(port.channels_last)))
        for operation in segment.operations:
            self._check(operation.add_to(library, handle))
        for port in segment.outputs:
            self._check(library.sparing_output(handle, port.tensor, int(port.channels_last)))
        self._check(library.sparing_finish(handle))

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return self._check(self._library.sparing_bytes(self._handle))

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run the operations. The tensors must be contiguous, and fit the ports of the segment."""
        self._check(self._library.sparing_run(self._handle, _pointers(inputs), _pointers(outputs)))

    def profile(self) -> list[tuple[str, float]]:
        """Return name and seconds of each operation of the last run. The first call turns the clocks on."""
        library, handle = self._library, self._handle
        self._check(library.sparing_profile(handle, 1))
        return [
            (library.sparing_operation(handle, index).decode(), library.sparing_seconds(handle, index))
            for index in range(self._check(library.sparing_operations(handle)))
        ]

    def _check(self, result: int) -> int:
        if result < 0:
            raise InputError(f"the engine refuses an operation: {_error(self._library)}")
        return result


def _part(tensor: Tensor, first: int, count: int, batch: int) -> Tensor:
    """Return samples [first, first + count) of a tensor of `batch` samples."""
    rows = len(tensor) // batch
    return tensor[first * rows : (first + count) * rows]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _free(library: ctypes.CDLL, handle: int, process: int) -> None:
    if os.getpid() == process:  # a forked process has no threads that could be stopped
        library.sparing_free(handle)


def _error(library: ctypes.CDLL) -> str:
    return (library.sparing_error() or b"unknown error").decode(errors="replace")


def _check_window(window: Window, source: Shape, target: Shape) -> None:
    if isinstance(source, Matrix):
        _require(window == Window(), f"the window on a matrix must have one pixel, got {window}")
        _require(isinstance(target, Matrix) and source.rows == target.rows, f"{source} cannot become {target}")
        return
    size = window.output_size((source.height, source.width))
    fits = isinstance(target, Images) and (target.images, target.height, target.width) == (source.images, *size)
    _require(fits, f"{window} makes {size[0]}x{size[1]} pixels of {source}, not {target}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_integer(name: str, number: object, least: int = 1, most: int = LARGEST) -> None:
    fits = type(number) is int and least <= number <= most
    _require(fits, f"{name} must be an integer in [{least}, {most}], got {number!r}")


def _require_choice(name: str, choice: object, choices: Sequence[str]) -> None:
    _require(choice in choices, f"{name} must be one of {', '.join(choices)}, got {choice!r}")


def _require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
    _require(fits, f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
