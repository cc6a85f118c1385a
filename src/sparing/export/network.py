"""What every exporter starts from, and how it checks where it ended."""

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

# The packages that `pip install 'sparing[export]'` brings, by the name they are imported under.
PACKAGES = {
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "MNN": "mnn",
    "torch_pruning": "torch-pruning",
}

TOLERANCE = 1e-3
"""The largest difference to torch, of the largest output, that an fp32 export may have."""


@dataclass(frozen=True)
class Written:
    """A file that was written and checked.

    Attributes:
        path: the file.
        bytes: its size, with that of a file of weights beside it.
        error: the largest difference of its outputs to torch's on random inputs, as a fraction of
            the largest output.
    """

    path: Path
    bytes: int
    error: float


def require(*names: str) -> None:
    """Refuse to begin what a missing package would stop.

    Raises:
        InputError: one of the packages is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{PACKAGES[name]} is not installed; pip install 'sparing[export]'")


def plain(model: nn.Module) -> nn.Module:
    """A plain copy of the model on the CPU, in evaluation mode, without what learned ranks left dead."""
    small = copy.deepcopy(model)
    # A rank of zero stays as it is: compaction would leave matrices without elements, which runtimes refuse.
    small = compact_(small) if all(row.rank for row in ranks(small).rows) else densify_(small)
    return small.cpu().eval()


def random_inputs(example: Example, batch: int = 2) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword inputs of a batch size.

    A shape gives normal numbers, and so does a floating point tensor; integers, such as tokens, are
    taken from the tensor given. The first dimension is the batch.

    Raises:
        InputError: the example is neither a shape nor tensors.
    """

    def drawn(given: Tensor) -> Tensor:
        if given.dim() == 0:
            raise InputError(
                "an input without dimensions has no batch; give tensors whose first dimension is the batch"
            )
        if given.is_floating_point():
            return torch.randn(batch, *given.shape[1:], dtype=given.dtype)
        repeated = given.detach().cpu().repeat(-(-batch // len(given)), *[1] * (given.dim() - 1))
        return repeated[:batch].contiguous()

    if isinstance(example, Tensor):
        return (drawn(example),), {}
    if isinstance(example, Mapping) and all(isinstance(part, Tensor) for part in example.values()):
        return (), {name: drawn(part) for name, part in example.items()}
    if isinstance(example, Sequence) and all(isinstance(part, Tensor) for part in example):
        return tuple(drawn(part) for part in example if isinstance(part, Tensor)), {}
    if isinstance(example, Sequence) and example and all(isinstance(part, int) and part > 0 for part in example):
        return (torch.randn(batch, *example[1:]),), {}  # type: ignore[arg-type]
    raise InputError(f"example={example!r} is neither a shape such as (1, 3, 224, 224) nor tensors")


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
    """The tensors a model returns, however they are nested."""
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def largest_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest difference, as a fraction of the largest expected output; infinite if shapes differ.

    Examples:
        >>> largest_error([torch.tensor([1.0, -2.0])], [torch.tensor([1.0, -1.0])])
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
    """The largest error, if it may be that large.

    Raises:
        InputError: it is larger than `TOLERANCE`.
    """
    error = largest_error(expected, got)
    if not error <= TOLERANCE:
        raise InputError(
            f"{what} gives other outputs than torch: they differ by {error:.2g} of the largest, where "
            f"{TOLERANCE:g} is allowed; nothing was written"
        )
    return error
