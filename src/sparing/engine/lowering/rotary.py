"""Rotary position embeddings: x * cosine + [-second half of x, first half of x] * sine."""

from typing import Any

import torch
from torch import Tensor, fx

from sparing.engine.lowering.lowering import Cut, Lowering, arguments_of, sizes
from sparing.engine.nodes import packet_of

aten = torch.ops.aten


def find_rotation(low: Lowering, node: Any) -> tuple[fx.Node, Tensor, Tensor] | None:
    """Return x, cosine and sine, if a node is a rotary embedding with constant angles."""
    if packet_of(node) is not aten.add or node.kwargs:
        return None
    terms = [_factors(low, term) for term in node.args]
    for one, other in (terms, terms[::-1]):
        if one is not None and other is not None and _is_turned(other[0], one[0]):
            return one[0], low.constant(one[1]), low.constant(other[1])
    return None


def tables(x: fx.Node, *factors: Tensor) -> tuple[int | None, list[Tensor]]:
    """Return the dimension of the tokens, or None if all are alike, and each factor as [tokens, channels]."""
    rank, channels = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if any(not 0 < factor.dim() <= rank or factor.shape[-1] != channels for factor in factors):
        raise Cut("rotary embedding whose angles have another shape")
    factors = tuple(factor.reshape((1,) * (rank - factor.dim()) + factor.shape) for factor in factors)
    long = sorted({dim for factor in factors for dim, size in enumerate(factor.shape[:-1]) if size > 1})
    if len(long) > 1:
        raise Cut("rotary embedding whose angles do not depend on the token alone")
    tokens = sizes(x)[long[0]].factor if long else 1
    if any(factor.numel() not in (channels, tokens * channels) for factor in factors):
        raise Cut("rotary embedding that repeats a token")
    rows = [factor.reshape(-1, channels).expand(tokens, channels).contiguous() for factor in factors]
    return (long[0] if long else None), rows


def _factors(low: Lowering, node: Any) -> tuple[Any, Any] | None:
    """Return x and the constant of a product."""
    if packet_of(node) is not aten.mul:
        return None
    one, other = node.args if node.args[1] in low.constants else node.args[::-1]
    return (one, other) if other in low.constants else None


def _is_turned(node: Any, x: Any) -> bool:
    """Return whether a node is [-second half, first half] of the channels of x."""
    last = x.meta["val"].dim() - 1
    half = x.meta["val"].shape[-1] // 2
    if packet_of(node) is not aten.cat or len(node.args[0]) != 2 or arguments_of(node)["dim"] not in (-1, last):
        return False
    second, first = node.args[0]
    if packet_of(second) is not aten.neg:
        return False
    for part, begin in ((second.args[0], half), (first, 0)):
        if packet_of(part) is not aten.slice or part.args[0] is not x or part.meta["val"].shape[-1] != half:
            return False
        given = arguments_of(part)
        if given["dim"] % (last + 1) != last or (given["start"] or 0) != begin or given["step"] != 1:
            return False
    return bool(2 * half == x.meta["val"].shape[-1])
