"""Replace operators that change tensors in place, such as relu_, in a graph of torch.export."""

import torch
from torch import fx

from sparing.engine.nodes import packet_of

aten = torch.ops.aten

FRESH = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.linear, aten.batch_norm, aten.layer_norm, aten.group_norm, aten.matmul,
    aten.add, aten.sub, aten.mul, aten.div, aten.cat, aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d,
    aten.relu, aten.relu6, aten.hardtanh, aten.silu, aten.hardswish, aten.hardsigmoid, aten.sigmoid, aten.tanh,
    aten.elu, aten.leaky_relu, aten.gelu, aten.clamp, aten.clamp_min, aten.mean,
}  # fmt: skip
"""Operators whose result has memory of its own."""


def functionalize(graph: fx.Graph) -> bool:
    """Replace operators that change tensors in place by those that return a new one.

    x.relu_()  →  y = relu(x), and y in place of x in everything that comes later

    `ExportedProgram.run_decompositions` does this for any graph, but takes three times as long as the trace itself.

    Args:
        graph: the graph, which is modified.

    Returns:
        Whether none is left. One is left if a view could see the change: the changed tensor is the result of one of
        `FRESH`, and so is all that has been made of it.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(target, torch._ops.HigherOrderOperator):
                return False
            continue
        if not target._schema.is_mutable:
            continue
        x = node.args[0] if node.args else None
        twin = _twin(target)
        if twin is None or not isinstance(x, fx.Node) or packet_of(x) not in FRESH:
            return False
        if any(packet_of(user) not in FRESH for user in x.users if places[user] < places[node]):
            return False
        node.target = twin
        for user in list(x.users):
            if places[user] > places[node]:
                user.replace_input_with(x, node)
    return True


def _twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the operator that computes the same, but returns a new tensor; None if there is none."""
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    twin: torch._ops.OpOverload | None = getattr(packet, overload, None) if packet in FRESH else None
    return twin
