"""From a model to a `Program`: trace, simplify, lower, divide into segments, fuse.

1. torch.export traces the model. Operators that change tensors in place are replaced.
2. Operators without effect are removed, and those that depend on weights alone are computed.
3. `Lowering` finds the operators that run in the engine, and the segment of each.
4. Segments without a convolution have nothing to gain, and go back to PyTorch.
5. In each segment, batch norm, sums and activations are fused into the convolution before them.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map, tree_unflatten

from sparing.engine.functional import functionalize
from sparing.engine.fuse import fuse
from sparing.engine.lowering.lowering import Lowering, count, sizes
from sparing.engine.lowering.rules import RULES
from sparing.engine.operations import Convolution, Operation
from sparing.engine.program import INTEGER_FUNCTIONS, Call, Constant, Input, Program, Ref, Run, find_constants
from sparing.engine.segment import Port, Segment
from sparing.engine.shapes import Count, Images, Shape
from sparing.engine.simplify import simplify
from sparing.errors import InputError
from sparing.export.inputs import Inputs
from sparing.export.network import root_cause
from sparing.export.onnx import trace

aten = torch.ops.aten

NOTHING_SPARSE = "no convolution or linear layer next to it"
FOLDED = 2**20
"""Maximum number of elements of a constant that is computed when compiling, unless it is as small as its inputs."""


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
        if not functionalize(traced.graph_module.graph):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    traced = traced.run_decompositions({})
                except Exception as error:  # torch raises exceptions of many types
                    raise InputError(f"the model cannot be traced: {root_cause(error)}") from error
        program = _Builder(traced).program(network, inputs)
    structure = traced.call_spec.out_spec
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
        self.graph = exported.graph_module.graph
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.placeholders: list[fx.Node] = []
        self._read_signature(exported)
        self._fold_constants()
        simplify(self.graph, self.constants)
        self._fold_constants()  # those that were added
        self.graph.eliminate_dead_code()
        self.counts = {node: size for node in self.graph.nodes if (size := count(node.meta.get("val"))) is not None}

    def _read_signature(self, exported: "torch.export.ExportedProgram") -> None:
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
                raise InputError(f"the model uses {spec.target!r}, which is not a tensor and cannot be compiled")
        for node in self.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                name = node.target.name()
                raise InputError(f"the model has control flow ({name}), which the engine does not support")
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
            if node in self.constants or not isinstance(node.target, torch._ops.OpOverload):
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
            lowering = Lowering(RULES, self.constants, excluded)
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
    # The first read of a tensor counts. Later ones may be of a view of the input, such as the pooling of one pixel.
    reads = {tensor: read for one in reversed(lowered) for tensor, read in one.reads.items() if tensor not in written}
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
