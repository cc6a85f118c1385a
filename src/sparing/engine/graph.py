"""From a model to a `Program`: trace, simplify, lower, divide into segments, fuse.

1. torch.export traces the model. Operators that change tensors in place are replaced.
2. Operators without effect are removed, and those that depend on weights alone are computed.
3. `Lowering` finds the operators that run in the engine, and the segment of each.
4. Segments without a convolution have nothing to gain, and go back to PyTorch.
5. In each segment, batch norm, sums and activations are fused into the convolution before them.
"""

import inspect
import math
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map, tree_unflatten

from sparing.engine.lower import Lowering, count, sizes
from sparing.engine.plan import Affine, Binary, Convolution, Count, Depthwise, Images, Operation, Port, Segment, Shape
from sparing.engine.program import INTEGER_FUNCTIONS, Call, Constant, Input, Program, Ref, Run, find_constants
from sparing.errors import InputError
from sparing.export.inputs import Inputs
from sparing.export.network import first_line
from sparing.export.onnx import trace

aten = torch.ops.aten

NOTHING_SPARSE = "no convolution or linear layer next to it"
FOLDED = 2**20
"""Maximum number of elements of a constant that is computed when compiling, unless it is as small as its inputs."""

IDENTITIES = (
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.dropout,
    aten.feature_dropout, aten.alpha_dropout, aten.to, aten._to_copy, aten.expand,
)  # fmt: skip
"""Operators without effect if dtype and shape stay the same. The traced model is in evaluation mode."""

CHECKS = ("_assert", "sym_constrain_range")
"""Operators that check sizes. The engine checks its inputs itself."""


def build(network: nn.Module, inputs: Inputs) -> tuple[Program, Inputs, tuple[list[Any], Any]]:
    """Return the program of a network.

    Args:
        network: a densified float32 model in evaluation mode, on the CPU.
        inputs: its inputs, from `find_inputs`.

    Returns:
        The program; the inputs, with a fixed batch size if it cannot be dynamic; the leaves of the outputs, and their
        structure for `tree_unflatten`.

    Raises:
        InputError: torch.export cannot trace the model, for example because its control flow depends on the data.
    """
    with torch.no_grad():  # otherwise torch.export writes the mode into the graph
        traced, inputs = trace(network, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exported = traced.run_decompositions({})
            except Exception as error:  # torch raises exceptions of many types
                raise InputError(f"the model cannot be traced: {first_line(error)}") from error
        program = _Builder(exported).program(network, inputs)
    structure = exported.call_spec.out_spec
    try:
        plain = plain_structure(tree_unflatten(program.outputs, structure))
    except Exception as error:  # containers of users raise exceptions of many types
        raise InputError(f"the outputs of the model are in a container that is not supported: {error}") from error
    return replace(program, outputs=plain), inputs, (program.outputs, structure)


class _Builder:
    """State of `build`.

    Attributes:
        graph: the graph, which is modified.
        constants: value of each node that does not depend on the inputs.
        names: name of each constant.
        counts: nodes that are a number or a multiple of the batch size.
    """

    def __init__(self, exported: "torch.export.ExportedProgram"):
        module = exported.graph_module
        _inline_regions(module)
        self.graph = module.graph
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.placeholders: list[fx.Node] = []
        self._read_signature(exported, module)
        _simplify(self.graph)
        _match_formulas(self.graph)
        self._fold_constants()
        self.graph.eliminate_dead_code()
        self.counts = {node: size for node in self.graph.nodes if (size := count(node.meta.get("val"))) is not None}

    def _read_signature(self, exported: "torch.export.ExportedProgram", module: fx.GraphModule) -> None:
        """Sort the placeholders into constants and inputs."""
        signature = exported.graph_signature
        for spec in signature.output_specs:
            if spec.kind.name == "BUFFER_MUTATION":
                raise InputError(
                    f"the model changes its buffer {spec.target!r} in each call, but the engine has no state; "
                    "return the new value as an output"
                )
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        tensors = {**exported.state_dict, **exported.constants}
        for node, spec in zip(nodes, signature.input_specs, strict=True):
            if spec.kind.name == "USER_INPUT":
                self.placeholders.append(node)
            elif spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                self._set_constant(node, tensors[str(spec.target)], str(spec.target))
            else:
                raise InputError(f"the model uses {spec.target!r}, which is no tensor and cannot be compiled")
        for node in self.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                name = node.target.name()
                raise InputError(f"the model has control flow ({name}), which the engine does not support")
            if node.op == "get_attr" and isinstance(value := getattr(module, str(node.target), None), Tensor):
                self._set_constant(node, value, str(node.target))
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        kept = [
            argument
            for argument, spec in zip(output.args[0], signature.output_specs, strict=True)
            if spec.kind.name == "USER_OUTPUT"  # others are inputs that the model changed in place
        ]
        output.args = (tuple(kept),)

    def _set_constant(self, node: fx.Node, tensor: Tensor, name: str) -> None:
        self.constants[node] = tensor.detach()
        taken = set(self.names.values())
        while name in taken:
            name += "_"
        self.names[node] = name

    def _fold_constants(self) -> None:
        """Compute the operators that depend on weights alone."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            value, random = node.meta.get("val"), torch.Tag.nondeterministic_seeded in node.target.tags
            if random or not isinstance(value, Tensor) or any(n not in self.constants for n in node.all_input_nodes):
                continue
            if any(not isinstance(size, int) for size in value.shape):
                continue
            largest = max((self.constants[n].numel() for n in node.all_input_nodes), default=0)
            if value.numel() <= max(largest, FOLDED):
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.constants.__getitem__)
                self._set_constant(node, node.target(*args, **kwargs).contiguous().clone(), node.name)

    def _dependencies(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that must be computed before a node in PyTorch."""
        return [n for n in node.all_input_nodes if n not in self.constants and n not in self.counts]

    def program(self, network: nn.Module, inputs: Inputs) -> Program:
        lowering, needed = self._lower()
        numbers = {node: index for index, node in enumerate(self.placeholders)}
        steps: list[Call | Run] = []

        def number(node: fx.Node) -> int:
            return numbers.setdefault(node, len(numbers))

        def convert(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                if argument in self.counts:
                    size = self.counts[argument]
                    return size if size.per_sample else size.factor
                return Constant(self.names[argument]) if argument in self.constants else Ref(number(argument))
            if isinstance(argument, (list, tuple)):
                return [convert(item) for item in argument]
            return argument

        dense, outside = 0, self._outside(lowering, needed)
        for level in range(max((lowering.levels[node] for node in needed), default=0) + 1):
            here = [node for node in needed if lowering.levels[node] == level]
            if lowered := [node for node in here if node in lowering.lowered]:
                segment, sources, targets = _make_segment(lowering, lowered, outside)
                steps.append(Run(segment, tuple(map(number, sources)), tuple(map(number, targets))))
                dense += sum(lowering.dense.get(node, 0) for node in lowered)
            for node in here:
                if node not in lowering.lowered and node.op != "placeholder":
                    name = _name(node)
                    args = tuple(convert(argument) for argument in node.args)
                    kwargs = {key: convert(argument) for key, argument in node.kwargs.items()}
                    steps.append(Call(name, args, kwargs, number(node), lowering.reasons[node]))
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        leaves = [convert(leaf) for leaf in output.args[0]]
        used = find_constants([leaves, *([step.args, step.kwargs] for step in steps if isinstance(step, Call))])
        arguments, positional = _call_arguments(network, inputs)
        return Program(
            inputs=tuple(self._inputs(inputs.names(network))),
            arguments=arguments,
            positional=positional,
            steps=tuple(steps),
            outputs=leaves,
            constants={name: self.constants[node] for node, name in self.names.items() if name in used},
            weights=dense,
        )

    def _inputs(self, names: Sequence[str]) -> Iterator[Input]:
        for node, name in zip(self.placeholders, names, strict=True):
            value = node.meta["val"]
            shape = [count(size) for size in value.shape]
            yield Input(name, tuple(size for size in shape if size is not None), value.dtype)

    def _lower(self) -> tuple[Lowering, list[fx.Node]]:
        """Lower the graph. Return the nodes that the outputs need, too, without constants and sizes."""
        excluded: dict[fx.Node, str] = {}
        while True:
            lowering = Lowering(self.constants, excluded)
            for node in self.graph.nodes:
                if node in self.constants or node in self.counts or node.op == "output":
                    continue
                if node.op == "placeholder":
                    lowering.levels[node] = 0
                else:
                    lowering.add(node, self._dependencies(node))
            needed = self._needed(lowering)
            without = _without_convolution(lowering, [node for node in needed if node in lowering.lowered])
            if not without:
                return lowering, needed
            excluded |= dict.fromkeys(without, NOTHING_SPARSE)

    def _needed(self, lowering: Lowering) -> list[fx.Node]:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        found: set[fx.Node] = set()
        todo = self._dependencies(output)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                lowered = lowering.lowered.get(node)
                todo += self._dependencies(node) if lowered is None else [read for read, _ in lowered.reads.values()]
        return [node for node in self.graph.nodes if node in found]

    def _outside(self, lowering: Lowering, needed: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the nodes whose values are read outside of their segment."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        found = set(self._dependencies(output))
        for node in needed:
            lowered = lowering.lowered.get(node)
            if lowered is None:
                found.update(self._dependencies(node))
            else:
                found.update(read for read, _ in lowered.reads.values() if lowering.levels[read] != lowered.level)
        return found


def _make_segment(
    lowering: Lowering, nodes: Sequence[fx.Node], outside: set[fx.Node]
) -> tuple[Segment, list[fx.Node], list[fx.Node]]:
    """Return the segment of the nodes of one level, and the nodes that are its inputs and outputs."""
    lowered = [lowering.lowered[node] for node in nodes]
    operations = [operation for one in lowered for operation in one.operations]
    written = {operation.output for operation in operations}
    reads = {tensor: read for one in lowered for tensor, read in one.reads.items() if tensor not in written}
    targets = [node for node in nodes if node in outside]
    inputs = [_port(lowering, tensor, node, axis) for tensor, (node, axis) in reads.items()]
    places = [lowering.lowered[node].place for node in targets]
    outputs = [_port(lowering, place.tensor, node, place.axis) for node, place in zip(targets, places, strict=True)]
    operations = fuse(operations, {port.tensor for port in outputs}, lowering.shapes)
    segment = _renumber(lowering.shapes, operations, inputs, outputs)
    return segment, [node for node, _ in reads.values()], targets


def _port(lowering: Lowering, tensor: int, node: fx.Node, axis: int) -> Port:
    return Port(tensor, axis != 1 or not isinstance(lowering.shapes[tensor], Images), sizes(node))


def _renumber(
    shapes: Sequence[Shape], operations: Sequence[Operation], inputs: Sequence[Port], outputs: Sequence[Port]
) -> Segment:
    """Return a segment with the tensors numbered from 0."""
    used = [port.tensor for port in (*inputs, *outputs)]
    used += [tensor for operation in operations for tensor in (*operation.reads, operation.output)]
    numbers = {tensor: number for number, tensor in enumerate(sorted(set(used)))}

    def renumber(operation: Operation) -> Operation:
        names = ("output", *operation.NUMBERS)
        return replace(operation, **{name: numbers.get(getattr(operation, name)) for name in names})  # type: ignore[arg-type]

    return Segment(
        tuple(shapes[tensor] for tensor in sorted(numbers)),
        tuple(renumber(operation) for operation in operations),
        tuple(replace(port, tensor=numbers[port.tensor]) for port in inputs),
        tuple(replace(port, tensor=numbers[port.tensor]) for port in outputs),
    )


def _without_convolution(lowering: Lowering, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes that are not connected to a convolution within their segment."""
    parents = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parents[node] is not node:
            node = parents[node]
        return node

    for node in nodes:
        for read, _ in lowering.lowered[node].reads.values():
            if read in parents and lowering.levels[read] == lowering.levels[node]:
                parents[root(read)] = root(node)
    sparse = {
        root(node)
        for node in nodes
        if any(isinstance(operation, Convolution) for operation in lowering.lowered[node].operations)
    }
    return [node for node in nodes if root(node) not in sparse]


def fuse(operations: Sequence[Operation], outputs: set[int], shapes: Sequence[Shape]) -> list[Operation]:
    """Fuse batch norm, sums and activations into the operation before them.

    Args:
        operations: in the order of execution.
        outputs: tensors that are read outside.
        shapes: shape of each tensor.
    """
    fused = list(operations)
    while (pair := _find_pair(fused, outputs, shapes)) is not None:
        before, after, operation = pair
        fused[after] = operation
        del fused[before]
    return fused


def _find_pair(
    operations: Sequence[Operation], outputs: set[int], shapes: Sequence[Shape]
) -> tuple[int, int, Operation] | None:
    """Return the positions of two operations that are one operation, and that one; or None."""
    uses = Counter(tensor for operation in operations for tensor in operation.reads)
    producers = {operation.output: position for position, operation in enumerate(operations)}
    for after, operation in enumerate(operations):
        if not isinstance(operation, (Affine, Binary)):
            continue
        tensors = [t for t in set(operation.reads) if t in producers and uses[t] == 1 and t not in outputs]
        for tensor in sorted(tensors, key=producers.__getitem__, reverse=True):
            before = operations[producers[tensor]]
            if isinstance(operation, Affine):
                merged = _with_affine(before, operation)
            else:
                merged = _with_sum(before, operation, shapes)
            if merged is not None:
                return producers[tensor], after, merged
    return None


def _with_affine(before: Operation, after: Affine) -> Operation | None:
    if getattr(before, "activation", None) != "identity":
        return None
    changes: dict[str, Any] = {"output": after.output, "activation": after.activation}
    scale, bias = after.scale, after.bias
    if scale is None and bias is None:
        return replace(before, **changes)
    if isinstance(before, Affine):
        changes["scale"] = before.scale if scale is None else scale if before.scale is None else before.scale * scale
    elif isinstance(before, Depthwise):
        changes["weight"] = before.weight if scale is None else before.weight * scale[:, None, None]
    elif isinstance(before, Convolution) and (before.residual is None or scale is None):
        if scale is not None:
            changes |= _scaled(before, scale)
    else:
        return None
    own = before.bias
    if own is not None and scale is not None:
        own = own * scale
    changes["bias"] = own if bias is None else bias if own is None else own + bias
    return replace(before, **changes)


def _scaled(convolution: Convolution, scale: Tensor) -> dict[str, Tensor]:
    """Return the weights of a convolution times a factor per filter. A factor of zero removes weights."""
    counts = convolution.starts.diff().long()
    values = convolution.values * scale.repeat_interleave(counts)
    kept = values != 0
    filters = torch.arange(len(counts)).repeat_interleave(counts)[kept]
    starts = torch.bincount(filters, minlength=len(counts)).cumsum(0).int()
    return {
        "values": values[kept],
        "columns": convolution.columns[kept],
        "starts": torch.cat([starts.new_zeros(1), starts]),
    }


def _with_sum(before: Operation, after: Binary, shapes: Sequence[Shape]) -> Operation | None:
    if not isinstance(before, Convolution) or before.activation != "identity" or before.residual is not None:
        return None
    (residual,) = set(after.reads) - {before.output}
    if after.kind != "add" or shapes[residual] != shapes[before.output]:
        return None
    return replace(before, output=after.output, residual=residual, activation=after.activation)


# Before lowering.


def _inline_regions(module: fx.GraphModule) -> None:
    """Replace the regions `with torch.no_grad()` and `with torch.autocast(enabled=False)` by what is in them."""
    graph = module.graph
    first = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # position of the region in the arguments
    while regions := [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in first
    ]:
        for node in regions:
            name = node.target.name()  # type: ignore[union-attr]
            if name == "wrap_with_autocast" and node.args[2]:
                raise InputError("the model uses autocast, but the engine computes in float32; remove the autocast")
            position = first[name]
            region: Any
            region, *arguments = node.args[position:]
            inner = getattr(module, str(region.target)).graph
            places = [n for n in inner.nodes if n.op == "placeholder"]
            with graph.inserting_before(node):
                results: Any = graph.graph_copy(inner, dict(zip(places, arguments, strict=True)))
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
            if not region.users:
                graph.erase_node(region)


def _simplify(graph: fx.Graph) -> None:
    """Remove operators without effect, and write others in one form."""
    for node in list(graph.nodes):
        target, packet = node.target, getattr(node.target, "overloadpacket", None)
        if packet is not None and str(packet).removeprefix("aten.").startswith(CHECKS) and not node.users:
            graph.erase_node(node)
        elif packet in IDENTITIES and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif target is operator.getitem and (replacement := _item(graph, node)) is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


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
    packet, index = getattr(source.target, "overloadpacket", None), cast(int, node.args[1])
    with graph.inserting_before(node):
        if packet is aten._native_batch_norm_legit_no_training and index == 0:
            args = (*source.args[:5], False, *source.args[5:], False)
            replacement = graph.call_function(aten.batch_norm.default, args)
        elif packet is aten.max_pool2d_with_indices and index == 0:
            replacement = graph.call_function(aten.max_pool2d.default, source.args)
        elif packet in (aten.split, aten.split_with_sizes, aten.chunk):
            dim = source.args[2] if len(source.args) > 2 else 0
            parts = [value.shape[dim] for value in source.meta["val"]]
            if not all(type(size) is int for size in parts):
                return None
            first = sum(parts[:index])
            replacement = graph.call_function(aten.slice.Tensor, (source.args[0], dim, first, first + parts[index]))
        else:
            return None
    replacement.meta["val"] = node.meta["val"]
    return replacement


# Formulas of activations: "x", a number, or an operator and its arguments.
SILU = (aten.mul, "x", (aten.sigmoid, "x"))
_CUBIC = (aten.mul, 0.044715, (aten.pow, "x", 3.0))
_TANH = (aten.tanh, (aten.mul, math.sqrt(2 / math.pi), (aten.add, "x", _CUBIC)))
GELU_TANH = (aten.mul, (aten.mul, 0.5, "x"), (aten.add, 1.0, _TANH))


def _match_formulas(graph: fx.Graph) -> None:
    """Replace formulas that other libraries write for SiLU and GELU by the operator of PyTorch."""
    for node in list(graph.nodes):
        for pattern, name in ((SILU, "silu"), (GELU_TANH, "gelu")):
            found: list[fx.Node] = []
            if _matches(pattern, node, found) and len(set(found)) == 1:
                with graph.inserting_before(node):
                    if name == "silu":
                        replacement = graph.call_function(aten.silu.default, (found[0],))
                    else:
                        replacement = graph.call_function(aten.gelu.default, (found[0],), {"approximate": "tanh"})
                replacement.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
                break


def _matches(pattern: Any, argument: Any, found: list[fx.Node]) -> bool:
    if pattern == "x":
        found.append(argument)
        return isinstance(argument, fx.Node)
    if isinstance(pattern, float):
        return isinstance(argument, (int, float)) and math.isclose(pattern, argument, rel_tol=1e-6)
    packet, *operands = pattern
    if not isinstance(argument, fx.Node) or getattr(argument.target, "overloadpacket", None) is not packet:
        return False
    if len(argument.args) != len(operands) or argument.kwargs:
        return False
    orders = [operands, operands[::-1]] if packet in (aten.mul, aten.add) else [operands]
    for order in orders:
        trial: list[fx.Node] = []
        if all(_matches(one, other, trial) for one, other in zip(order, argument.args, strict=True)):
            found += trial
            return True
    return False


# Interface of the program.


def _call_arguments(network: nn.Module, inputs: Inputs) -> tuple[dict[str, Any], int]:
    """Return the argument of each name, and how many of them may be passed by position."""
    count_of_inputs = iter(range(len(inputs.batch_dims)))
    args, kwargs = tree_map(lambda _: Ref(next(count_of_inputs)), (inputs.args, inputs.kwargs))
    parameters = list(inspect.signature(network.forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [named[index] if index < len(named) else f"argument {index}" for index in range(len(args))]
    arguments = dict(zip(names, args, strict=True))
    for name in named[len(args) :]:
        if name not in kwargs:
            break
        arguments[name] = kwargs[name]
    positional = len(arguments)
    return arguments | kwargs, positional


def plain_structure(tree: Any) -> Any:
    """Return a structure of dicts, lists and tuples in place of named tuples, data classes and other mappings."""
    if isinstance(tree, (Ref, Constant, Count)):
        return tree
    if isinstance(tree, Mapping):
        return {str(key): plain_structure(value) for key, value in tree.items()}
    if is_dataclass(tree):
        return {field.name: plain_structure(getattr(tree, field.name)) for field in fields(tree)}
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(plain_structure(item) for item in tree)
    return tree


def _name(node: fx.Node) -> str:
    """Return the name of an operator, for `find_function`."""
    if isinstance(node.target, torch._ops.OpOverload):
        # A view of a tensor of the engine may need a copy, which `reshape` makes.
        name = str(node.target)
        return "aten.reshape.default" if name in ("aten.view.default", "aten._unsafe_view.default") else name
    for name, function in INTEGER_FUNCTIONS.items():
        if node.target is function:
            return name
    raise InputError(f"the model computes sizes with {node.target}, which is not supported")
