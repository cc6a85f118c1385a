"""Replace attention that is written as products and a softmax by scaled_dot_product_attention."""

import math
import re
from typing import Any

import torch
from torch import fx

from sparing.engine.lowering.lowering import count
from sparing.engine.nodes import add_call, add_mask, exchanges, packet_of

aten = torch.ops.aten

HIDDEN = -1e9
"""A key whose score is filled with this number or a smaller one, or to which it is added, has the weight zero."""


def join_attention(graph: fx.Graph) -> None:
    """Replace softmax(scale * query @ key^T + mask) @ value, if nothing else uses the scores and the weights.

    A boolean mask may replace scores by a number of at most `HIDDEN`. Where that is negative infinity and a query has
    no other keys, the result is zero in place of NaN.
    """
    graph.eliminate_dead_code()
    masks: dict[tuple[Any, tuple[float, float]], fx.Node] = {}  # layers share masks
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            outer = _product(graph, node)
            if outer is None or not _is_softmax(outer[0]) or (inner := _scores(graph, outer[0].args[0])) is None:
                continue
            (weights, value, order), (query, key, mask, numbers, scale) = outer, inner
            if numbers is not None:
                if (mask, numbers) not in masks:
                    masks[mask, numbers] = add_mask(graph, mask, *numbers)
                mask = masks[mask, numbers]
            operands = [query, *_share(graph, query, key, value), *([] if mask is None else [mask])]
            if not _fit(operands, weights) or not math.isfinite(scale):
                continue
            attention, rest = aten.scaled_dot_product_attention.default, {"scale": scale}
            if (joined := _find_joined_heads(node)) is None:
                result = add_call(graph, attention, *operands, **rest)
                node.replace_all_uses_with(_permute(graph, result, order))
                continue
            view, heads = joined
            result = add_call(graph, attention, *(_divide(graph, operand, heads) for operand in operands), **rest)
        with graph.inserting_before(view):
            turned = add_call(graph, aten.permute.default, result, [2, 0, 1, 3])
            view.replace_all_uses_with(add_call(graph, aten.reshape.default, turned, view.args[1]))


def _product(graph: fx.Graph, node: Any) -> tuple[fx.Node, fx.Node, list[int]] | None:
    """Return x, y and an order of dimensions, if a node is (x @ y).permute(order) for x and y of the same rank."""
    packet = packet_of(node)
    if packet in (aten.matmul, aten.bmm):
        x, y = node.args
        rank = node.meta["val"].dim()
        return (x, y, list(range(rank))) if x.meta["val"].dim() == y.meta["val"].dim() == rank else None
    found = re.fullmatch(r"(\w+),(\w+)->(\w+)", node.args[0].replace(" ", "")) if packet is aten.einsum else None
    if found is None:
        return None
    (of_x, of_y, out), (x, y) = found.groups(), node.args[1]
    batch = [letter for letter in out if letter in of_x and letter in of_y]
    others = [letter for letter in out if letter not in batch]
    summed = sorted({*of_x, *of_y} - set(out))
    if len(others) != 2 or len(summed) != 1:
        return None
    if others[0] in of_y:
        x, y, of_x, of_y = y, x, of_y, of_x
    orders = [*batch, others[0], *summed], [*batch, *summed, others[1]]
    if sorted(of_x) != sorted(orders[0]) or sorted(of_y) != sorted(orders[1]):
        return None
    x, y = (
        _permute(graph, operand, [of.index(letter) for letter in order])
        for operand, of, order in zip((x, y), (of_x, of_y), orders, strict=True)
    )
    return x, y, [[*batch, *others].index(letter) for letter in out]


def _permute(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    return node if order == sorted(order) else add_call(graph, aten.permute.default, node, order)


def _is_softmax(node: Any) -> bool:
    """Return whether a node is a softmax over the last dimension, with one user."""
    if packet_of(node) not in (aten.softmax, aten._softmax) or len(node.users) > 1:
        return False
    dim, *others = node.args[1:]
    return dim in (-1, node.meta["val"].dim() - 1) and others in ([], [None], [False], [torch.float32])


def _scores(graph: fx.Graph, node: Any) -> tuple[Any, Any, Any, tuple[float, float] | None, float] | None:
    """Return query, key, mask, what to add where a boolean mask is True and False, and the scale, of scores."""
    if len(node.users) > 1:
        return None
    packet = packet_of(node)
    candidates: list[tuple[Any, Any, tuple[float, float] | None]] = [(node, None, None)]
    if packet is aten.masked_fill and (fill := _hidden(node.args[2])) is not None:
        candidates = [(node.args[0], node.args[1], (fill, 0.0))]
    elif node.target is aten.where.ScalarOther and (fill := _hidden(node.args[2])) is not None:
        candidates = [(node.args[1], node.args[0], (0.0, fill))]
    elif node.target is aten.where.ScalarSelf and (fill := _hidden(node.args[1])) is not None:
        candidates = [(node.args[2], node.args[0], (fill, 0.0))]
    elif packet is aten.add and isinstance(node.args[1], fx.Node) and not node.kwargs:
        candidates = [(node.args[0], node.args[1], None), (node.args[1], node.args[0], None)]
    for scores, mask, numbers in candidates:
        product, scale = _unscale(graph, scores)
        if packet is aten.baddbmm and node.kwargs.get("beta", 1) == 1:
            (mask, *found), scale = node.args, node.kwargs.get("alpha", 1)
        else:
            is_alone = len(scores.users) == len(product.users) == 1
            found = _product(graph, product) if is_alone else None
            if found is None or found[2] != sorted(found[2]):
                continue
        (query, one), (key, other) = _unscale(graph, found[0]), _unscale(graph, found[1])
        return query, add_call(graph, aten.transpose.int, key, -2, -1), mask, numbers, scale * one * other
    return None


def _hidden(number: Any) -> float | None:
    """Return what to add to a score in place of a number that hides it, or None if the number does not.

    Scores are rounded away where they are added to the smallest float32 number, so a query whose keys are all hidden
    gives all of them the same weight.
    """
    if type(number) not in (int, float) or number > HIDDEN:
        return None
    return number if math.isinf(number) else torch.finfo(torch.float32).min


def _unscale(graph: fx.Graph, node: Any) -> tuple[Any, float]:
    """Return x and a number, if a node is their product, or a permutation of it."""
    packet = packet_of(node)
    if packet in (aten.mul, aten.div) and type(node.args[1]) in (int, float) and node.args[1] and not node.kwargs:
        x, scale = _unscale(graph, node.args[0])
        return x, scale * node.args[1] if packet is aten.mul else scale / node.args[1]
    if packet in (aten.transpose, aten.permute):
        x, scale = _unscale(graph, node.args[0])
        return (node if scale == 1 else add_call(graph, node.target, x, *node.args[1:])), scale
    return node, 1.0


def _share(graph: fx.Graph, query: fx.Node, *others: fx.Node) -> list[fx.Node]:
    """Repeat a key and a value of one head, which broadcasting gives to all heads of the query."""
    shapes = [operand.meta["val"].shape for operand in (query, *others)]
    if any(len(shape) != 4 for shape in shapes) or any(shape[1] != 1 for shape in shapes[1:]):
        return list(others)
    return [add_call(graph, aten.expand.default, operand, [-1, shapes[0][1], -1, -1]) for operand in others]


def _fit(operands: list[Any], weights: fx.Node) -> bool:
    """Return whether query, key, value and mask are those of attention with weights of a shape."""
    shapes = [list(map(str, operand.meta["val"].shape)) for operand in operands]
    query, key, value = shapes[:3]
    expected = [*query[:-1], key[-2]]
    return (
        len(query) in (3, 4)
        and query[:-2] == key[:-2] == value[:-2]
        and key[-2] == value[-2]
        and expected == list(map(str, weights.meta["val"].shape))
        and all(type(size) is int for size in weights.meta["val"].shape[1:])  # not between samples
        and all(operand.meta["val"].dtype == torch.float32 for operand in operands)
        and all(len(shape) > 1 for shape in shapes)
    )


def _find_joined_heads(node: fx.Node) -> tuple[Any, int] | None:
    """Return the view that joins heads, and their number: [N * H, T, C] → transpose → view [T * N, H * C].

    nn.MultiheadAttention has heads in the place of samples.
    """
    users: list[Any] = list(node.users)
    if len(users) != 1 or not exchanges(users[0]) or len(users[0].users) != 1:
        return None
    (view,) = users[0].users
    samples, channels = count(node.meta["val"].shape[0]), node.meta["val"].shape[-1]
    is_view = packet_of(view) in (aten.view, aten._unsafe_view, aten.reshape) and view.meta["val"].dim() == 2
    heads, rest = divmod(view.meta["val"].shape[-1], channels)
    fits = is_view and rest == 0 < heads and samples is not None and samples.factor % heads == 0
    return (view, heads) if fits else None


def _divide(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """Divide samples into samples and heads, unless it is a mask for all heads."""
    size, *others = node.meta["val"].shape
    if node.meta["val"].dim() < 3 or size == 1 < heads:
        return node
    return add_call(graph, aten.reshape.default, node, [-1, heads, *others])
