"""Read and add nodes of a graph of torch.export."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def packet_of(node: Any) -> Any:
    """Return the operator of a node without its overload, such as aten.add, or None if it calls no operator."""
    return getattr(getattr(node, "target", None), "overloadpacket", None)


def add_call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call, with the shape of its value."""
    node = graph.call_function(target, args, kwargs)
    given = fx.node.map_arg((args, kwargs), lambda other: other.meta["val"])
    node.meta["val"] = target(*given[0], **given[1])
    return node


def add_mask(graph: fx.Graph, mask: fx.Node, where_true: float, where_false: float) -> fx.Node:
    """Add a float32 mask with one of two numbers for each element of a boolean one."""
    numbers = graph.call_function(aten.where.Scalar, (mask, where_true, where_false))  # of the default dtype
    added = graph.call_function(aten._to_copy.default, (numbers,), {"dtype": torch.float32})
    numbers.meta["val"] = added.meta["val"] = mask.meta["val"].float()
    return added


def exchanges(node: Any) -> bool:
    """Return whether a node exchanges the first two of three dimensions."""
    is_transpose = packet_of(node) is aten.transpose and node.meta["val"].dim() == 3
    return is_transpose and {dim % 3 for dim in node.args[1:]} == {0, 1}
