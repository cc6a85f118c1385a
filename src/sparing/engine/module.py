"""The compiled network as a module, and `compile`."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from sparing.engine.graph import build
from sparing.engine.library import library
from sparing.engine.plan import Plans
from sparing.engine.program import Input, Program, Ref, Run, find_constants, find_function, resolve
from sparing.errors import InputError, SparsityWarning, UnpicklableError
from sparing.export.inputs import Example, Inputs, find_inputs
from sparing.export.network import check_values, check_weights, max_relative_error, outputs, plain, tolerance

MOST_THREADS = 1024
"""Maximum number of threads, as in kernels/plan.cpp."""


def compile(model: nn.Module, example: Example | Inputs, threads: int | None = None) -> "Engine":
    """Compile a sparse model for inference on the CPU, and check its outputs.

    The time of convolutions and linear layers follows the number of their nonzero weights. What the engine does not
    have, such as a recurrent layer, runs in PyTorch; `Engine.summary` lists it. The batch size is dynamic if possible.
    All other sizes are those of the example. The first call with another batch size than that of the example takes
    longer, because it makes a plan. The engine computes in float32.

    Args:
        model: a sparsified or plain model on the CPU; it is not modified.
        example: the shape of one input, batch first, such as `(1, 3, 224, 224)`; or tensors: one, a tuple, or a
            mapping of keyword arguments, whose values may be nested tuples, lists and mappings; or the result of
            `find_inputs`.
        threads: number of threads; None is `torch.get_num_threads()`.

    Returns:
        A module that takes the arguments of the model and returns its outputs.

    Raises:
        InputError: there is no C++ compiler; the model is not on the CPU, or cannot be traced, for example because its
            control flow depends on the data; the outputs differ from the model.

    Warns:
        SparsityWarning: the batch size is fixed; the parameters were converted to float32.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fast = sparing.engine.compile(model, (1, 3, 16, 16))
        >>> fast(torch.randn(5, 3, 16, 16)).shape
        torch.Size([5, 8, 14, 14])
    """
    threads = check_threads(threads)
    if not isinstance(model, nn.Module) or isinstance(model, Engine):
        raise InputError(f"the engine compiles a torch.nn.Module that is not compiled yet, got {type(model).__name__}")
    library()
    check_values(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise InputError(f"{name!r} is on {tensor.device}, but the engine runs on the CPU; call model.cpu() first")
    network = plain(model)
    check_weights(network)
    tensors = (*network.parameters(), *network.buffers())
    if others := sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32}):
        warnings.warn(
            f"the engine computes in float32: parameters in {' and '.join(others)} are converted, and so must be the "
            "inputs",
            SparsityWarning,
            stacklevel=2,
        )
        network = network.float()
        if not isinstance(example, Inputs):
            example = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, example)
    inputs = find_inputs(network, example)
    program, inputs, returns = build(network, inputs)
    engine = Engine(program, threads, returns)
    for batch in (3,) if inputs.fixed else (3, 1):
        _compare(network, engine, inputs, batch)
    batch = _find_batch(program.inputs, tree_leaves((inputs.args, inputs.kwargs)))
    for plans in engine._plans:
        if plans is not None:
            plans.prepare(batch)
    return engine


def _compare(network: nn.Module, engine: "Engine", inputs: Inputs, batch: int) -> None:
    """Raise InputError unless the engine has the outputs of the network."""
    args, kwargs = inputs.sample(batch)
    try:
        expected = outputs(network, args, kwargs)
    except Exception:
        if batch > 1:
            raise
        return  # some networks need two samples, for example for the statistics of a batch
    got = outputs(engine, args, kwargs)
    shapes = [[list(tensor.shape) for tensor in each] for each in (expected, got)]
    where = f"the compiled network does not have the outputs of the model at batch size {batch}"
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{where}: output shapes {shapes[1]}, expected {shapes[0]}; use squeeze(dim) in place of squeeze(), so "
            "that shapes do not depend on whether a size is 1"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in expected):
        raise InputError(f"the model returns NaN or infinite values for random inputs at batch size {batch}")
    error = max_relative_error(expected, got)
    if not error <= tolerance(network):
        raise InputError(
            f"{where}: maximum relative error {error:.2g}, allowed {tolerance(network):g}; the model must give the "
            "same outputs in each call, and nn.TransformerEncoder with a mask of padding requires "
            "enable_nested_tensor=False"
        )


class Engine(nn.Module):
    """A compiled network, for inference on the CPU. Outputs never require gradients.

    Attributes:
        program: the network as data.
        threads: number of threads.
        returns: leaves and structure of the outputs, as for `tree_unflatten`; None if it is that of the program, of
            dicts, lists and tuples.
    """

    def __init__(self, program: Program, threads: int, returns: tuple[list[Any], Any] | None = None):
        super().__init__()
        self.program, self.threads = program, threads
        self.returns = returns
        self._functions: list[Callable[..., Any] | None] = [
            None if isinstance(step, Run) else find_function(step.name) for step in program.steps
        ]
        shared = any(function is not None for function in self._functions)
        self._plans = [
            Plans(step.segment, threads, shared) if isinstance(step, Run) else None for step in program.steps
        ]
        self.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Args:
            args, kwargs: the arguments of the model, as in the example of `compile`.

        Raises:
            InputError: the inputs have another shape or dtype than the network was compiled for.
        """
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            raise InputError("a compiled network cannot be traced or compiled; call it outside of the function that is")
        run = _untraced_run() if "torch._dynamo" in sys.modules else Engine._run
        return run(self, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self.program
        tensors = self._bind(args, kwargs)
        batch = _find_batch(program.inputs, tensors)
        values: dict[int, Any] = dict(enumerate(tensors))
        steps = zip(program.steps, self._functions, self._plans, program.last_uses, strict=True)
        for step, function, plans, last_uses in steps:
            if isinstance(step, Run):
                assert plans is not None
                results = plans.run([values[number] for number in step.inputs], batch)
                values.update(zip(step.outputs, results, strict=True))
            else:
                assert function is not None
                resolved = resolve([step.args, dict(step.kwargs)], values, program.constants, batch)
                values[step.output] = function(*resolved[0], **resolved[1])
            for number in last_uses:
                del values[number]
        leaves, structure = self.returns or (program.outputs, None)
        copies = {name: tensor.clone() for name, tensor in program.constants.items()} if find_constants(leaves) else {}
        returned = resolve(leaves, values, copies, batch)
        return returned if structure is None else tree_unflatten(returned, structure)

    def summary(self) -> str:
        """Return the segments of the engine, and the operators that run in PyTorch with the reasons.

        Examples:
            >>> model = nn.Sequential(nn.Linear(64, 10), nn.Softmax(1))
            >>> sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, begin=0, end=0))
            >>> print(sparing.engine.compile(model, (1, 64)).summary())
            segment 0: 1 Convolution; 64 nonzero weights
            engine: 64 nonzero of 640 weights, sparsity 90.00%
            PyTorch: 1 softmax.int (no such operation in the engine)
        """
        return str(self.program)

    def __str__(self) -> str:
        return self.summary()

    def extra_repr(self) -> str:
        return self.summary()

    def train(self, mode: bool = True) -> "Engine":
        if mode:
            raise InputError("the engine is for inference: train the model, and compile it again")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> "Engine":
        if requires_grad:
            raise InputError("the engine is for inference: train the model, and compile it again")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Engine":
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise InputError(f"the engine runs in float32 on the CPU, it cannot go to {moved.dtype} on {moved.device}")
        return self

    def __copy__(self) -> "Engine":
        return Engine(self.program, self.threads, self.returns)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        return copy.copy(self)  # the program does not change

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnpicklableError("a compiled network cannot be pickled; write it with sparing.engine.save")

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the input tensors of a call in the order of the program."""
        arguments, positional = self.program.arguments, self.program.positional
        names = list(arguments)
        if len(args) > positional:
            raise InputError(f"at most {positional} positional arguments ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise InputError(f"argument {twice[0]!r} is given twice")
        given |= kwargs
        if given.keys() != arguments.keys():
            raise InputError(f"compiled for the arguments {', '.join(names)}, got {', '.join(given) or 'none'}")
        found: dict[int, Tensor] = {}
        for name, expected in arguments.items():
            found.update(_match(name, expected, given[name]))
        return [found[index] for index in range(len(self.program.inputs))]


@cache
def _untraced_run() -> Callable[..., Any]:
    """Return `Engine._run` for processes with torch.compile, which would trace each function that it calls.

    The error in `forward` keeps torch.compile from tracing that function alone.
    """
    run: Callable[..., Any] = torch.compiler.disable(Engine._run)
    return run


def check_threads(threads: int | None) -> int:
    """Return the number of threads.

    Raises:
        InputError: it is not an integer in [1, 1024].
    """
    if threads is None:
        return torch.get_num_threads()
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads must be an integer in [1, {MOST_THREADS}] or None, got {threads!r}")
    return threads


def _match(name: str, expected: Any, given: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield number and tensor of each input in an argument."""
    if isinstance(expected, Ref):
        if not isinstance(given, Tensor):
            raise InputError(f"input {name} must be a tensor, got {type(given).__name__}")
        yield expected.index, given
        return
    kind = Mapping if isinstance(expected, Mapping) else (list, tuple)
    keys = list(expected) if isinstance(expected, Mapping) else list(range(len(expected)))
    if not isinstance(given, kind) or list(given if isinstance(given, Mapping) else range(len(given))) != keys:
        raise InputError(f"input {name} must have the structure that the network was compiled for: {expected!r}")
    for key in keys:
        yield from _match(f"{name}[{key!r}]", expected[key], given[key])


def _find_batch(inputs: tuple[Input, ...], tensors: list[Tensor]) -> int:
    """Check the inputs. Return the batch size; 1 if it is fixed."""
    batch: int | None = None
    for expected, tensor in zip(inputs, tensors, strict=True):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested:
            kind = f"{'nested' if tensor.is_nested else tensor.layout} on {tensor.device}"
            raise InputError(f"input {expected.name} must be a dense tensor on the CPU, got {kind}")
        fits = tensor.dtype == expected.dtype and tensor.dim() == len(expected.shape)
        for size, count in zip(tensor.shape, expected.shape, strict=False):
            if not count.per_sample:
                fits = fits and size == count.factor
            else:
                fits = fits and size > 0 and size % count.factor == 0 and batch in (None, size // count.factor)
                batch = size // count.factor if batch is None else batch
        if not fits:
            known = "" if batch is None else f" (batch {batch})"
            raise InputError(f"compiled for input {expected}{known}, got {list(tensor.shape)} and {tensor.dtype}")
    return 1 if batch is None else batch
