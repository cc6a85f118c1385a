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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparing.engine.nodes import packet_of
from sparing.engine.operations import Mean, Operation
from sparing.engine.shapes import Count, Images, Matrix, Shape, product
from sparing.errors import InputError

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


@dataclass(frozen=True)
class Rule:
    """How to lower an operator.

    Attributes:
        lower: adds the operations to a `Lowering`. Returns the place of the result, or raises `Cut`.
        axis: dimension of the input that is the channels, 1 or -1; None for any.
    """

    lower: "Callable[[Lowering, fx.Node], Place]"
    axis: int | None = None


class Lowering:
    """Lowers the operators of a graph one after another.

    Every value has a level: the number of segments that run before it, one after another. A segment is made of all
    operators of one level in the engine, so that parallel branches are in one segment.

        level in the engine = max(levels of inputs in the engine, 1 + levels of inputs in PyTorch)
        level in PyTorch = max(levels of inputs)

    Args:
        rules: operator → how to lower it.
        constants: value of each node that does not depend on the inputs.
        excluded: nodes that run in PyTorch in any case, with the reason.
    """

    def __init__(self, rules: Mapping[Any, Rule], constants: Mapping[fx.Node, Tensor], excluded: Mapping[fx.Node, str]):
        self.rules, self.constants, self.excluded = rules, constants, excluded
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
        except (Cut, InputError) as reason:  # the shapes and operations refuse sizes that are too large
            self.levels[node] = max((self.levels[other] for other in dependencies), default=0)
            self.reasons[node] = str(reason)
        else:
            self.lowered[node] = Lowered(place, self._operations, self._reads, self._level)
            self.levels[node] = self._level

    def _lower(self, node: fx.Node) -> Place:
        rule = self.rules.get(packet_of(node))
        if node.op != "call_function" or rule is None:
            raise Cut("no such operation in the engine")
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise Cut(f"dtype {getattr(value, 'dtype', type(value).__name__)}")
        place = rule.lower(self, node)
        if not fits(self.shapes[place.tensor], sizes(node), place.axis):
            raise Cut(f"unexpected shape {list(value.shape)}")
        return place

    def shape(self, place: Place) -> Shape:
        return self.shapes[place.tensor]

    def tensor(self, shape: Shape) -> int:
        """Return the number of a new tensor."""
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def emit(self, operation: Operation) -> None:
        """Add an operation."""
        self._operations.append(operation)

    def apply(self, kind: type[Operation], place: Place, shape: Shape | None = None, /, **fields: Any) -> Place:
        """Add an operation on one value. Return where its result is, with the channels in the same dimension.

        Args:
            kind: class of the operation.
            place: the value.
            shape: shape of the result, or None for that of the value.
            fields: other fields of the operation.
        """
        output = self.tensor(shape or self.shape(place))
        self.emit(kind(output, place.tensor, **fields))
        return Place(output, place.axis)

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
            is_there = axis in (None, place.axis) and shape in (None, own)
            if spatial and isinstance(own, Images):
                is_there = is_there and own == _default_shape(sizes(node), place.axis)
            if is_there:
                self._level = max(self._level, self.levels[node])
                self._reads[place.tensor] = node, place.axis
                return place
        if axis is None:
            axis = self._guess_axis(node)
        if not 0 <= axis < value.dim():
            raise Cut(f"{value.dim()} dimensions")
        shape = shape or _default_shape(sizes(node), axis)
        if not fits(shape, sizes(node), axis):
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
            raise Cut("a weight that is not constant")
        if value.dtype != torch.float32:
            raise Cut(f"dtype {value.dtype} of a weight")
        return value.detach().contiguous()

    def _guess_axis(self, node: fx.Node) -> int:
        """Return the dimension of the channels that the next layer expects."""
        rank: int = node.meta["val"].dim()
        todo, seen = [node], {node}
        while todo:
            for user in todo.pop(0).users:
                rule = self.rules.get(packet_of(user))
                if rule is not None and rule.axis is not None:
                    return rule.axis % rank
                same = rule is not None and getattr(user.meta["val"], "shape", ()) == node.meta["val"].shape
                if same and user not in seen:
                    todo.append(user)
                    seen.add(user)
        return 1 if rank == 4 else rank - 1

    def apply_window(self, kind: type[Operation], place: Place, target: Images, /, **fields: Any) -> Place:
        """Add an operation with a window, as `apply`. Images of one pixel become a matrix."""
        result = self.apply(kind, place, target, **fields)
        is_pixel = (target.height, target.width) == (1, 1)
        return self.apply(Mean, result, target.pixels) if is_pixel else result


def sizes(node: fx.Node) -> tuple[Count, ...]:
    """Return the shape of the value of a node."""
    if not isinstance(node.meta["val"], Tensor):
        raise Cut("a value that is not a tensor")
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


def fits(shape: Shape, of_value: Sequence[Count], axis: int) -> bool:
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


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by their name in its schema."""
    arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        arguments["input" if argument.name == "self" else argument.name] = given
    return arguments
