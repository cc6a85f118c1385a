"""Patterns: which weights of a layer are pruned together.

    Unstructured()    every weight by itself
    Block(n)          n neighbouring output channels of one input weight
    NM(n, m)          n of every m consecutive inputs of an output are kept
    Filters()         all weights of one output channel

A *unit* is what is kept or pruned as a whole: one weight for `Unstructured` and `NM`, a group of weights for
`Block` and `Filters`. Counts of units are exact. A group is ranked by its root mean square where weights are
ranked by |W|, and by the mean of its scores otherwise, so groups of different sizes compare.

Source: blocks: Narang, Undersander & Diamos, "Block-Sparse Recurrent Neural Networks", 2017; N:M: Mishra et al.,
"Accelerating Sparse Deep Neural Networks", 2021; filters: Li et al., "Pruning Filters for Efficient ConvNets",
ICLR 2017.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.group_threshold import Shape, group_norm
from sparing.layers import CONVOLUTIONS, Layer, is_transposed
from sparing.masks import check_scores, count_kept, keep_top


@dataclass(frozen=True)
class Units(ABC):
    """Abstract: the units of one weight.

    Attributes:
        shape: of the weight.
        view: the shape that splits the weight into groups.
        dims: the dimensions of `view` that a group spans.
    """

    shape: Shape
    view: Shape
    dims: Shape

    @property
    def unit_shape(self) -> Shape:
        """The shape of a tensor with one value for each unit."""
        return tuple(1 if d in self.dims and self.weights > 1 else n for d, n in enumerate(self.view))

    @property
    def group_size(self) -> int:
        """Weights in one group."""
        return prod([self.view[d] for d in self.dims])

    @property
    @abstractmethod
    def count(self) -> int:
        """Units in the weight."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Weights in one unit."""

    @abstractmethod
    def kept(self, sparsity: float) -> int:
        """Return how many units stay at a sparsity in [0, 1]."""

    @abstractmethod
    def keep_top(self, scores: Tensor, kept: int, layer: str = "") -> Tensor:
        """Return a boolean mask of the `kept` units of largest score, with the shape of `scores`.

        Args:
            scores: of the units.
            kept: how many to keep.
            layer: its name, for messages.

        Raises:
            InputError: scores are NaN.
        """

    @abstractmethod
    def norm(self, tensor: Tensor) -> Tensor:
        """Return the root mean square over each unit."""

    @abstractmethod
    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over each unit."""

    @abstractmethod
    def expand(self, per_unit: Tensor) -> Tensor:
        """Return a value of each unit as a tensor of the shape of the weight."""

    @abstractmethod
    def active(self, mask: Tensor) -> Tensor:
        """Return which units of a mask of the shape of the weight are kept."""


@dataclass(frozen=True)
class Groups(Units):
    """Units that are groups of weights, or single weights where `dims` is empty."""

    @property
    def count(self) -> int:
        return prod(self.view) // self.group_size

    @property
    def weights(self) -> int:
        return self.group_size

    def kept(self, sparsity: float) -> int:
        return count_kept(self.count, sparsity)

    def keep_top(self, scores: Tensor, kept: int, layer: str = "") -> Tensor:
        return keep_top(scores, kept, layer)

    def norm(self, tensor: Tensor) -> Tensor:
        return group_norm(tensor, self.view, self.dims)

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.view).mean(self.dims, keepdim=True) if self.dims else tensor

    def active(self, mask: Tensor) -> Tensor:
        return mask.reshape(self.view).amax(self.dims, keepdim=True) if self.dims else mask

    def expand(self, per_unit: Tensor) -> Tensor:
        return per_unit.expand(self.view).reshape(self.shape)


@dataclass(frozen=True)
class NOfM(Units):
    """Single weights, of which every group keeps the same number."""

    @property
    def count(self) -> int:
        return prod(self.view)

    @property
    def weights(self) -> int:
        return 1

    def kept(self, sparsity: float) -> int:
        return self.count // self.group_size * count_kept(self.group_size, sparsity)

    def keep_top(self, scores: Tensor, kept: int, layer: str = "") -> Tensor:
        if not scores.is_meta:
            check_scores({layer: lambda: scores})
        each = kept * self.group_size // self.count
        grouped = scores.reshape(self.view)
        best = grouped.topk(each, dim=self.dims[0], sorted=False).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(self.dims[0], best, True).reshape(self.shape)

    def norm(self, tensor: Tensor) -> Tensor:
        return tensor.abs()

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def active(self, mask: Tensor) -> Tensor:
        return mask

    def expand(self, per_unit: Tensor) -> Tensor:
        return per_unit


class Pattern(ABC):
    """Abstract: how the weights of a layer are grouped. A pattern is a frozen dataclass."""

    @abstractmethod
    def units(self, layer: Layer) -> Units:
        """Return the units of a layer.

        Raises:
            InputError: the pattern is not defined for this layer; the message says why.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight is kept or pruned by itself.

    Examples:
        >>> model = nn.Linear(8, 8)
        >>> _ = sparsify_(model, GMP(sparsity=0.75, begin=0, end=0, pattern=Unstructured()))
        >>> report(model).total.nonzero
        16
    """

    def units(self, layer: Layer) -> Units:
        shape = tuple(layer.weight.shape)
        return Groups(shape, shape, ())


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of n neighbouring output channels of one input weight, kept or pruned together.

    A kernel that computes n outputs at once multiplies such a block by one input, without an index per weight.

    Args:
        n: output channels in a block, at least 1.

    Raises:
        InputError: n is not a whole number, or does not divide the output channels of a layer.

    Examples:
        >>> model = nn.Linear(3, 8)
        >>> _ = sparsify_(model, GMP(sparsity=0.5, begin=0, end=0, pattern=Block(4)))
        >>> (model.weight != 0).reshape(2, 4, 3).sum(dim=1).unique()
        tensor([0, 4])
    """

    n: int = 4

    def __post_init__(self) -> None:
        _check_count("Block: n", self.n, 1)

    def units(self, layer: Layer) -> Units:
        shape = tuple(layer.weight.shape)
        if self.n == 1:
            return Groups(shape, shape, ())
        output, _ = _axes(layer, self)
        together = _outputs_together(layer, output)
        if together % self.n:
            raise InputError(
                f"{self}: layer {layer.name!r} ({layer.kind}) has {together} neighbouring output channels, which "
                f"{self.n} does not divide; choose another n or leave the layer out with select="
            )
        view = (*shape[:output], shape[output] // self.n, self.n, *shape[output + 1 :])
        return Groups(shape, view, (output + 1,))


@dataclass(frozen=True)
class NM(Pattern):
    """Keep n of every m consecutive inputs of each output channel: the N:M sparsity of GPUs at n=2, m=4.

    The sparsity of every layer is 1 − n/m. On a ramp, every group loses its weights one at a time.

    Args:
        n: weights kept in a group, from 1 to m.
        m: weights in a group, at least 2.

    Raises:
        InputError: a value is out of range, or m does not divide the input channels of a layer.

    Examples:
        >>> model = nn.Linear(8, 2)
        >>> _ = sparsify_(model, GMP(begin=0, end=0, pattern=NM(2, 4)))
        >>> (model.weight != 0).reshape(2, 2, 4).sum(dim=2).unique()
        tensor([2])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        _check_count("NM: m", self.m, 2)
        _check_count("NM: n", self.n, 1)
        if self.n > self.m:
            raise InputError(f"NM: n must be at most m={self.m}, got {self.n}")

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero, 1 − n/m."""
        return 1 - self.n / self.m

    def units(self, layer: Layer) -> Units:
        shape = tuple(layer.weight.shape)
        axis = _axes(layer, self)[1]
        together = shape[axis] // getattr(layer.module, "groups", 1) if is_transposed(layer.module) else shape[axis]
        if together % self.m:
            raise InputError(
                f"{self}: layer {layer.name!r} ({layer.kind}) has {together} inputs per output channel, which "
                f"{self.m} does not divide; choose another m or leave the layer out with select="
            )
        view = (*shape[:axis], shape[axis] // self.m, self.m, *shape[axis + 1 :])
        return NOfM(shape, view, (axis + 1,))


@dataclass(frozen=True)
class Filters(Pattern):
    """All weights of one output channel: a filter of a convolution, a row of a Linear.

    A network without its zero filters is a smaller dense network; `sparing export --shrink` removes them.

    Examples:
        >>> model = nn.Conv2d(4, 8, 3)
        >>> _ = sparsify_(model, GMP(sparsity=0.5, begin=0, end=0, pattern=Filters()))
        >>> (model.weight != 0).flatten(1).sum(dim=1).unique()
        tensor([ 0, 36])
    """

    def units(self, layer: Layer) -> Units:
        shape = tuple(layer.weight.shape)
        output, _ = _axes(layer, self)
        if output == 0:
            return Groups(shape, shape, tuple(range(1, len(shape))))
        groups: int = getattr(layer.module, "groups", 1)
        view = (groups, shape[0] // groups, *shape[1:])
        return Groups(shape, view, (1, *range(3, len(view))))


def _axes(layer: Layer, pattern: Pattern) -> tuple[int, int]:
    """Return the dimensions of a weight that hold its output and its input channels."""
    if is_transposed(layer.module):
        return 1, 0
    if isinstance(layer.module, (*CONVOLUTIONS, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        return 0, 1
    raise InputError(
        f"{pattern}: layer {layer.name!r} is a {layer.kind}, whose output channels are not known; use Unstructured() "
        "or leave the layer out with select="
    )


def _outputs_together(layer: Layer, axis: int) -> int:
    """Return how many neighbouring output channels belong together: those of one channel group, gate or projection."""
    module, size = layer.module, layer.weight.shape[axis]
    if isinstance(module, CONVOLUTIONS):
        return size // module.groups
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return min(size, module.hidden_size)
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    return size


def _check_count(what: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} must be a whole number, at least {least}, got {value!r}")
