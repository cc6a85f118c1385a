"""Shared steps of all exporters: prepare the model, make random inputs, check the outputs."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparing.errors import InputError
from sparing.macs import Example
from sparing.rnn import compact_, ranks
from sparing.sparsify import densify_

# Import name → package name, for the packages of the extra `sparing[export]`.
PACKAGES = {
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "MNN": "mnn",
    "torch_pruning": "torch-pruning",
}

TOLERANCE = 1e-3
"""Maximum relative error against PyTorch that is allowed for an fp32 export."""


@dataclass(frozen=True)
class Written:
    """An exported file whose outputs were checked.

    Attributes:
        path: the file.
        bytes: size in bytes, including a separate file of weights.
        error: maximum relative error against PyTorch on random inputs; see `max_relative_error`.
    """

    path: Path
    bytes: int
    error: float


def require(*names: str) -> None:
    """Check that packages are installed.

    Args:
        names: import names, keys of `PACKAGES`.

    Raises:
        InputError: a package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{PACKAGES[name]} is not installed; run pip install 'sparing[export]'")


def plain(model: nn.Module) -> nn.Module:
    """Return a densified copy of the model on the CPU in evaluation mode, with learned ranks compacted."""
    network = copy.deepcopy(model)
    # Do not compact a rank of zero: it would give matrices without elements, which runtimes reject.
    network = compact_(network) if all(row.rank for row in ranks(network).rows) else densify_(network)
    return network.cpu().eval()


def random_inputs(example: Example, batch: int = 2) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return random positional and keyword inputs with a given batch size.

    The first dimension of every input is the batch. A shape or a floating point tensor gives values from a standard
    normal distribution. An integer tensor, such as tokens, is repeated along the batch.

    Args:
        example: the shape of one input, batch first; or tensors: one, a tuple, or a mapping of keyword arguments.
        batch: batch size.

    Raises:
        InputError: the example is neither a shape nor tensors, or a tensor has no dimensions.
    """

    def random_like(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            raise InputError("an input tensor has no dimensions; the first dimension must be the batch")
        if tensor.is_floating_point():
            return torch.randn(batch, *tensor.shape[1:], dtype=tensor.dtype)
        repeated = tensor.detach().cpu().repeat(-(-batch // len(tensor)), *[1] * (tensor.dim() - 1))
        return repeated[:batch].contiguous()

    if isinstance(example, Tensor):
        return (random_like(example),), {}
    if isinstance(example, Mapping) and all(isinstance(item, Tensor) for item in example.values()):
        return (), {name: random_like(item) for name, item in example.items()}
    if isinstance(example, Sequence) and all(isinstance(item, Tensor) for item in example):
        return tuple(random_like(item) for item in example if isinstance(item, Tensor)), {}
    if isinstance(example, Sequence) and example and all(isinstance(item, int) and item > 0 for item in example):
        return (torch.randn(batch, *example[1:]),), {}  # type: ignore[arg-type]
    raise InputError(f"example must be a shape such as (1, 3, 224, 224) or tensors, got {example!r}")


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
    """Run a model. Return its output tensors as a flat list."""
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def max_relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """Return the maximum relative error over all outputs.

        max |got − expected| / max |expected|    per output tensor; the result is the maximum over the tensors

    Args:
        expected: reference outputs, tensors or arrays.
        got: outputs to compare.

    Returns:
        The error; infinity if the number of outputs or a shape differs, NaN if an output has NaN.

    Examples:
        >>> max_relative_error([torch.tensor([1.0, -2.0])], [torch.tensor([1.0, -1.0])])
        0.5
    """
    worst = 0.0
    if len(expected) != len(got):
        return float("inf")
    for one, other in zip(expected, got, strict=True):
        one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            scale = max(float(one.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((one - other).abs().max()) / scale
            worst = difference if difference != difference else max(worst, difference)
    return worst


def check(what: str, expected: Sequence[Any], got: Sequence[Any]) -> float:
    """Check outputs against reference outputs. Return the maximum relative error.

    Args:
        what: what computed the outputs, for the error message.
        expected: reference outputs, tensors or arrays.
        got: outputs to check.

    Raises:
        InputError: the error is larger than `TOLERANCE`.
    """
    error = max_relative_error(expected, got)
    if not error <= TOLERANCE:
        raise InputError(
            f"{what}: output mismatch with PyTorch: maximum relative error {error:.2g}, allowed {TOLERANCE:g}; "
            "no file was written"
        )
    return error
