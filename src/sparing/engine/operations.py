"""Operations of the engine.

Each operation is a small data class that says which tensors it reads and writes. `check` compares it with the shapes of
the tensors, whether it comes from a traced model or from a file. kernels/plan.cpp checks what keeps the kernels within
their memory, at one batch size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.engine import library as compiled
from sparing.engine.checks import require, require_choice, require_integer, require_tensor
from sparing.engine.shapes import Images, Matrix, Shape, Window
from sparing.errors import InputError

# In the order of the enums of engine.h.
ACTIVATIONS = (
    "identity", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid",
)  # fmt: skip
POOLS = ("maximum", "average", "average_without_padding")
BINARIES = ("add", "multiply")
MOST_FILTERS = 2**16 - 1
"""Maximum number of filters, and of elements of a kernel, of a convolution, as in kernels/plan.cpp."""


@dataclass(frozen=True, eq=False)
class Operation:
    """Base class: an operation that reads the tensor `input` and writes the tensor `output`."""

    output: int
    input: int

    FUNCTION: ClassVar[str]  # function of engine.h that adds the operation to a plan
    NUMBERS: ClassVar[tuple[str, ...]] = ("input",)  # the fields that are tensors to read

    @property
    def reads(self) -> list[int]:
        """Numbers of the tensors that it reads."""
        return [number for name in self.NUMBERS if (number := getattr(self, name)) is not None]

    def check(self, shapes: Sequence[Shape]) -> None:
        """Raise InputError unless the operation fits the shapes of the tensors."""
        raise NotImplementedError

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of `FUNCTION` after the plan."""
        raise NotImplementedError

    def add_to(self, library: Any, plan: int) -> int:
        """Add the operation to a plan. Return what the C function returns."""
        result: int = getattr(library, self.FUNCTION)(plan, *self.arguments())
        return result


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """output = activation(convolution(input) + bias + residual), with the nonzero weights of each filter in CSR format.

    Attributes:
        residual: number of a tensor with the shape of the output, or None.
        window: kernel, stride, padding and dilation.
        starts: int32 [filters + 1], the index of the first weight of each filter, and the number of weights.
        columns: int32, (channel * kernel height + y) * kernel width + x of each weight, ascending per filter.
        values: float32, the weights.
        bias: float32 [filters].
        activation: one of `ACTIVATIONS`.
    """

    residual: int | None
    window: Window
    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor
    activation: str = "identity"

    FUNCTION = "sparing_convolution"
    NUMBERS = ("input", "residual")

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        if self.residual is not None:
            check_shape("the residual", shapes[self.residual], target)
        require_tensor("starts", self.starts, torch.int32, target.channels + 1)
        require_tensor("values", self.values, torch.float32, len(self.values))
        require_tensor("columns", self.columns, torch.int32, len(self.values))
        require_tensor("bias", self.bias, torch.float32, target.channels)
        require_choice("activation", self.activation, ACTIVATIONS)
        counts = self.starts.long().diff()
        ascending = int(self.starts[0]) == 0 and int(self.starts[-1]) == len(self.values) and bool((counts >= 0).all())
        require(ascending, f"starts must ascend from 0 to the number of weights, {len(self.values)}")
        limit = source.channels * self.window.kernel[0] * self.window.kernel[1]
        if len(self.columns):
            # One ascending sequence of all filters is a check without a loop.
            filters = torch.arange(len(counts)).repeat_interleave(counts)
            columns = self.columns.long()
            first, last = int(columns.min()), int(columns.max())
            require(0 <= first <= last < limit, f"columns must be in [0, {limit}), got {first} to {last}")
            ascending = bool(((filters * limit + columns).diff() > 0).all())
            require(ascending, "columns of a filter must ascend")

    def arguments(self) -> tuple[Any, ...]:
        residual = -1 if self.residual is None else self.residual
        return (
            self.input, self.output, residual, _structure(self.window), self.starts.data_ptr(), self.columns.data_ptr(),
            self.values.data_ptr(), self.bias.data_ptr(), ACTIVATIONS.index(self.activation),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Depthwise(Operation):
    """Convolution of each channel with a filter of its own. weight: [channels, height, width], bias: [channels]."""

    window: Window
    weight: Tensor
    bias: Tensor
    activation: str = "identity"

    FUNCTION = "sparing_depthwise"

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        require(source.channels == target.channels, "a depthwise convolution must keep the number of channels")
        require_tensor("weight", self.weight, torch.float32, source.channels, *self.window.kernel)
        require_tensor("bias", self.bias, torch.float32, source.channels)
        require_choice("activation", self.activation, ACTIVATIONS)

    def arguments(self) -> tuple[Any, ...]:
        weight, bias = self.weight.data_ptr(), self.bias.data_ptr()
        return self.input, self.output, _structure(self.window), weight, bias, ACTIVATIONS.index(self.activation)


@dataclass(frozen=True, eq=False)
class Pool(Operation):
    """Maximum or average of each window."""

    window: Window
    kind: str

    FUNCTION = "sparing_pool"

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        _check_window(self.window, source, target)
        require(source.channels == target.channels, "pooling must keep the number of channels")
        require_choice("kind", self.kind, POOLS)
        for kernel, padding in zip(self.window.kernel, self.window.padding, strict=True):
            require(2 * padding <= kernel, f"padding of pooling must be at most half of the kernel, got {self.window}")
        require(self.kind == "maximum" or self.window.dilation == (1, 1), "average pooling must not be dilated")

    def arguments(self) -> tuple[Any, ...]:
        return self.input, self.output, _structure(self.window), POOLS.index(self.kind)


@dataclass(frozen=True, eq=False)
class Mean(Operation):
    """Average of each channel of each image: from images [N, C, H, W] to a matrix [N, C]."""

    FUNCTION = "sparing_mean"

    def check(self, shapes: Sequence[Shape]) -> None:
        source = shapes[self.input]
        if not isinstance(source, Images):
            raise InputError(f"the mean needs images, got {source}")
        check_shape("the mean", shapes[self.output], source.pixels)

    def arguments(self) -> tuple[Any, ...]:
        return self.input, self.output


@dataclass(frozen=True, eq=False)
class Affine(Operation):
    """output = activation(input * scale + bias), with a number per channel. None is a scale of 1 or a bias of 0."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "identity"

    FUNCTION = "sparing_affine"

    def check(self, shapes: Sequence[Shape]) -> None:
        source = shapes[self.input]
        check_shape("the output", shapes[self.output], source)
        for name, tensor in (("scale", self.scale), ("bias", self.bias)):
            if tensor is not None:
                require_tensor(name, tensor, torch.float32, source.channels)
        require_choice("activation", self.activation, ACTIVATIONS)

    def arguments(self) -> tuple[Any, ...]:
        scale, bias = (None if tensor is None else tensor.data_ptr() for tensor in (self.scale, self.bias))
        return self.input, self.output, scale, bias, ACTIVATIONS.index(self.activation)


@dataclass(frozen=True, eq=False)
class Binary(Operation):
    """output = activation(input + other) or activation(input * other).

    `other` has the shape of `input`, or is a matrix [N, C] for images [N, C, H, W].
    """

    other: int
    kind: str
    activation: str = "identity"

    FUNCTION = "sparing_binary"
    NUMBERS = ("input", "other")

    def check(self, shapes: Sequence[Shape]) -> None:
        source, other = shapes[self.input], shapes[self.other]
        check_shape("the output", shapes[self.output], source)
        if not isinstance(source, Images) or other != source.pixels:
            check_shape("the other operand", other, source)
        require_choice("kind", self.kind, BINARIES)
        require_choice("activation", self.activation, ACTIVATIONS)

    def arguments(self) -> tuple[Any, ...]:
        kind, activation = BINARIES.index(self.kind), ACTIVATIONS.index(self.activation)
        return self.input, self.other, self.output, kind, activation


@dataclass(frozen=True, eq=False)
class Copy(Operation):
    """Copy channels [input_first, input_first + channels) to the output, from its channel output_first on."""

    input_first: int
    output_first: int
    channels: int

    FUNCTION = "sparing_copy"

    def check(self, shapes: Sequence[Shape]) -> None:
        source, target = shapes[self.input], shapes[self.output]
        check_shape("the output", target, replace(source, channels=target.channels))
        require_integer("channels", self.channels)
        for first, shape in ((self.input_first, source), (self.output_first, target)):
            require_integer("the first channel", first, 0)
            last = first + self.channels
            require(last <= shape.channels, f"channels [{first}, {last}) are not in {shape}")

    def arguments(self) -> tuple[Any, ...]:
        return self.input, self.input_first, self.output, self.output_first, self.channels


@dataclass(frozen=True, eq=False)
class LayerNorm(Operation):
    """Normalize each position over its channels. weight and bias: [channels].

    Unless it is centered, the mean is taken as 0, as in RMSNorm.
    """

    weight: Tensor
    bias: Tensor
    epsilon: float
    centered: bool = True

    FUNCTION = "sparing_layer_norm"

    def check(self, shapes: Sequence[Shape]) -> None:
        source = shapes[self.input]
        check_shape("the output", shapes[self.output], source)
        require_tensor("weight", self.weight, torch.float32, source.channels)
        require_tensor("bias", self.bias, torch.float32, source.channels)
        fits = type(self.epsilon) is float and math.isfinite(self.epsilon) and self.epsilon >= 0
        require(fits, f"epsilon must be a number of at least 0, got {self.epsilon!r}")
        require(type(self.centered) is bool, f"centered must be true or false, got {self.centered!r:.100}")

    def arguments(self) -> tuple[Any, ...]:
        weight, bias = self.weight.data_ptr(), self.bias.data_ptr()
        return self.input, self.output, weight, bias, self.epsilon, int(self.centered)


def _structure(window: Window) -> compiled.Window:
    return compiled.Window(*window.kernel, *window.stride, *window.padding, *window.dilation)


def check_shape(name: str, shape: Shape, expected: Shape) -> None:
    require(shape == expected, f"{name} must have shape {expected}, got {shape}")


def _check_window(window: Window, source: Shape, target: Shape) -> None:
    if isinstance(source, Matrix):
        require(window == Window(), f"the window on a matrix must have one pixel, got {window}")
        check_shape("the output", target, replace(source, channels=target.channels))
        return
    size = window.output_size((source.height, source.width))
    fits = isinstance(target, Images) and (target.images, target.height, target.width) == (source.images, *size)
    require(fits, f"{window} makes {size[0]}x{size[1]} pixels of {source}, not {target}")
