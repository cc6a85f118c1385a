"""Inputs of a network to export: the dimension of the batch, random samples, and names.

The first dimension of an input is usually the batch, but not always: the state of an LSTM is (layers, batch, hidden).
A choice of dimensions is right if a batch of two gives the outputs of its two samples:

    f(x₁ ‖ x₂) = f(x₁) ‖ f(x₂)    ‖ joins tensors along their batch dimension

The choices are tried on the network until one is right.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sparing.errors import InputError, SparsityWarning
from sparing.export.network import max_relative_error, outputs, root_cause, tolerance

Example = Sequence[int] | Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The shape of one input, batch first; or tensors: one, a tuple, or a mapping of keyword arguments, also nested."""

CHOICES = 100
"""Maximum number of choices of batch dimensions to try, with and without tensors that have no batch."""

BatchDims = tuple[int | None, ...]


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network, and which of their dimensions is the batch.

    Attributes:
        args: positional arguments: tensors, also in nested tuples, lists and mappings.
        kwargs: keyword arguments.
        batch_dims: batch dimension of each tensor, in the order of `tree_leaves((args, kwargs))`; None for a tensor
            without one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_dims: BatchDims

    @property
    def fixed(self) -> bool:
        """Whether the batch size is that of the example."""
        return all(dim is None for dim in self.batch_dims)

    def with_fixed_batch(self) -> "Inputs":
        """Return the same inputs without batch dimensions."""
        return replace(self, batch_dims=(None,) * len(self.batch_dims))

    def sample(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return random positional and keyword arguments.

        Floating-point values are from a standard normal distribution. An integer tensor, such as tokens, is repeated
        along the batch.

        Args:
            batch: batch size; not used if the batch size is fixed.
        """
        tensors, structure = tree_flatten((self.args, self.kwargs))
        drawn = [_random_like(tensor, dim, batch) for tensor, dim in zip(tensors, self.batch_dims, strict=True)]
        return tree_unflatten(drawn, structure)  # type: ignore[no-any-return]

    def names(self, network: nn.Module) -> list[str]:
        """Return a name for each tensor: the keyword, or the parameter of the `forward` of the network.

        Tensors of a nested input also have their position or key in the name: state_0, state_1.
        """
        arguments = self.kwargs or inspect.signature(network.forward).bind(*self.args).arguments
        return _unique(["_".join(path) for path, _ in _paths(arguments)], set(), "_in")


def find_inputs(network: nn.Module, example: Example | Inputs) -> Inputs:
    """Return the inputs of a network, with the dimension of the batch found by running the network.

    Args:
        network: a densified model in evaluation mode, on the CPU.
        example: as for `sparing.export.onnx.save`; `Inputs` are returned as they are.

    Raises:
        InputError: the example is neither a shape nor tensors; the network does not run on it.

    Warns:
        SparsityWarning: no choice of batch dimensions is right, so that the batch size is fixed.
    """
    if isinstance(example, Inputs):
        return example
    args, kwargs = _arguments(network, example)
    shapes = [tuple(tensor.shape) for tensor in tree_leaves((args, kwargs))]
    inputs = Inputs(args, kwargs, (None,) * len(shapes))
    network = copy.deepcopy(network)  # a forward pass may change buffers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first: list[BatchDims] = [(0,) * len(shapes)] if all(0 not in shape[:1] and shape for shape in shapes) else []
        for dims in chain(first, islice(_choices(shapes, ()), CHOICES)):
            if _is_batch(network, replace(inputs, batch_dims=dims)):
                return replace(inputs, batch_dims=dims)
        # The samples of a batch may depend on each other, for example if it is normalized by its own statistics.
        for dims in first:
            if _failure(network, replace(inputs, batch_dims=dims)) is None:
                return replace(inputs, batch_dims=dims)
        for dims in islice(_choices(shapes, (None,)), CHOICES):
            if _is_batch(network, replace(inputs, batch_dims=dims)):
                return replace(inputs, batch_dims=dims)
        failure = _failure(network, inputs)
    if failure is not None:
        raise InputError(f"the model does not run on inputs of shape {shapes}: {failure}")
    warnings.warn(
        f"the batch size is fixed at that of the example: no dimension of the inputs of shape {shapes} is a batch",
        SparsityWarning,
        stacklevel=3,
    )
    return inputs


def output_names(result: Any, taken: Sequence[str]) -> list[str]:
    """Return a name for each tensor that a network returns.

    The keys of a mapping and the fields of a named tuple or data class are names. Other outputs are named output0,
    output1, .... A name of an input gets the suffix `_out`.

    Args:
        result: what the network returns.
        taken: names of the inputs.

    Raises:
        InputError: the network returns another value than tensors and None.

    Examples:
        >>> output_names({"y": torch.ones(1), "state": (torch.ones(1), torch.ones(1))}, ["x"])
        ['y', 'state_0', 'state_1']
        >>> output_names((torch.ones(1), None, torch.ones(1)), ["x"])
        ['output0', 'output1']
    """
    names: list[str] = []
    for path, leaf in _paths(result):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise InputError(f"the model must return tensors, got {leaf!r} of type {type(leaf).__name__}")
        named = path and not path[0].isdigit()
        names.append("_".join(path) if named else f"output{len(names)}")
    return _unique(names, set(taken), "_out")


def _arguments(network: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example as positional and keyword arguments, on the CPU."""
    if isinstance(example, Sequence) and example and all(type(size) is int and size > 0 for size in example):
        dtypes = [parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()]
        try:
            example = torch.empty(tuple(example), dtype=dtypes[0] if dtypes else torch.get_default_dtype())
        except (RuntimeError, TypeError) as error:
            raise InputError(f"example {example!r:.200} is too large for the memory") from error
    if isinstance(example, Tensor):
        example = (example,)
    keywords = isinstance(example, Mapping)
    tensors, structure = tree_flatten(dict(example) if keywords else example)
    is_container = keywords or (isinstance(example, Sequence) and not isinstance(example, str))
    if not is_container or not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise InputError(f"example must be a shape such as (1, 3, 224, 224) or tensors, got {example!r}")
    arguments = tree_unflatten([tensor.detach().cpu() for tensor in tensors], structure)
    return ((), arguments) if keywords else (tuple(arguments), {})


def _random_like(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    if dim is not None:
        tensor = tensor.index_select(dim, torch.arange(batch) % tensor.shape[dim])
    return torch.randn(tensor.shape, dtype=tensor.dtype) if tensor.is_floating_point() else tensor.clone()


def _choices(shapes: Sequence[tuple[int, ...]], without: tuple[None, ...]) -> Iterator[BatchDims]:
    """Yield choices of batch dimensions, all of one size. Try the same dimension for tensors of the same shape first.

    The first tensor is not compared with the others: one frame has the shape of the state if the sizes are equal.

    Args:
        shapes: shape of each tensor.
        without: (None,) to allow tensors without a batch.
    """
    by_shape = [(index == 0, shape) for index, shape in enumerate(shapes)]
    by_tensor = [(index, shape) for index, shape in enumerate(shapes)]
    for keys in (by_shape, by_tensor):
        different = list(dict.fromkeys(keys))
        for size in dict.fromkeys(size for shape in shapes for size in shape if size):
            allowed = [
                [dim for dim, other in enumerate(shape) if other == size] + list(without) for _, shape in different
            ]
            for dims in product(*allowed):
                by_key = dict(zip(different, dims, strict=True))
                yield tuple(by_key[key] for key in keys)


def _is_batch(network: nn.Module, inputs: Inputs) -> bool:
    """Return whether a batch of two gives the outputs of its two samples."""
    if inputs.fixed:
        return False
    tensors, structure = tree_flatten(inputs.sample(2))
    found = False
    try:
        both = outputs(network, *tree_unflatten(tensors, structure))
        samples = []
        for index in range(2):
            parts = [
                tensor if dim is None else tensor.narrow(dim, index, 1)
                for tensor, dim in zip(tensors, inputs.batch_dims, strict=True)
            ]
            samples.append(outputs(network, *tree_unflatten(parts, structure)))
        joined = []
        for whole, one, other in zip(both, *samples, strict=True):
            dims = [dim for dim, size in enumerate(one.shape) if whole.shape[dim] != size]
            joined.append(torch.cat([one, other], dims[0]) if dims else one)
            found = found or bool(dims)
    except Exception:  # a model raises exceptions of many types
        return False
    return found and max_relative_error(both, joined) <= tolerance(network)


def _failure(network: nn.Module, inputs: Inputs) -> str | None:
    """Return why the network does not run on a sample of two, or None."""
    try:
        outputs(network, *inputs.sample(2))
    except Exception as error:  # a model raises exceptions of many types
        return root_cause(error)
    return None


def _paths(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each leaf of a nested structure with the keys that lead to it."""
    items: Any
    if isinstance(tree, Mapping):
        items = tree.items()
    elif is_dataclass(tree):
        items = [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = zip(tree._fields, tree, strict=True)
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        yield (), tree
        return
    for key, value in items:
        for path, leaf in _paths(value):
            yield (str(key), *path), leaf


def _unique(names: Sequence[str], taken: set[str], suffix: str) -> list[str]:
    """Append a suffix to names that are taken or repeated."""
    unique = []
    for name in names:
        while name in taken:
            name += suffix
        taken.add(name)
        unique.append(name)
    return unique
