"""Lowering: from operators of PyTorch to operations of the engine.

A tensor of PyTorch and its tensor in the engine hold the same numbers. Its `Place` says which: the number of the tensor
in the engine, and which dimension is the channels. So [N, C, H, W] and its permutation [N, H, W, C] are one tensor in
the engine, with the channels in dimension 1 and 3, and such views cost nothing.

    images [N, C, H, W]    channels in dimension 1: [N, C, H, W], [N, C, W] if H = 1, or [N, C, H * W]
                           channels last: [N, H, W, C], [N, W, C] if H = 1, or [N, H * W, C]
    matrix [rows, C]       [..., C] with rows = product of the other dimensions; or [N, C, 1, 1]

An operator that the engine does not have, or does not have in this form, raises `Cut` with the reason, and runs in
PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparing.engine.plan import (
    Affine,
    Binary,
    Convolution,
    Copy,
    Count,
    Depthwise,
    Images,
    LayerNorm,
    Matrix,
    Mean,
    Operation,
    Pool,
    Shape,
    Window,
    product,
)

aten = torch.ops.aten
ONE = Count(1)


class Cut(Exception):  # noqa: N818
    """Reason why an operator runs in PyTorch."""


@dataclass(frozen=True)
class Place:
    """Tensor of the engine that holds a value.

    Attributes:
        tensor: its number.
        axis: dimension of the value that is the channels.
    """

    tensor: int
    axis: int


@dataclass(frozen=True)
class Lowered:
    """An operator that runs in the engine.

    Attributes:
        place: where its result is.
        operations: what computes it; empty for a view.
        reads: tensor number → the value that is read from it, and the dimension of its channels.
        level: number of the segment.
    """

    place: Place
    operations: list[Operation]
    reads: dict[int, tuple[fx.Node, int]]
    level: int


class Lowering:
    """Lowers the operators of a graph one after another.

    Every value has a level: the number of segments that run before it, one after another. A segment is made of all
    operators of one level in the engine, so that parallel branches are in one segment.

        level in the engine = max(levels of inputs in the engine, 1 + levels of inputs in PyTorch)
        level in PyTorch = max(levels of inputs)

    Args:
        constants: value of each node that does not depend on the inputs.
        excluded: nodes that run in PyTorch in any case, with the reason.
    """

    def __init__(self, constants: Mapping[fx.Node, Tensor], excluded: Mapping[fx.Node, str]):
        self.constants, self.excluded = constants, excluded
        self.shapes: list[Shape] = []
        self.lowered: dict[fx.Node, Lowered] = {}
        self.levels: dict[fx.Node, int] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.dense: dict[fx.Node, int] = {}  # number of elements of the weight of each convolution
        self._entries: dict[tuple[fx.Node, int, Shape], int] = {}
        self._operations: list[Operation] = []
        self._reads: dict[int, tuple[fx.Node, int]] = {}
        self._level = 0

    def add(self, node: fx.Node, dependencies: Sequence[fx.Node]) -> None:
        """Lower one node, or note why it runs in PyTorch.

        Args:
            node: the node; all nodes before it were added.
            dependencies: the nodes that it reads, without constants and sizes.
        """
        self._operations, self._reads, self._level = [], {}, 0
        try:
            if node in self.excluded:
                raise Cut(self.excluded[node])
            place = self._lower(node)
        except Cut as reason:
            self.levels[node] = max((self.levels[other] for other in dependencies), default=0)
            self.reasons[node] = str(reason)
        else:
            self.lowered[node] = Lowered(place, self._operations, self._reads, self._level)
            self.levels[node] = self._level

    def _lower(self, node: fx.Node) -> Place:
        rule = RULES.get(getattr(node.target, "overloadpacket", None))
        if node.op != "call_function" or rule is None:
            raise Cut("no such operation in the engine")
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise Cut(f"dtype {getattr(value, 'dtype', type(value).__name__)}")
        place = rule(self, node)
        if not _fits(self.shapes[place.tensor], sizes(node), place.axis):
            raise Cut(f"unexpected shape {list(value.shape)}")
        return place

    def shape(self, place: Place) -> Shape:
        return self.shapes[place.tensor]

    def tensor(self, shape: Shape) -> int:
        """Return the number of a new tensor."""
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def emit(self, operation: Operation) -> int:
        """Add an operation. Return the number of its output."""
        self._operations.append(operation)
        return operation.output

    def read(self, node: Any, axis: int | None = None, shape: Shape | None = None, spatial: bool = False) -> Place:
        """Return where to read a value.

        If the engine has it in another place than asked for, it is passed through memory to the next segment, as a
        value that PyTorch computes.

        Args:
            node: the value.
            axis: dimension of the channels, or None for any.
            shape: shape of the tensor in the engine, or None for any.
            spatial: whether the dimensions after the channels must be the height and width of the images.
        """
        if not isinstance(node, fx.Node) or node in self.constants:
            raise Cut("a constant as input")
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise Cut(f"dtype {getattr(value, 'dtype', type(value).__name__)} of an input")
        if node in self.lowered:
            place = self.lowered[node].place
            own = self.shape(place)
            fits = axis in (None, place.axis) and shape in (None, own)
            if fits and not (spatial and isinstance(own, Images) and own != _default_shape(sizes(node), place.axis)):
                self._level = max(self._level, self.levels[node])
                self._reads[place.tensor] = node, place.axis
                return place
        if axis is None:
            axis = _guess_axis(node)
        if not 0 <= axis < value.dim():
            raise Cut(f"{value.dim()} dimensions")
        shape = shape or _default_shape(sizes(node), axis)
        if not _fits(shape, sizes(node), axis):
            raise Cut("shapes that do not fit")
        key = node, axis, shape
        if key not in self._entries:
            self._entries[key] = self.tensor(shape)
        self._level = max(self._level, self.levels[node] + 1)
        self._reads[self._entries[key]] = node, axis
        return Place(self._entries[key], axis)

    def constant(self, argument: Any) -> Tensor:
        """Return a float32 tensor that does not depend on the inputs."""
        value = self.constants.get(argument) if isinstance(argument, fx.Node) else None
        if value is None:
            raise Cut("a weight that is no constant")
        if value.dtype != torch.float32:
            raise Cut(f"dtype {value.dtype} of a weight")
        return value.detach().contiguous()

    def windowed(self, make: Callable[[int], Operation], target: Images) -> Place:
        """Add an operation with a window. Images of one pixel become a matrix."""
        number = self.emit(make(self.tensor(target)))
        if (target.height, target.width) == (1, 1):
            number = self.emit(Mean(output=self.tensor(Matrix(target.images, target.channels)), input=number))
        return Place(number, 1)


def sizes(node: fx.Node) -> tuple[Count, ...]:
    """Return the shape of the value of a node."""
    counts = [count(size) for size in node.meta["val"].shape]
    if any(size is None for size in counts):
        raise Cut("a size that is not a multiple of the batch size")
    if any(size.factor == 0 for size in counts if size is not None):
        raise Cut("a tensor without elements")
    return tuple(size for size in counts if size is not None)


def count(size: Any) -> Count | None:
    """Return a size of torch.export as a multiple of the batch size, or None if it is none."""
    if type(size) is int and size >= 0:
        return Count(size)
    if not isinstance(size, torch.SymInt):
        return None
    factor, rest = size.node.expr.as_coeff_Mul()
    if rest == 1 and factor >= 0:
        return Count(int(factor))
    # The only backed symbol is the batch size. Sizes that depend on data have unbacked symbols.
    is_batch = rest.is_Symbol and not size.node.shape_env.is_unbacked_symint(rest)
    return Count(int(factor), True) if is_batch and factor.is_Integer and factor > 0 else None


def _default_shape(shape: Sequence[Count], axis: int) -> Shape:
    """Return the tensor of the engine for a value with its channels in a dimension."""
    channels, before, after = shape[axis], shape[:axis], shape[axis + 1 :]
    if channels.per_sample:
        raise Cut("the batch in the place of the channels")
    if all(size == ONE for size in after):
        rows = product(before)
        if rows is None:
            raise Cut("more than one dimension that depends on the batch size")
        return Matrix(rows, channels.factor)
    if axis != 1 or len(after) > 2 or any(size.per_sample for size in after):
        raise Cut(f"channels in dimension {axis} of {len(shape)}")
    height, width = (ONE, *after)[-2:]
    return Images(before[0], channels.factor, height.factor, width.factor)


def _fits(shape: Shape, of_value: Sequence[Count], axis: int) -> bool:
    """Return whether a tensor of the engine can hold a value with its channels in a dimension."""
    before, after = of_value[:axis], of_value[axis + 1 :]
    if of_value[axis] != Count(shape.channels):
        return False
    if isinstance(shape, Matrix):
        return product(before) == shape.rows and all(size == ONE for size in after)
    pixels = Count(shape.height * shape.width)
    if axis == 1 and len(of_value) > 2:
        return before[0] == shape.images and product(after) == pixels
    last = axis == len(of_value) - 1 and len(of_value) > 2
    return last and before[0] == shape.images and product(before[1:]) == pixels


def _guess_axis(node: fx.Node) -> int:
    """Return the dimension of the channels that the next layer expects."""
    rank = node.meta["val"].dim()
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop(0).users:
            packet = getattr(user.target, "overloadpacket", None)
            if packet in CHANNELS_SECOND or packet in CHANNELS_LAST:
                return 1 if packet in CHANNELS_SECOND else rank - 1
            if (
                packet in RULES
                and user not in seen
                and getattr(user.meta["val"], "shape", ()) == node.meta["val"].shape
            ):
                todo.append(user)
                seen.add(user)
    return 1 if rank == 4 else rank - 1


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by their name in its schema."""
    arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        arguments["input" if argument.name == "self" else argument.name] = given
    return arguments


def _pair(numbers: Any) -> tuple[int, int]:
    """Return numbers of a one- or two-dimensional operator as a pair: vertical, horizontal."""
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    if not all(type(number) is int for number in numbers):
        raise Cut("a window that depends on the batch size")
    return (numbers[0], numbers[-1])


def _spatial_window(dims: int, **named: Any) -> Window:
    """Return the window of a one- or two-dimensional operator."""
    neutral = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    pairs = {name: _pair(numbers) for name, numbers in named.items()}
    if dims == 1:
        pairs = {name: (neutral[name], pair[1]) for name, pair in pairs.items()}
    return Window(**pairs)


# Convolutions and linear layers.


def _convolution(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    weight = low.constant(given["weight"])
    dims = weight.dim() - 2
    if dims not in (1, 2) or given["input"].meta["val"].dim() != weight.dim():
        raise Cut(f"convolution of {given['input'].meta['val'].dim()} dimensions")
    if given.get("transposed"):
        raise Cut("transposed convolution")
    bias = low.constant(given["bias"]) if given["bias"] is not None else torch.zeros(len(weight))
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    original, numel = given["input"], weight.numel()
    x, before, after = _unpad(low, original, dims)
    if dims == 1:
        weight, stride, dilation = weight.unsqueeze(2), (1, stride[1]), (1, dilation[1])
    kernel = (weight.shape[2], weight.shape[3])
    if given["padding"] == "same":  # the end gets the larger part
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        own, own_after = [n // 2 for n in total], [n - n // 2 for n in total]
    else:
        own = [0, 0] if given["padding"] == "valid" else list(_pair(given["padding"]))
        own = [0, own[1]] if dims == 1 else own
        own_after = own
    before = [a + b for a, b in zip(before, own, strict=True)]
    after = [a + b for a, b in zip(after, own_after, strict=True)]
    place = low.read(x, axis=1, spatial=True)
    source = low.shape(place)
    out = sizes(node)
    groups = given["groups"]
    low.dense[node] = numel
    if isinstance(source, Matrix):  # images of one pixel: all but one pixel of the kernel are on padding
        if any(size != ONE for size in out[2:]):
            raise Cut("convolution that enlarges one pixel")
        y, x_ = (b // d if b % d == 0 else k for b, d, k in zip(before, dilation, kernel, strict=True))
        inside = y < kernel[0] and x_ < kernel[1]
        pixel = weight[:, :, y, x_] if inside else weight.new_zeros(weight.shape[:2])
        return Place(_multiply(low, place, pixel, bias, groups, Matrix(source.rows, len(weight))), 1)
    weight, padding = _symmetric(weight, before, after, dilation)
    window = Window((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    height, width = window.output_size((source.height, source.width))
    target = Images(source.images, len(weight), height, width)
    if groups == source.channels == len(weight) and groups > 1:
        return low.windowed(
            lambda number: Depthwise(
                output=number, input=place.tensor, window=window, weight=weight[:, 0].contiguous(), bias=bias
            ),
            target,
        )
    sparse = _compress(weight, groups)
    return low.windowed(
        lambda number: Convolution(
            output=number, input=place.tensor, residual=None, window=window, bias=bias, **sparse
        ),
        target,
    )  # fmt: skip


def _unpad(low: Lowering, node: Any, dims: int) -> tuple[Any, list[int], list[int]]:
    """Return the input of a padding with zeros, and the pixels before and after; of another node, the node itself."""
    nothing = node, [0, 0], [0, 0]
    if getattr(node, "target", None) not in (aten.pad.default, aten.constant_pad_nd.default):
        return nothing
    given = _arguments(node)
    pad = list(given["pad"])
    is_zero = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    if not is_zero or len(pad) > 2 * dims or not all(type(number) is int and number >= 0 for number in pad):
        return nothing
    pad += [0] * (4 - len(pad))  # the last dimension comes first
    return given["input"], [pad[2], pad[0]], [pad[3], pad[1]]


def _symmetric(
    weight: Tensor, before: Sequence[int], after: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Make the padding symmetric. Zeros at one end of the kernel take the place of the missing pixels."""
    padding, zeros = [], []
    for first, last, step in zip(before, after, dilation, strict=True):
        difference = abs(first - last)
        if difference % step:
            raise Cut("asymmetric padding")
        padding.append(max(first, last))
        zeros.append((difference // step, 0) if last > first else (0, difference // step))
    if any(number for pair in zeros for number in pair):
        weight = F.pad(weight, (*zeros[1], *zeros[0]))
    return weight, (padding[0], padding[1])


def _compress(weight: Tensor, groups: int = 1) -> dict[str, Any]:
    """Return starts, columns and values of a weight [filters, channels of a group, height, width]."""
    filters, channels, height, width = weight.shape
    row, channel, y, x = weight.nonzero().unbind(1)
    channel = channel + row // (filters // groups) * channels
    starts = F.pad(torch.bincount(row, minlength=filters).cumsum(0), (1, 0))
    return {
        "starts": starts.int(),
        "columns": ((channel * height + y) * width + x).int(),
        "values": weight[weight != 0],
    }


def _multiply(low: Lowering, place: Place, weight: Tensor, bias: Tensor, groups: int, target: Shape) -> int:
    """Add a convolution with one pixel. Return the number of its output."""
    sparse = _compress(weight[:, :, None, None], groups)
    return low.emit(
        Convolution(
            output=low.tensor(target), input=place.tensor, residual=None, window=Window(), bias=bias, **sparse
        )
    )  # fmt: skip


def _linear(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    if node.target.overloadpacket is aten.linear:  # type: ignore[union-attr]
        x, weight, bias = given["input"], low.constant(given["weight"]), given["bias"]
    elif node.target.overloadpacket is aten.addmm:  # type: ignore[union-attr]
        if (given["beta"], given["alpha"]) != (1, 1):
            raise Cut("addmm with factors")
        x, weight, bias = given["mat1"], low.constant(given["mat2"]), given["input"]
    else:
        x, bias = given["input"], None
        weight = low.constant(given.get("mat2", given.get("other")))
    if weight.dim() != 2:
        raise Cut(f"product with a tensor of {weight.dim()} dimensions")
    if node.target.overloadpacket is not aten.linear:  # type: ignore[union-attr]
        weight = weight.t()
    offset = low.constant(bias) if bias is not None else torch.zeros(len(weight))
    if offset.shape != (len(weight),):
        raise Cut(f"bias of shape {list(offset.shape)}")
    place = low.read(x, axis=x.meta["val"].dim() - 1)
    low.dense[node] = weight.numel()
    target = replace(low.shape(place), channels=len(weight))
    return Place(_multiply(low, place, weight, offset, 1, target), place.axis)


# Pooling.


def _pool(low: Lowering, node: fx.Node, dims: int, kind: str) -> Place:
    given = _arguments(node)
    x = given["input"]
    if x.meta["val"].dim() != dims + 2:
        raise Cut(f"pooling of {x.meta['val'].dim()} dimensions")
    if given.get("divisor_override") is not None:
        raise Cut("pooling with divisor_override")
    if kind == "average" and not given["count_include_pad"]:
        kind = "average_without_padding"
    stride = given["stride"] or given["kernel_size"]
    window = _spatial_window(
        dims, kernel=given["kernel_size"], stride=stride, padding=given["padding"], dilation=given.get("dilation", 1)
    )
    return _pooled(low, node, low.read(x, axis=1, spatial=True), window, kind)


def _pooled(low: Lowering, node: fx.Node, place: Place, window: Window, kind: str) -> Place:
    source, out = low.shape(place), sizes(node)
    if isinstance(source, Matrix):
        if window.padding != (0, 0):
            raise Cut("pooling of one pixel with padding")
        return place  # of one pixel
    height, width = window.output_size((source.height, source.width))
    if (Count(height), Count(width))[2 - len(out[2:]) :] != out[2:]:
        raise Cut("pooling with ceil_mode")
    target = replace(source, height=height, width=width)
    return low.windowed(lambda number: Pool(output=number, input=place.tensor, window=window, kind=kind), target)


def _adaptive_average(low: Lowering, node: fx.Node) -> Place:
    x = _arguments(node)["input"]
    if x.meta["val"].dim() != node.meta["val"].dim() or x.meta["val"].dim() not in (3, 4):
        raise Cut(f"pooling of {x.meta['val'].dim()} dimensions")
    place = low.read(x, axis=1, spatial=True)
    source, out = low.shape(place), sizes(node)[2:]
    if isinstance(source, Matrix):
        return place  # one pixel
    if all(size == ONE for size in out):
        return Place(_mean_of(low, place, source), 1)
    height, width = ((ONE, *out)[-2].factor, out[-1].factor)
    if source.height % height or source.width % width:
        raise Cut("adaptive pooling with windows of different sizes")
    kernel = source.height // height, source.width // width
    return _pooled(low, node, place, Window(kernel, kernel), "average")


def _mean_of(low: Lowering, place: Place, source: Images) -> int:
    return low.emit(Mean(output=low.tensor(Matrix(source.images, source.channels)), input=place.tensor))


def _mean(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    x, rank = given["input"], given["input"].meta["val"].dim()
    dims = sorted(dim % rank for dim in given["dim"] or range(rank))
    if rank not in (3, 4) or len(dims) != rank - 2 or dims[0] == 0 or given["dtype"] not in (None, torch.float32):
        raise Cut("mean over other dimensions than height and width")
    (axis,) = set(range(1, rank)) - set(dims)
    place = low.read(x, axis=axis)
    source = low.shape(place)
    axis = axis if given["keepdim"] else 1
    if isinstance(source, Matrix):
        if any(sizes(x)[dim] != ONE for dim in dims):
            raise Cut("mean over the rows of a matrix")
        return replace(place, axis=axis)  # one pixel
    return Place(_mean_of(low, place, source), axis)


# Operations on each number.


def _activation(low: Lowering, node: fx.Node, activation: str) -> Place:
    place = low.read(node.args[0])
    output = low.tensor(low.shape(place))
    return replace(place, tensor=low.emit(Affine(output=output, input=place.tensor, activation=activation)))


def _gelu(low: Lowering, node: fx.Node) -> Place:
    return _activation(low, node, "gelu" if _arguments(node)["approximate"] == "none" else "gelu_tanh")


def _clamp(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    limits = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    names: dict[Any, str] = {(0, None): "relu", (0, 6): "relu6"}
    if any(isinstance(limit, fx.Node) for limit in limits) or limits not in names:
        raise Cut(f"clamp to {limits}")
    return _activation(low, node, names[limits])


def _vector(low: Lowering, argument: Any, x: fx.Node, axis: int) -> Tensor:
    """Return a number or constant, which is added to x or multiplied, as one number per channel."""
    shape = sizes(x)
    channels = shape[axis].factor
    if type(argument) in (int, float):
        return torch.full((channels,), float(argument))
    if not isinstance(argument, fx.Node) or argument not in low.constants:
        raise Cut("another operand than a tensor or constant")
    tensor = low.constants[argument].detach()
    if tensor.is_complex() or tensor.dim() > len(shape):
        raise Cut("a constant with more dimensions")
    first = len(shape) - tensor.dim()
    if any(size != 1 and first + dim != axis for dim, size in enumerate(tensor.shape)):
        raise Cut("a constant that is not one number per channel")
    if tensor.numel() not in (1, channels):
        raise Cut("a constant that enlarges the tensor")
    return tensor.reshape(-1).float().expand(channels).contiguous()


def _affine(low: Lowering, x: Any, scale: Any = None, bias: Any = None, invert: bool = False) -> Place:
    place = low.read(x)
    vectors = [None if v is None else _vector(low, v, x, place.axis) for v in (scale, bias)]
    if invert and vectors[0] is not None:
        vectors[0] = 1 / vectors[0]
    output = low.tensor(low.shape(place))
    return replace(place, tensor=low.emit(Affine(output=output, input=place.tensor, scale=vectors[0], bias=vectors[1])))


def _binary(low: Lowering, node: fx.Node, kind: str) -> Place:
    given = _arguments(node)
    if given.get("alpha", 1) != 1:
        raise Cut("add with alpha")
    x, y = given["input"], given["other"]
    if not isinstance(x, fx.Node) or x in low.constants:
        x, y = y, x
    if not isinstance(y, fx.Node) or y in low.constants:
        return _affine(low, x, bias=y) if kind == "add" else _affine(low, x, scale=y)
    if sizes(x) != sizes(node) or (y in low.lowered and x not in low.lowered and sizes(y) == sizes(node)):
        x, y = y, x
    if sizes(x) != sizes(node):
        raise Cut("operands that are both enlarged")
    place = low.read(x)
    shape = low.shape(place)
    if sizes(x) == sizes(y):
        other = low.read(y, axis=place.axis, shape=shape)
    else:  # one number per channel of each image
        pixel = tuple(size if dim in (0, place.axis) else ONE for dim, size in enumerate(sizes(x)))
        if not isinstance(shape, Images) or sizes(y) != pixel:
            raise Cut("an operand that is enlarged")
        other = low.read(y, axis=place.axis, shape=Matrix(shape.images, shape.channels))
    output = low.tensor(shape)
    return replace(
        place, tensor=low.emit(Binary(output=output, input=place.tensor, other=other.tensor, kind=kind))
    )  # fmt: skip


def _subtract(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    x, y = given["input"], given["other"]
    if given.get("alpha", 1) != 1:
        raise Cut("sub with alpha")
    if isinstance(y, (int, float)):
        return _affine(low, x, bias=-y)
    place = low.read(x)
    vector = _vector(low, y, x, place.axis)
    output = low.tensor(low.shape(place))
    return replace(place, tensor=low.emit(Affine(output=output, input=place.tensor, bias=-vector)))


def _subtract_from(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    if given.get("alpha", 1) != 1:
        raise Cut("rsub with alpha")
    return _affine(low, given["input"], scale=-1, bias=given["other"])


def _divide(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    if given.get("rounding_mode") is not None:
        raise Cut("division with rounding")
    return _affine(low, given["input"], scale=given["other"], invert=True)


def _negate(low: Lowering, node: fx.Node) -> Place:
    return _affine(low, node.args[0], scale=-1)


def _batch_norm(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    if given["training"] or given["running_mean"] is None:
        raise Cut("batch norm with the statistics of the batch")
    mean, variance = low.constant(given["running_mean"]), low.constant(given["running_var"])
    scale = (variance + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * low.constant(given["weight"])
    bias = -mean * scale
    if given["bias"] is not None:
        bias = bias + low.constant(given["bias"])
    place = low.read(given["input"], axis=1)
    output = low.tensor(low.shape(place))
    return replace(place, tensor=low.emit(Affine(output=output, input=place.tensor, scale=scale, bias=bias)))


def _layer_norm(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    x = given["input"]
    if len(given["normalized_shape"]) != 1:
        raise Cut("layer norm over more than one dimension")
    place = low.read(x, axis=x.meta["val"].dim() - 1)
    shape = low.shape(place)
    weight = torch.ones(shape.channels) if given["weight"] is None else low.constant(given["weight"])
    bias = torch.zeros(shape.channels) if given["bias"] is None else low.constant(given["bias"])
    norm = LayerNorm(
        output=low.tensor(shape), input=place.tensor, weight=weight, bias=bias, epsilon=float(given["eps"])
    )
    return replace(place, tensor=low.emit(norm))


# Views and copies.


def _view(low: Lowering, node: fx.Node) -> Place:
    x: Any = node.args[0]
    if x not in low.lowered:
        raise Cut("a view of a tensor in PyTorch")
    own, out = low.lowered[x].place, sizes(node)
    shape = low.shape(own)
    last = len(out) - 1
    axes = range(last, -1, -1) if isinstance(shape, Matrix) else [1 if own.axis == 1 else last]
    for axis in axes:
        if axis < len(out) and _fits(shape, out, axis):
            return replace(low.read(x), axis=axis)
    raise Cut("a view that mixes channels and pixels, or images")


def _permute(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    x: Any = node.args[0]
    if x not in low.lowered:
        raise Cut("a view of a tensor in PyTorch")
    rank = x.meta["val"].dim()
    if "dims" in given:
        order = [dim % rank for dim in given["dims"]]
    else:
        order = list(range(rank))
        one, other = (given["dim0"] % rank, given["dim1"] % rank) if "dim0" in given else (0, rank - 1)
        order[one], order[other] = order[other], order[one]
    own, of_x = low.lowered[x].place, sizes(x)
    axis = order.index(own.axis)
    longer = [dim for dim in order if of_x[dim] != ONE]  # dimensions of one element may be anywhere
    images = isinstance(low.shape(own), Images)
    others = [dim for dim in order if dim != own.axis]
    moved = images and others == sorted(others) and axis in (1, rank - 1)
    if longer != sorted(longer) and not moved:
        raise Cut("a permutation that is not of the channels alone")
    return replace(low.read(x), axis=axis)


def _slice(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    x: Any = node.args[0]
    if x in low.lowered and sizes(x) == sizes(node):
        return low.read(x)
    rank = x.meta["val"].dim()
    place = low.read(x)
    start = given.get("start")
    if given["dim"] % rank != place.axis or given.get("step", 1) != 1 or not isinstance(start or 0, int):
        raise Cut("a slice of other dimensions than the channels")
    shape = low.shape(place)
    first = start or 0
    first = min(max(first + shape.channels if first < 0 else first, 0), shape.channels)
    channels = sizes(node)[place.axis].factor
    output = low.tensor(replace(shape, channels=channels))
    copy = Copy(output=output, input=place.tensor, input_first=first, output_first=0, channels=channels)
    return replace(place, tensor=low.emit(copy))


def _concatenate(low: Lowering, node: fx.Node) -> Place:
    given = _arguments(node)
    nodes: Any = given["tensors"]
    axis = given["dim"] % node.meta["val"].dim()
    at_axis = [x for x in nodes if x in low.lowered and low.lowered[x].place.axis == axis]
    shape = low.shape(low.read(at_axis[0] if at_axis else nodes[0], axis=axis))
    places = [low.read(x, axis=axis, shape=replace(shape, channels=sizes(x)[axis].factor)) for x in nodes]
    output, first = low.tensor(replace(shape, channels=sizes(node)[axis].factor)), 0
    for place in places:
        channels = low.shape(place).channels
        low.emit(Copy(output=output, input=place.tensor, input_first=0, output_first=first, channels=channels))
        first += channels
    return Place(output, axis)


Rule = Callable[[Lowering, fx.Node], Place]

RULES: dict[Any, Rule] = {
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.convolution: _convolution,
    aten.linear: _linear,
    aten.addmm: _linear,
    aten.mm: _linear,
    aten.matmul: _linear,
    aten.max_pool1d: partial(_pool, dims=1, kind="maximum"),
    aten.max_pool2d: partial(_pool, dims=2, kind="maximum"),
    aten.avg_pool1d: partial(_pool, dims=1, kind="average"),
    aten.avg_pool2d: partial(_pool, dims=2, kind="average"),
    aten.adaptive_avg_pool1d: _adaptive_average,
    aten.adaptive_avg_pool2d: _adaptive_average,
    aten.mean: _mean,
    aten.relu: partial(_activation, activation="relu"),
    aten.relu6: partial(_activation, activation="relu6"),
    aten.silu: partial(_activation, activation="silu"),
    aten.sigmoid: partial(_activation, activation="sigmoid"),
    aten.tanh: partial(_activation, activation="tanh"),
    aten.hardswish: partial(_activation, activation="hardswish"),
    aten.hardsigmoid: partial(_activation, activation="hardsigmoid"),
    aten.gelu: _gelu,
    aten.hardtanh: _clamp,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.add: partial(_binary, kind="add"),
    aten.mul: partial(_binary, kind="multiply"),
    aten.sub: _subtract,
    aten.rsub: _subtract_from,
    aten.div: _divide,
    aten.neg: _negate,
    aten.batch_norm: _batch_norm,
    aten.layer_norm: _layer_norm,
    aten.view: _view,
    aten.reshape: _view,
    aten.flatten: _view,
    aten.unflatten: _view,
    aten.squeeze: _view,
    aten.unsqueeze: _view,
    aten.expand: _view,
    aten.permute: _permute,
    aten.transpose: _permute,
    aten.t: _permute,
    aten.slice: _slice,
    aten.narrow: _slice,
    aten.cat: _concatenate,
}  # fmt: skip

CHANNELS_SECOND = {
    aten.conv1d, aten.conv2d, aten.convolution, aten.batch_norm, aten.max_pool1d, aten.max_pool2d, aten.avg_pool1d,
    aten.avg_pool2d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d,
}  # fmt: skip
CHANNELS_LAST = {aten.linear, aten.addmm, aten.mm, aten.matmul, aten.layer_norm}
