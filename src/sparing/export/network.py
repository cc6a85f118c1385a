"""Shared steps of all exporters: prepare the model and check the outputs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from sparing.errors import InputError, first_line
from sparing.export.runtimes import Process, UnavailableError
from sparing.rnn import compact_, ranks
from sparing.sparsify import densify_

if TYPE_CHECKING:
    from sparing.export.inputs import Inputs

# Import name → package name, for the packages of the extra `sparing[export]`.
PACKAGES = {
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "MNN": "mnn",
    "torch_pruning": "torch-pruning",
}

NAMES = {"onnxruntime": "ONNX Runtime", "openvino_fp32": "OpenVINO", "mnn": "MNN"}
"""Key of `RUNTIMES` → name in error messages."""

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
    """Return a densified copy of the model on the CPU in evaluation mode, with learned ranks compacted.

    Raises:
        InputError: a parameter or buffer has no values.
    """
    check_values(model)
    network = copy.deepcopy(model)
    # Do not compact a rank of zero: it would give matrices without elements, which runtimes reject.
    network = compact_(network) if all(row.rank for row in ranks(network).rows) else densify_(network)
    return network.cpu().eval()


def check_values(model: nn.Module) -> None:
    """Check that every parameter and buffer has values.

    Raises:
        InputError: one is on the meta device or not initialized.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{name!r} is not initialized and has no values to export; run the model once first")
        if tensor.is_meta:
            raise InputError(f"{name!r} is on the meta device and has no values to export; load its values first")


def check_weights(network: nn.Module) -> None:
    """Check that the zeros of every parameter can be found.

    Raises:
        InputError: a parameter is a tensor subclass, such as the quantized tensors of torchao.
    """
    for name, parameter in network.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            kind = type(parameter).__name__
            raise InputError(f"{name!r} is of type {kind}, whose zeros are not known; call this before quantization")


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Run a model on copies of its inputs. Return its output tensors as a flat list."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # a model may change its inputs in place
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def arrays(network: nn.Module, inputs: Any) -> list[Any]:
    """Return the inputs of a network, nested tensors, as a flat list of NumPy arrays.

    Raises:
        InputError: NumPy has no such dtype.
    """
    try:
        return [tensor.numpy() for tensor in tree_leaves(inputs)]
    except TypeError as error:
        reason = "NumPy, which passes the inputs to them, has no such dtype"
        raise refusal("runtimes other than PyTorch cannot run the network", network, reason) from error


def max_relative_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """Return the maximum relative error over all outputs.

        max |got − expected| / max |expected|    per output tensor; the result is the maximum over the tensors

    Equal elements differ by 0, infinite ones too, and the largest finite element is the scale.

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
            scale = max(float(one.abs().nan_to_num(0, 0).max()), torch.finfo(torch.float32).tiny)
            difference = float((one - other).abs().masked_fill(one == other, 0).max()) / scale  # inf − inf is NaN
            worst = difference if difference != difference else max(worst, difference)
    return worst


def tolerance(network: nn.Module) -> float:
    """Return the allowed maximum relative error: `TOLERANCE`, or 13 ε of the lowest precision of the parameters.

    It is about 0.1 in bf16 and 0.013 in fp16.
    """
    return max([TOLERANCE, *(13 * torch.finfo(dtype).eps for dtype in _dtypes(network))])


def check(what: str, expected: Sequence[Any], got: Sequence[Any], allowed: float = TOLERANCE) -> float:
    """Check outputs against reference outputs. Return the maximum relative error.

    Args:
        what: what computed the outputs, for the error message.
        expected: reference outputs, tensors or arrays.
        got: outputs to check.
        allowed: maximum relative error that is allowed.

    Raises:
        InputError: the error is larger, or an expected output has NaN.
    """
    if any(bool(torch.as_tensor(each).isnan().any()) for each in expected):
        raise InputError(f"{what}: the model returns NaN for random inputs; no file was written")
    error = max_relative_error(expected, got)
    if not error <= allowed:
        raise InputError(
            f"{what}: output mismatch with PyTorch: maximum relative error {error:.2g}, allowed {allowed:g}; "
            "no file was written"
        )
    return error


def check_file(path: str | Path, file: Path, runtime: str, network: nn.Module, inputs: "Inputs") -> float:
    """Check the outputs of an exported file on random inputs. Return the maximum relative error.

    The runtime loads the file in another process, because a runtime may crash on a network that it does not support.

    Args:
        path: name of the file in error messages.
        file: the file to load.
        runtime: a key of `RUNTIMES`.
        network: the exported network.
        inputs: its inputs.

    Raises:
        InputError: the runtime cannot run the file; the outputs differ.
    """
    name = NAMES[runtime]
    args, kwargs = inputs.sample(3)
    given = arrays(network, (args, kwargs))
    try:
        with Process(runtime, file, threads=1) as process:
            got = process.run(given)
    except UnavailableError as error:
        raise refusal(f"{name} cannot run the network", network, error) from error
    what = f"{path} in {name}{_other_dtypes(network)}"
    return check(what, outputs(network, args, kwargs), got, tolerance(network))


def refusal(what: str, network: nn.Module, reason: object) -> InputError:
    """Return an error about a network that a runtime does not support."""
    return InputError(f"{what}{_other_dtypes(network)}: {' '.join(str(reason).split())}")


def _other_dtypes(network: nn.Module) -> str:
    """Return the dtypes other than float32 and what to do, for an error message."""
    others = sorted(str(dtype) for dtype in _dtypes(network) - {torch.float32})
    return f" in {' and '.join(others)} (call model.float() before the export)" if others else ""


def _dtypes(network: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()}


def root_cause(error: BaseException) -> str:
    """Return the first line of the message of the error that caused this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
