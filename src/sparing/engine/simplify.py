"""Simplify a graph of torch.export before lowering."""

import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from sparing.engine.formulas import join_attention
from sparing.engine.nodes import add_call, add_mask, exchanges, packet_of

aten = torch.ops.aten

IDENTITIES = (
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.dropout,
    aten.feature_dropout, aten.alpha_dropout, aten.to, aten._to_copy, aten.type_as, aten.expand, aten.slice,
)  # fmt: skip
"""Operators without effect if dtype and shape stay the same. The traced model is in evaluation mode."""

RESHAPES = (aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as, aten.ravel)
PERMUTES = (aten.mT, aten.t, aten.numpy_T, aten.swapaxes, aten.swapdims, aten.movedim)
"""Views that are written as reshape and as permute."""

CHECKS = ("_assert", "sym_constrain_range")
"""Operators that check sizes. The engine checks its inputs itself."""

# Formulas: "x", "number", another constant, or an operator and its arguments.
SILU = (aten.mul, "x", (aten.sigmoid, "x"))
_CUBIC = (aten.mul, 0.044715, (aten.pow, "x", 3.0))
_TANH = (aten.tanh, (aten.mul, math.sqrt(2 / math.pi), (aten.add, "x", _CUBIC)))
GELU_TANH = (aten.mul, (aten.mul, 0.5, "x"), (aten.add, 1.0, _TANH))
RMS_NORMS = tuple(
    (aten.mul, "x", (aten.rsqrt, (aten.add, (aten.mean, square, [-1], True), "number")))
    for square in ((aten.pow, "x", 2.0), (aten.mul, "x", "x"))
)


def simplify(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> None:
    """Remove operators without effect, and write others in one form.

    Args:
        graph: the graph, which is modified.
        constants: value of each node that does not depend on the inputs.
    """
    _replace_operators(graph)
    _replace_scalars(graph, constants)
    _match_formulas(graph)
    join_attention(graph)
    _add_masks(graph)
    _put_batch_first(graph)


def _replace_operators(graph: fx.Graph) -> None:
    """Remove operators without effect, and write others in one form."""
    for node in list(graph.nodes):
        target, packet = node.target, packet_of(node)
        if packet is not None and str(packet).removeprefix("aten.").startswith(CHECKS) and not node.users:
            graph.erase_node(node)
        elif packet in IDENTITIES and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif target is operator.getitem and (replacement := _item(graph, node)) is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
        elif target is aten.repeat_interleave.self_int and len(node.args) == 3:
            _repeat(graph, node)
        elif packet in (*RESHAPES, *PERMUTES, aten.expand_as):
            _write_view(node)


def _write_view(node: Any) -> None:
    """Write a view as reshape, expand or permute, with numbers alone: −1 for a size that depends on the batch."""
    x, packet = node.args[0], packet_of(node)
    value, own = node.meta["val"], x.meta["val"]
    if packet in PERMUTES:
        dims = list(range(own.dim()))
        numbered = torch.empty_strided([1] * len(dims), dims)  # a view of it has the order of dimensions as strides
        target, sizes = aten.permute.default, list(node.target(numbered, *node.args[1:], **node.kwargs).stride())
    elif packet is aten.expand_as:
        given = (*[None] * (value.dim() - own.dim()), *own.shape)
        target = aten.expand.default
        sizes = [-1 if str(size) == str(old) else size for size, old in zip(value.shape, given, strict=True)]
    else:
        target, sizes = aten.reshape.default, [size if type(size) is int else -1 for size in value.shape]
    if all(type(size) is int for size in sizes) and (target is aten.expand.default or sizes.count(-1) <= 1):
        node.target, node.args, node.kwargs = target, (x, sizes), {}


def _repeat(graph: fx.Graph, node: Any) -> None:
    """Write repeat_interleave as views, which attention to shared keys understands."""
    x, repeats, dim = node.args
    value = x.meta["val"]
    dim %= value.dim()
    if type(value.shape[dim]) is not int or type(repeats) is not int:
        return
    with graph.inserting_before(node):
        wide = add_call(graph, aten.unsqueeze.default, x, dim + 1)
        wide = add_call(graph, aten.expand.default, wide, [-1] * (dim + 1) + [repeats] + [-1] * (value.dim() - dim - 1))
        node.replace_all_uses_with(add_call(graph, aten.flatten.using_ints, wide, dim, dim + 1))
    graph.erase_node(node)


def _replace_scalars(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> None:
    """Replace constant tensors of one element by numbers."""

    def number(argument: Any, other: Any) -> float | None:
        """Return the number, if the operator gives the same with it for `other`."""
        tensor = constants.get(argument)
        if tensor is None or tensor.numel() != 1 or other in constants or not isinstance(other, fx.Node):
            return None
        value = other.meta["val"]
        alike = tensor.is_floating_point() and value.dtype == torch.float32 and tensor.dim() <= value.dim()
        return float(tensor) if alike and tensor.dtype in (torch.float32, torch.float64) else None

    for node in list(graph.nodes):
        packet = packet_of(node)
        if packet in (aten.mul, aten.add, aten.div) and len(node.args) == 2 and not node.kwargs:
            x, other = node.args
            if (value := number(other, x)) is not None:
                node.args = (x, value)
            elif packet is not aten.div and (value := number(x, other)) is not None:
                node.args = (other, value)
        elif node.target is aten.where.self:
            mask, x, other = node.args
            if (value := number(other, x)) is not None:
                node.target, node.args = aten.where.ScalarOther, (mask, x, value)
            elif (value := number(x, other)) is not None:
                node.target, node.args = aten.where.ScalarSelf, (mask, value, other)


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0]
    value, own = getattr(source, "meta", {}).get("val"), node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return False
    if "dropout" in str(node.target) and node.args[2]:
        return False
    same = (value.dtype, value.device, value.dim()) == (own.dtype, own.device, own.dim())
    return same and all(str(one) == str(other) for one, other in zip(value.shape, own.shape, strict=True))


def _item(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return another form of one of several results of an operator, or None."""
    source: Any = node.args[0]
    packet, index = packet_of(source), cast(int, node.args[1])
    with graph.inserting_before(node):
        if packet is aten._native_batch_norm_legit_no_training and index == 0:
            args = (*source.args[:5], False, *source.args[5:], False)
            replacement = graph.call_function(aten.batch_norm.default, args)
        elif packet in (aten.split, aten.split_with_sizes, aten.chunk):
            dim = source.args[2] if len(source.args) > 2 else 0
            parts = [value.shape[dim] for value in source.meta["val"]]
            if not all(type(size) is int for size in parts):
                return None
            first = sum(parts[:index])
            replacement = graph.call_function(aten.slice.Tensor, (source.args[0], dim, first, first + parts[index]))
        elif packet is aten.unbind:
            replacement = graph.call_function(aten.select.int, (source.args[0], *(source.args[1:] or (0,)), index))
        else:
            return None
    replacement.meta["val"] = node.meta["val"]
    return replacement


def _put_batch_first(graph: fx.Graph) -> None:
    """Undo the exchange of batch and tokens in nn.MultiheadAttention, which the engine would have to copy.

    linear(x.transpose(0, 1)) = linear(x).transpose(0, 1)
    linear(x.permute(2, 0, 1, 3).view(T * N, E)).view(T, N, E).transpose(0, 1)
        = linear(x.permute(0, 2, 1, 3).view(N, T, E))                                   x: heads, (N, H, T, D)
    """
    for node in list(graph.nodes):
        if node.target is aten.linear.default and exchanges(node.args[0]):
            x = node.args[0].args[0]
            with graph.inserting_before(node):
                moved = add_call(graph, aten.linear.default, x, *node.args[1:])
                node.replace_all_uses_with(add_call(graph, aten.transpose.int, moved, 0, 1))
        elif exchanges(node):
            chain = [node]
            while len(chain) < 5 and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
                chain.append(chain[-1].args[0])
            views = (aten.view, aten.reshape)
            packets = [views, (aten.linear,), views, (aten.permute,)]
            alike = [packet_of(other) in some for other, some in zip(chain[1:], packets, strict=False)]
            if alike != [True] * 4 or chain[4].args[1] != [2, 0, 1, 3]:
                continue
            split, linear, joined, heads = chain[1:]
            tokens, samples, _ = split.args[1]
            size, *_, number, channels = heads.meta["val"].shape
            kept = split.meta["val"].shape[-1] == linear.meta["val"].shape[-1]
            if str(tokens) != str(size) or joined.meta["val"].shape[-1] != number * channels or not kept:
                continue
            with graph.inserting_before(node):
                turned = add_call(graph, aten.permute.default, heads.args[0], [0, 2, 1, 3])
                rows = add_call(graph, aten.reshape.default, turned, [samples, tokens, number * channels])
                node.replace_all_uses_with(add_call(graph, aten.linear.default, rows, *linear.args[1:]))


def _add_masks(graph: fx.Graph) -> None:
    """Convert boolean masks of attention to float masks, which are added to the scores."""
    added: dict[fx.Node, fx.Node] = {}  # layers share masks
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask is None or mask.meta["val"].dtype != torch.bool:
            continue
        if mask not in added:
            with graph.inserting_before(node):
                added[mask] = add_mask(graph, mask, 0.0, -math.inf)
        node.replace_input_with(mask, added[mask])


def _match_formulas(graph: fx.Graph) -> None:
    """Replace formulas that other libraries write for SiLU, GELU and RMSNorm by the operator of PyTorch."""
    for node in list(graph.nodes):
        for pattern in (SILU, GELU_TANH, *RMS_NORMS):
            found: list[Any] = []
            if not _matches(pattern, node, found):
                continue
            x, *others = dict.fromkeys(one for one in found if isinstance(one, fx.Node))
            if others or not x.meta["val"].is_floating_point():
                continue
            if pattern in RMS_NORMS and type(x.meta["val"].shape[-1]) is not int:  # over the samples
                continue
            with graph.inserting_before(node):
                if pattern in RMS_NORMS:
                    (epsilon,) = (one for one in found if not isinstance(one, fx.Node))
                    replacement = add_call(graph, aten.rms_norm.default, x, [x.meta["val"].shape[-1]], None, epsilon)
                elif pattern is SILU:
                    replacement = add_call(graph, aten.silu.default, x)
                else:
                    replacement = add_call(graph, aten.gelu.default, x, approximate="tanh")
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            break


def _matches(pattern: Any, argument: Any, found: list[Any]) -> bool:
    if pattern in ("x", "number"):
        found.append(argument)
        return isinstance(argument, fx.Node if pattern == "x" else (int, float))
    if isinstance(pattern, float):
        return isinstance(argument, (int, float)) and math.isclose(pattern, argument, rel_tol=1e-6)
    if not isinstance(pattern, tuple):
        return bool(argument == pattern)
    packet, *operands = pattern
    if not isinstance(argument, fx.Node) or packet_of(argument) is not packet:
        return False
    if len(argument.args) != len(operands) or argument.kwargs:
        return False
    orders = [operands, operands[::-1]] if packet in (aten.mul, aten.add) else [operands]
    for order in orders:
        trial: list[Any] = []
        if all(_matches(one, other, trial) for one, other in zip(order, argument.args, strict=True)):
            found += trial
            return True
    return False
