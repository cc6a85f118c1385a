"""The attention operation."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.engine.checks import require, require_integer, require_tensor
from sparing.engine.operations import Operation, check_shape
from sparing.engine.shapes import Count, Matrix, Shape


@dataclass(frozen=True, eq=False)
class Attention(Operation):
    """output = softmax(scale * query @ key^T + mask) @ value, for each head of each sample.

    All are matrices of `queries` or `keys` rows per sample; `input` is the query. A head has `channels` successive
    channels in query and key.

    Attributes:
        key: number of a tensor.
        value: number of a tensor.
        mask: number of a tensor [samples · mask_heads · mask_queries, keys], or None.
        heads: number of heads. The output has the channels of all of them, one after another.
        channels: of a head, in query and key.
        queries: rows of a sample in query and output.
        keys: rows of a sample in key and value.
        query_first, key_first, value_first: the first channel of head 0.
        query_stride, key_stride, value_stride: channels from a head to the next.
        scale: factor of the scores.
        causal: whether query i attends only to keys 0 to i.
        tokens_first: whether rows are token · samples + sample in place of sample · tokens + token; not in the mask.
        mask_heads, mask_queries: heads and queries of a sample in the mask: all, or 1 for all of them.
        cosine, sine: float32 [keys, channels] or None, factors of a rotary embedding: query and key x of a token are
            replaced by x * cosine + [-second half of x, first half of x] * sine.
        shared: successive heads of the query that share a head of key and value.
    """

    key: int
    value: int
    mask: int | None
    heads: int
    channels: int
    queries: int
    keys: int
    query_first: int
    query_stride: int
    key_first: int
    key_stride: int
    value_first: int
    value_stride: int
    scale: float
    causal: bool
    tokens_first: bool = False
    mask_heads: int = 1
    mask_queries: int = 1
    shared: int = 1
    cosine: Tensor | None = None
    sine: Tensor | None = None

    FUNCTION = "sparing_attention"
    NUMBERS = ("input", "key", "value", "mask")

    def check(self, shapes: Sequence[Shape]) -> None:
        target = shapes[self.output]
        for name in ("heads", "channels", "queries", "keys", "shared"):
            require_integer(name, getattr(self, name))
        fits = isinstance(target, Matrix) and target.rows.factor % self.queries == 0 == target.channels % self.heads
        require(fits, f"{self.heads} heads and {self.queries} rows per sample do not fit the output, {target}")
        require(self.heads % self.shared == 0, f"{self.heads} heads cannot share keys in groups of {self.shared}")
        assert isinstance(target, Matrix)
        key_rows = Count(target.rows.factor // self.queries * self.keys, target.rows.per_sample)
        of_value = target.channels // self.heads
        rows_of = {"query": target.rows, "key": key_rows, "value": key_rows}
        for name, number, first, stride in self._operands():
            shape = shapes[number]
            check_shape(f"the {name}", shape, Matrix(rows_of[name], shape.channels))
            require_integer("the first channel", first, 0)
            require_integer("the channels from head to head", stride)
            heads = self.heads if name == "query" else self.heads // self.shared
            last = first + (heads - 1) * stride + (of_value if name == "value" else self.channels)
            require(last <= shape.channels, f"the heads of the {name} end at channel {last} of {shape}")
        for name, all_of_them in (("mask_heads", self.heads), ("mask_queries", self.queries)):
            number = getattr(self, name)
            fits = type(number) is int and number in (1, all_of_them)
            require(fits, f"{name} must be 1 or {all_of_them}, got {number!r:.100}")
        if self.mask is not None:
            rows = target.rows.factor // self.queries * self.mask_heads * self.mask_queries
            check_shape("the mask", shapes[self.mask], Matrix(Count(rows, target.rows.per_sample), self.keys))
        require(type(self.scale) is float and math.isfinite(self.scale), f"scale must be a number, got {self.scale!r}")
        require((self.cosine is None) == (self.sine is None), "a rotary embedding needs cosine and sine")
        for name, table in (("cosine", self.cosine), ("sine", self.sine)):
            if table is not None:
                require_tensor(name, table, torch.float32, self.keys, self.channels)
                fits = self.channels % 2 == 0 and self.queries == self.keys
                require(fits, "a rotary embedding needs an even number of channels, and as many queries as keys")
        for name in ("causal", "tokens_first"):
            require(type(getattr(self, name)) is bool, f"{name} must be true or false, got {getattr(self, name)!r}")

    def arguments(self) -> tuple[Any, ...]:
        numbers, firsts, strides = zip(*(operand[1:] for operand in self._operands()), strict=True)
        sizes = ctypes.c_int64 * 3
        return (
            *numbers, -1 if self.mask is None else self.mask, self.output, sizes(*firsts), sizes(*strides), self.heads,
            self.channels, self.queries, self.keys, self.scale, int(self.causal),
            int(self.tokens_first), self.mask_heads, self.mask_queries, self.shared,
            *(None if table is None else table.data_ptr() for table in (self.cosine, self.sine)),
        )  # fmt: skip

    def _operands(self) -> list[tuple[str, int, int, int]]:
        """Return name, tensor, first channel, and channels from head to head, of query, key and value."""
        return [
            ("query", self.input, self.query_first, self.query_stride),
            ("key", self.key, self.key_first, self.key_stride),
            ("value", self.value, self.value_first, self.value_stride),
        ]
