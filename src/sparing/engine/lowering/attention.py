"""Lowering of attention, with the views around it.

Models divide the channels of a linear layer into heads by views, which the engine cannot hold. So the whole chain

    linear [N, T, C] → views → [N, H, T, E] → scaled_dot_product_attention → views → [N, T, H * E]

is one operation, and its result is that of the last view. `Axes` follows the views to find where the heads are.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from sparing.engine.attention import Attention
from sparing.engine.formulas import HIDDEN
from sparing.engine.lowering.lowering import ONE, Cut, Lowering, Place, arguments_of, sizes
from sparing.engine.lowering.rotary import find_rotation, tables
from sparing.engine.nodes import packet_of
from sparing.engine.shapes import Count, Matrix

aten = torch.ops.aten

SHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
VIEWS = (*SHAPES, aten.expand, aten.permute, aten.transpose, aten.select, aten.slice, aten.narrow)

BATCH = 2**20 + 7
"""Batch size for which views are followed: a large prime, so that it is not a factor of another size."""

Factor = tuple[int, int]
"""Size and stride."""


def attention(low: Lowering, node: fx.Node) -> Place:
    """Lower attention that ends with a node: the operator, or the view that joins its heads."""
    operator, views = _chain(node, lambda n: packet_of(n) is aten.scaled_dot_product_attention)
    given = arguments_of(operator)
    if given["dropout_p"]:
        raise Cut("attention with dropout")
    query, key, value = (_Heads(low, given[name]) for name in ("query", "key", "value"))
    repeated = query.heads // key.heads if given["enable_gqa"] else 1
    heads = query.heads // query.shared, *(part.heads * repeated for part in (key, value))
    alike = query.samples == key.samples == value.samples and set(heads) == {query.heads} and key.shared == value.shared
    orders = query.orders & key.orders & value.orders
    if not alike or not orders or query.channels != key.channels or key.tokens != value.tokens:
        raise Cut("attention to other samples, heads or tokens")
    if value.angles or len(query.angles) != len(key.angles) or not all(map(torch.equal, query.angles, key.angles)):
        raise Cut("rotary embeddings that differ between query and key, or of the value")
    cosine, sine = key.angles or (None, None)
    mask, is_causal = _mask(low, given["attn_mask"], query, key.tokens, given["query"].meta["val"].dim() == 4)
    channels = query.heads * value.channels
    tokens_first = False not in orders
    shape = (query.samples.at(BATCH), query.heads, query.tokens, value.channels)
    samples_stride, tokens_stride = _strides(*shape[::2], channels, tokens_first)
    strides = (samples_stride, value.channels, tokens_stride, 1)
    result = Axes(zip(shape, strides, strict=True)).follow(views, operator)
    if _merge(result.factors()) not in ([(prod(shape), 1)], []) or sizes(node)[-1] != Count(channels):
        raise Cut("attention whose heads are not joined")
    output = low.tensor(Matrix(query.rows, channels))
    scale = query.channels**-0.5 if given["scale"] is None else given["scale"]
    low.emit(
        Attention(
            output, query.tensor, key=key.tensor, value=value.tensor, heads=query.heads,
            channels=query.channels, queries=query.tokens, keys=key.tokens, query_first=query.first,
            query_stride=query.stride, key_first=key.first, key_stride=key.stride, value_first=value.first,
            value_stride=value.stride, scale=float(scale), causal=given["is_causal"] or is_causal,
            tokens_first=tokens_first, shared=key.shared * repeated, cosine=cosine,
            sine=sine, **mask,
        )
    )  # fmt: skip
    return Place(output, node.meta["val"].dim() - 1)


class Axes:
    """The dimensions of a view of a tensor: each has factors, the outermost first; one of size 1 has none.

    Args:
        dims: size and stride of each dimension.

    Attributes:
        offset: where the view begins.
    """

    def __init__(self, dims: Iterable[Factor]):
        self.dims = [[(size, stride)] if size > 1 else [] for size, stride in dims]
        self.offset = 0

    def follow(self, views: Iterable[fx.Node], source: fx.Node) -> "Axes":
        """Follow views of the value of a node. Heads, dimension 1, may be missing in it."""
        if source.meta["val"].dim() == 3 and len(self.dims) == 4:
            del self.dims[1]
        for node in views:
            given, rank = arguments_of(node), len(self.dims)
            if packet_of(node) is aten.expand:
                self._expand([size.at(BATCH) for size in sizes(node)])
            elif packet_of(node) in SHAPES:
                self._reshape([size.at(BATCH) for size in sizes(node)])
            elif "dims" in given:
                self.dims = [self.dims[dim] for dim in given["dims"]]
            elif "dim1" in given:
                one, other = given["dim0"], given["dim1"]
                self.dims[one], self.dims[other] = self.dims[other], self.dims[one]
            else:
                self._select(node, given, given["dim"] % rank)
        return self

    def factors(self) -> list[Factor]:
        """Return those of all dimensions."""
        return [factor for dim in self.dims for factor in dim]

    def _reshape(self, shape: Iterable[int]) -> None:
        factors, self.dims = self.factors(), []
        for size in shape:
            dim: list[Factor] = []
            while size > 1:
                inner, stride = factors.pop(0)
                outer = min(inner, size)
                if inner % outer or size % outer:
                    raise Cut("a view that mixes heads and tokens")
                if inner > outer:
                    factors.insert(0, (inner // outer, stride))
                dim.append((outer, stride * (inner // outer)))
                size //= outer
            self.dims.append(dim)

    def _expand(self, shape: Sequence[int]) -> None:
        """Follow the repetition of dimensions of size 1: the stride becomes 0."""
        missing: list[list[Factor]] = [[] for _ in range(len(shape) - len(self.dims))]
        self.dims = missing + self.dims
        for dim, size in zip(self.dims, shape, strict=True):
            if size > 1 and not dim:
                dim.append((size, 0))

    def _select(self, node: fx.Node, given: dict[str, Any], dim: int) -> None:
        """Follow the choice of an index, or of successive ones."""
        start = given["index"] if "index" in given else given["start"] or 0
        factors = _merge(self.dims[dim])
        if len(factors) > 1 or not isinstance(start, int) or given.get("step", 1) != 1:
            raise Cut("a slice of several dimensions")
        size, stride = factors[0] if factors else (1, 1)
        self.offset += (max(start + size, 0) if start < 0 else start) * stride
        if "index" in given:
            del self.dims[dim]
        else:
            count = sizes(node)[dim].at(BATCH)
            self.dims[dim] = [(count, stride)] if count > 1 else []


class _Heads:
    """Query, key or value as channels of a tensor of the engine.

    Attributes:
        tensor: its number.
        rows: number of its rows.
        samples: number of samples.
        heads: number of heads.
        shared: how often each head is repeated.
        tokens: number of tokens of a sample.
        channels: of a head.
        first: the first channel of head 0.
        stride: channels from a head to the next.
        angles: cosine and sine [tokens, channels] of rotary embeddings, if there are any.
        orders: whether the rows may have the tokens first. Both with one sample or token.
    """

    def __init__(self, low: Lowering, node: fx.Node):
        base, views = _chain(node, lambda n: n in low.lowered or find_rotation(low, n) is not None)
        self.angles: list[Tensor] = []
        if (rotation := find_rotation(low, base)) is not None:
            x, *factors = rotation
            dim, self.angles = tables(x, *factors)
            whole = _contiguous(sizes(x))
            expected = Axes([(1, 1) if dim is None else whole[dim], whole[-1]])
            if [_merge(part) for part in Axes(whole).follow(views, base).dims[-2:]] != expected.dims:
                raise Cut("a view of a rotary embedding that changes the tokens or channels")
            base, before = _chain(x, low.lowered.__contains__)
            views = before + views
        place, rank = low.read(base), node.meta["val"].dim()
        matrix = low.shape(place)
        if not isinstance(matrix, Matrix) or place.axis != base.meta["val"].dim() - 1 or rank not in (3, 4):
            raise Cut("attention on images, or in other than four dimensions")
        if any(size.per_sample for size in sizes(node)[1:]):
            raise Cut("attention between samples")
        axes = Axes(_contiguous(sizes(base))).follow(views, base)
        dims = [_merge(dim) for dim in axes.dims]
        if rank == 3:
            dims.insert(1, [])
        self.tensor, self.rows, self.samples = place.tensor, matrix.rows, sizes(node)[0]
        _, self.heads, self.tokens, self.channels = (prod(size for size, _ in dim) for dim in dims)
        self.shared = dims[1].pop()[0] if dims[1] and dims[1][-1][1] == 0 else 1
        self.first = axes.offset
        self.stride = dims[1][0][1] if dims[1] else self.channels
        self.orders = set()
        for tokens_first in (False, True):
            samples, tokens = _strides(self.samples.at(BATCH), self.tokens, matrix.channels, tokens_first)
            strides = (samples, self.stride, tokens, 1)
            if all(not dim or dim == [(dim[0][0], stride)] for dim, stride in zip(dims, strides, strict=True)):
                self.orders.add(tokens_first)
        rows = Count(self.samples.factor * self.tokens, self.samples.per_sample)
        if (
            rows != matrix.rows
            or self.first + (self.heads // self.shared - 1) * self.stride + self.channels > matrix.channels
        ):
            raise Cut("attention to a part of the tokens")


def _mask(low: Lowering, mask: Any, query: _Heads, keys: int, with_heads: bool) -> tuple[dict[str, Any], bool]:
    """Return the fields of the operation that describe a mask, and whether it is that of causal attention."""
    if mask is None:
        return {"mask": None}, False
    if mask in low.constants:
        value = low.constants[mask]
        hidden = value <= HIDDEN
        triangle = torch.ones(query.tokens, keys, dtype=torch.bool).triu(1)
        if hidden.shape[-2:] == triangle.shape and bool((hidden == triangle).all()) and not value[~hidden].any():
            return {"mask": None}, True
        raise Cut("a constant mask that is not causal")
    if len(shape := sizes(mask)) == 3 + with_heads:
        samples, heads, queries = shape[:3] if with_heads else (shape[0], ONE, shape[1])
        rows = Count(samples.factor * heads.factor * queries.factor, samples.per_sample)
        fits = heads.factor in (1, query.heads) and queries.factor in (1, query.tokens)
        if samples == query.samples and shape[-1] == Count(keys) and fits:
            tensor = low.read(mask, axis=len(shape) - 1, shape=Matrix(rows, keys)).tensor
            return {"mask": tensor, "mask_heads": heads.factor, "mask_queries": queries.factor}, False
    raise Cut("a mask that is not [samples, heads or 1, queries or 1, keys]")


def _contiguous(shape: Sequence[Count]) -> list[Factor]:
    """Return size and stride of each dimension of a contiguous tensor."""
    numbers = [size.at(BATCH) for size in shape]
    return [(size, prod(numbers[dim + 1 :])) for dim, size in enumerate(numbers)]


def _strides(samples: int, tokens: int, channels: int, tokens_first: bool) -> Factor:
    """Return the strides of samples and tokens."""
    return (channels, samples * channels) if tokens_first else (tokens * channels, channels)


def _merge(factors: Sequence[Factor]) -> list[Factor]:
    """Return factors with neighbours that follow one another in memory as one."""
    result: list[Factor] = []
    for size, stride in factors:
        if result and result[-1][1] == size * stride:
            size *= result.pop()[0]
        result.append((size, stride))
    return result


def _chain(node: Any, ends: Callable[[fx.Node], bool]) -> tuple[fx.Node, list[fx.Node]]:
    """Follow views back to the first node for which `ends` is true. Return it, and the views from it on."""
    views: list[fx.Node] = []
    while not ends(node):
        if not isinstance(node, fx.Node) or packet_of(node) not in VIEWS:
            raise Cut("a view of a tensor in PyTorch")
        views.insert(0, node)
        node = node.args[0]
    return node, views
