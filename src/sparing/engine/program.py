"""A compiled network as data: steps that run a segment in the engine or one operator in PyTorch.

Values are numbered: first the inputs, then what the steps compute. The arguments of an operator are numbers, strings,
dtypes, None, tuples of these, and

    Ref(3)                value 3
    Constant("fc.weight") a tensor that belongs to the program
    Count(2, True)        two times the batch size
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing.engine.segment import Segment
from sparing.engine.shapes import Count, describe
from sparing.errors import InputError

INTEGER_FUNCTIONS = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem")
}
"""Functions on sizes that torch.export writes besides the operators of PyTorch, and the access to a tuple."""


@dataclass(frozen=True)
class Ref:
    """A value of the program."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A tensor of the program."""

    name: str


@dataclass(frozen=True)
class Input:
    """An input tensor.

    Attributes:
        name: for messages.
        shape: its sizes.
        dtype: its dtype.
    """

    name: str
    shape: tuple[Count, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} of shape {describe(self.shape)} and dtype {self.dtype}"


@dataclass(frozen=True)
class Call:
    """A step that runs one operator in PyTorch.

    Attributes:
        name: such as aten.add.Tensor, or getitem.
        args: positional arguments.
        kwargs: keyword arguments.
        output: number of the value that it computes.
        reason: why it does not run in the engine.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int
    reason: str


@dataclass(frozen=True)
class Run:
    """A step that runs a segment in the engine.

    Attributes:
        segment: the operations.
        inputs: number of the value of each input of the segment.
        outputs: number of the value of each output of the segment.
    """

    segment: Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled network.

    Attributes:
        inputs: the input tensors, values 0, 1, ....
        arguments: name → value of each argument of a call: a `Ref`, or dicts, lists and tuples of them.
        positional: how many of the arguments may be passed by position.
        steps: in the order of execution.
        outputs: what a call returns: `Ref`, `Constant`, `Count`, numbers and None in dicts, lists and tuples.
        constants: the tensors that the steps use in PyTorch.
        weights: number of elements of the dense weights of the convolutions in the engine.

    Raises:
        InputError: a step uses a value before it is computed, or a constant that is not there.
    """

    inputs: tuple[Input, ...]
    arguments: Mapping[str, Any]
    positional: int
    steps: tuple[Call | Run, ...]
    outputs: Any
    constants: Mapping[str, Tensor]
    weights: int
    last_uses: tuple[tuple[int, ...], ...] = field(init=False)
    """Values that no step needs any more after each step."""

    def __post_init__(self) -> None:
        defined = set(range(len(self.inputs)))
        uses: list[set[int]] = []
        for step in self.steps:
            used = set(step.inputs) if isinstance(step, Run) else find_refs((step.args, dict(step.kwargs)))
            if missing := sorted(used - defined):
                raise InputError(f"value {missing[0]} is used before it is computed")
            new = step.outputs if isinstance(step, Run) else (step.output,)
            if isinstance(step, Run) and (
                len(step.inputs) != len(step.segment.inputs) or len(step.outputs) != len(step.segment.outputs)
            ):
                raise InputError("a segment has another number of inputs or outputs than its step")
            if len(set(new)) != len(new) or defined & set(new):
                raise InputError("a value is computed twice")
            defined.update(new)
            uses.append(used)
        if missing := sorted((find_refs(self.outputs) | find_refs(self.arguments)) - defined):
            raise InputError(f"value {missing[0]} is returned, but no step computes it")
        names = find_constants([(s.args, dict(s.kwargs)) for s in self.steps if isinstance(s, Call)])
        if absent := sorted((names | find_constants(self.outputs)) - set(self.constants)):
            raise InputError(f"there is no constant {absent[0]!r}")
        kept = find_refs(self.outputs)
        last_uses: list[tuple[int, ...]] = []
        for step, used in zip(reversed(self.steps), reversed(uses), strict=True):
            new = step.outputs if isinstance(step, Run) else (step.output,)
            last_uses.append(tuple(sorted((used | set(new)) - kept)))
            kept |= used
        object.__setattr__(self, "last_uses", tuple(reversed(last_uses)))

    @property
    def segments(self) -> list[Segment]:
        return [step.segment for step in self.steps if isinstance(step, Run)]

    @property
    def calls(self) -> list[Call]:
        return [step for step in self.steps if isinstance(step, Call)]

    @property
    def nonzero(self) -> int:
        """Number of nonzero weights of the convolutions in the engine."""
        return sum(len(convolution.values) for segment in self.segments for convolution in segment.convolutions)

    def __str__(self) -> str:
        lines = []
        for number, segment in enumerate(self.segments):
            kinds = Counter(type(operation).__name__ for operation in segment.operations)
            nonzero = sum(len(convolution.values) for convolution in segment.convolutions)
            parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            lines.append(f"segment {number}: {parts}; {nonzero:,} nonzero weights")
        sparsity = 1 - self.nonzero / self.weights if self.weights else 0.0
        lines.append(f"engine: {self.nonzero:,} nonzero of {self.weights:,} weights, sparsity {sparsity:.2%}")
        by_reason: dict[str, Counter[str]] = {}
        for call in self.calls:
            by_reason.setdefault(call.reason, Counter())[call.name.removeprefix("aten.")] += 1
        for reason, names in by_reason.items():
            parts = ", ".join(f"{count} {name}" for name, count in names.most_common())
            lines.append(f"PyTorch: {parts} ({reason})")
        return "\n".join(lines)


def find_function(name: str) -> Callable[..., Any]:
    """Return the operator of a name such as aten.add.Tensor, or the function on sizes.

    Raises:
        InputError: there is no such operator.
    """
    if name in INTEGER_FUNCTIONS:
        return INTEGER_FUNCTIONS[name]  # type: ignore[no-any-return]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        function: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"this PyTorch, {torch.__version__}, has no operator {name!r}") from error
    if not isinstance(function, torch._ops.OpOverload) or str(function) != name:
        raise InputError(f"{name!r} is not an operator")
    return function


def resolve(argument: Any, values: Mapping[int, Any], constants: Mapping[str, Tensor], batch: int) -> Any:
    """Replace each `Ref`, `Constant` and `Count` of an argument by what it stands for."""
    if isinstance(argument, Ref):
        return values[argument.index]
    if isinstance(argument, Constant):
        return constants[argument.name]
    if isinstance(argument, Count):
        return argument.at(batch)
    if isinstance(argument, (list, tuple)):
        return type(argument)(resolve(item, values, constants, batch) for item in argument)
    if isinstance(argument, dict):
        return {key: resolve(item, values, constants, batch) for key, item in argument.items()}
    return argument


def find_refs(argument: Any) -> set[int]:
    """Return the numbers of the values in an argument."""
    return {leaf.index for leaf in _leaves(argument) if isinstance(leaf, Ref)}


def find_constants(argument: Any) -> set[str]:
    """Return the names of the constants in an argument."""
    return {leaf.name for leaf in _leaves(argument) if isinstance(leaf, Constant)}


def _leaves(argument: Any) -> list[Any]:
    if isinstance(argument, Mapping):
        argument = list(argument.values())
    if isinstance(argument, (list, tuple)):
        return [leaf for item in argument for leaf in _leaves(item)]
    return [argument]
