"""Sparse convolutions for PyTorch on CPUs, compiled for the machine they run on.

    y[f, p] = b[f] + r[f, p] + Σ_j w[f, j] · x[o[f, j] + p]        then max(·, 0) if a ReLU follows

f is the filter, p the output pixel, b the bias, r an optional residual. The sum runs over the nonzero weights w of the
filter only. The image x is copied with its padding, once per kernel column, so that output pixel p reads input pixel
p + o. One offset o per weight therefore encodes channel, row and column. A tile of neighboring pixels stays in
registers while the loop runs over the weights of a filter. Batch normalization is folded into the weights, and the
residual and the ReLU are applied in the same pass.

A dense convolution is faster at low sparsity, so each convolution is timed. Requires a C++ compiler with OpenMP, GCC or
Clang: `c++`, or the one named by the environment variable CXX.

Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, for 1×1; Park et al., "Faster CNNs with Direct Sparse
Convolutions and Guided Pruning", ICLR 2017, for the offsets.
"""

import ctypes
import operator
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sparing.errors import InputError
from sparing.export.inputs import Example, Inputs, find_inputs
from sparing.export.network import Written, check, first_line, outputs, plain, tolerance
from sparing.export.onnx import trace
from sparing.files import atomic_write

aten = torch.ops.aten

# Default arguments of aten.conv2d: x, weight, bias, stride, padding, dilation, groups.
CONV2D = (None, None, None, [1, 1], [0, 0], [1, 1], 1)

LANES, TILE = 16, 7 * 16  # pixels per vector and per tile, as in native.cpp
CACHE = 64 * 1024  # maximum bytes of one tile of a block of channels: the L1 cache and a part of the L2 cache


@dataclass(frozen=True)
class Choice:
    """Measurement of one convolution.

    Attributes:
        name: name of the weight.
        sparsity: sparsity of the weight, in [0, 1].
        dense_seconds: minimum seconds of the dense convolution; None if it was not timed.
        sparse_seconds: minimum seconds of the sparse convolution; None if it was not timed.
        sparse: whether the network uses the sparse convolution.
    """

    name: str
    sparsity: float
    dense_seconds: float | None
    sparse_seconds: float | None
    sparse: bool


def accelerate(
    model: nn.Module,
    example: Example,
    *,
    batch: int = 1,
    least_sparsity: float = 0.5,
    rounds: int = 20,
) -> tuple[fx.GraphModule, list[Choice]]:
    """Return a copy of the model with sparse convolutions where those are faster on this machine.

    Time every Conv2d without groups and with numeric padding, dense and sparse, in alternating order. The inputs have
    the shape that the convolution gets in the model, and the number of threads is `torch.get_num_threads()`. The batch
    size of the returned network is dynamic, if possible, and the image size is fixed.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: as for `sparing.export.onnx.save`, or the result of `find_inputs`.
        batch: batch size to optimize for.
        least_sparsity: minimum sparsity, in [0, 1]; convolutions below it are not timed.
        rounds: number of measurements of each variant.

    Returns:
        The network, for inference on the CPU, and a `Choice` for each Conv2d without groups and with numeric padding.

    Raises:
        InputError: the C++ compiler is missing or fails; torch.export cannot trace the model; the outputs differ from
            the model.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> network, choices = accelerate(model, (1, 3, 16, 16))  # doctest: +SKIP
    """
    library()
    network = plain(model)
    return _accelerate(network, find_inputs(network, example), batch, least_sparsity, rounds)[:2]


def _accelerate(
    network: nn.Module, inputs: Inputs, batch: int = 1, least_sparsity: float = 0.5, rounds: int = 20
) -> tuple[fx.GraphModule, list[Choice], Inputs]:
    program, inputs = trace(network, inputs)
    graph_module: Any = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    choices = []
    for index, node in enumerate(list(graph_module.graph.nodes)):
        if node.target is aten.max_pool2d.default:
            _replace_max_pool(node)
        if node.target is aten.conv2d.default and _is_supported(node):
            choices.append(
                _replace_convolution(graph_module, node, f"convolution{index}", batch, least_sparsity, rounds)
            )
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    args, kwargs = inputs.sample(3)
    expected = outputs(network, args, kwargs)
    check("the accelerated network", expected, outputs(graph_module, args, kwargs), tolerance(network))
    return graph_module, choices, inputs


def save(model: nn.Module, path: str | Path, example: Example | Inputs) -> Written:
    """Accelerate a model, check its outputs, and write it as a torch.export program.

    Args:
        model: a sparsified or plain model; it is not modified.
        path: output file, `.pt2`.
        example: as for `sparing.export.onnx.save`, or the result of `find_inputs`.

    Returns:
        Path and size of the file, and the maximum relative error against the model on random inputs.

    Raises:
        InputError: as for `accelerate`; the file cannot be written.

    Examples:
        >>> save(nn.Conv2d(3, 8, 3), "model.pt2", (1, 3, 16, 16))  # doctest: +SKIP
        >>> load("model.pt2")(torch.randn(1, 3, 16, 16)).shape  # doctest: +SKIP
        torch.Size([1, 8, 14, 14])
    """
    library()
    network = plain(model)
    accelerated, _, inputs = _accelerate(network, find_inputs(network, example))
    program, inputs = trace(accelerated, inputs)
    args, kwargs = inputs.sample(3)
    expected = outputs(network, args, kwargs)
    try:
        with atomic_write(path) as temporary:
            write(program, temporary)
            error = check(str(path), expected, outputs(load(temporary), args, kwargs), tolerance(network))
    except OSError as failure:
        raise InputError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    return Written(Path(path), Path(path).stat().st_size, error)


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program of torch.export.

    Raises:
        InputError: torch.export cannot write it.
    """
    with open(path, "wb") as file:
        try:
            torch.export.save(program, file)
        except Exception as error:  # torch raises exceptions of many types
            raise InputError(f"torch.export cannot write the network: {first_line(error)}") from error


def load(path: str | Path) -> nn.Module:
    """Load a network written by `save`, for inference on the CPU.

    Args:
        path: a file written by `save`.

    Raises:
        InputError: the C++ compiler is missing or fails.
    """
    library()
    with open(path, "rb") as file:
        module: nn.Module = torch.export.load(file).module()
    return module


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "batch", "channels", "height", "width", "filters", "out_height", "out_width",
            "stride_y", "stride_x", "padding_y", "padding_x", "dilation_x",
            "copies", "phases", "rows", "phase", "blocks", "relu", "threads",
        )
    ]  # fmt: skip


class _Weights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "bias", "offsets", "starts")]


@cache
def library() -> Callable[..., None]:
    """Compile native.cpp for this processor, once per process. Return its function.

    Raises:
        InputError: the C++ compiler is missing or fails.
    """
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        raise InputError(f"C++ compiler {name!r} not found; install GCC or Clang, or set CXX to the compiler")
    source = Path(__file__).with_name("native.cpp")
    with tempfile.TemporaryDirectory(prefix="sparing-") as folder:
        output = Path(folder, "native.so")
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(output)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            reason = lines[0].strip() if lines else f"exit status {done.returncode}"
            raise InputError(f"C++ compiler {name!r} cannot compile native.cpp: {reason}")
        function = ctypes.CDLL(str(output)).sparse_conv2d
    function.argtypes = [ctypes.c_void_p] * 5
    function.restype = None
    return function  # type: ignore[no-any-return]


@torch.library.custom_op("sparing::sparse_conv2d", mutates_args=())
def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """Compute a sparse convolution with the equation above.

    Args:
        x: float32 images (N, C, H, W).
        values: nonzero weights, from `compress`.
        offsets: offset of each weight, from `compress`.
        starts: index of the first weight of each filter, from `compress`.
        bias: (F,).
        residual: optional tensor (N, F, H', W') to add to the output.
        geometry: sizes, from `compress`.
        relu: whether to apply a ReLU.

    Returns:
        The output (N, F, H', W').

    Raises:
        InputError: the images have another size or dtype than the weights were compressed for.
    """
    if list(x.shape[1:]) != geometry[:3] or x.dtype != torch.float32:
        raise InputError(
            f"input must have shape [N, {', '.join(map(str, geometry[:3]))}] and dtype torch.float32, "
            f"got {list(x.shape)} and {x.dtype}"
        )
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    output = x.new_empty(len(x), *geometry[3:6])
    shape = _Shape(len(x), *geometry, relu, torch.get_num_threads())
    weights = _Weights(values.data_ptr(), bias.data_ptr(), offsets.data_ptr(), starts.data_ptr())
    library()(
        x.data_ptr(), None if residual is None else residual.data_ptr(), output.data_ptr(),
        ctypes.addressof(weights), ctypes.addressof(shape),
    )  # fmt: skip
    return output


@sparse_conv2d.register_fake
def _(x, values, offsets, starts, bias, residual, geometry, relu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], *geometry[3:6])


@torch.library.custom_op("sparing::max_pool2d", mutates_args=())
def max_pool2d(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil: bool) -> Tensor:
    """Compute max pooling of (N, C, H, W) with oneDNN, which is much faster than PyTorch's kernel on this layout."""
    if not torch.backends.mkldnn.is_available():
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    return torch.mkldnn_max_pool2d(x.contiguous().to_mkldnn(), kernel, stride, padding, ceil_mode=ceil).to_dense()


@max_pool2d.register_fake
def _(x, kernel, stride, padding, ceil):  # type: ignore[no-untyped-def]
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)


def compress(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Convert a weight to the arguments of `sparse_conv2d`.

    The weights are grouped by block of channels, then by filter. A block of channels fits into the cache.

    Args:
        weight: (F, C, K_y, K_x).
        size: height and width of the images in pixels.
        stride: vertical and horizontal stride.
        padding: vertical and horizontal padding in pixels.
        dilation: vertical and horizontal dilation.

    Returns:
        The nonzero weights; the offset of each weight in the copied image; the index of the first weight of each filter
        in each block; and the geometry, the sizes of image, output and copy.
    """
    filters, channels, *kernel = weight.shape
    extent = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    output = [(n + 2 * p - e - 1) // s + 1 for n, p, e, s in zip(size, padding, extent, stride, strict=True)]
    phases, rows, columns = min(stride[0], extent[0] + 1), output[0] + extent[0] // stride[0], output[1]
    phase = -(-rows * columns // LANES) * LANES  # whole vectors
    window = 4 * kernel[1] * (TILE + extent[0] // stride[0] * columns)  # bytes of one channel that a tile reads
    block = channels if kernel == [1, 1] else max(1, CACHE // window)
    blocks = -(-channels // block)
    by_block = F.pad(weight, (0, 0, 0, 0, 0, blocks * block - channels)).unflatten(1, (blocks, block)).transpose(0, 1)
    index, filter_index, channel, y, x = by_block.nonzero().unbind(1)
    y = y * dilation[0]
    plane = ((index * block + channel) * kernel[1] + x) * phases + y % stride[0]
    offsets = plane * phase + y // stride[0] * columns
    counts = torch.bincount(index * filters + filter_index, minlength=blocks * filters)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    geometry = [
        channels, *size, filters, *output, *stride, *padding, dilation[1],
        kernel[1], phases, rows, phase, blocks,
    ]  # fmt: skip
    return by_block[by_block != 0].contiguous(), offsets.int(), starts.int(), geometry


def _replace_max_pool(node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = _arguments(node, [None, None, [], [0, 0], [1, 1], False])
    value = x.meta["val"]
    if value.dim() == 4 and value.dtype == torch.float32 and set(dilation) == {1}:
        node.target = torch.ops.sparing.max_pool2d.default
        node.args = (x, kernel, stride or kernel, padding, ceil)


def _is_supported(node: fx.Node) -> bool:
    """Return whether a conv2d has constant fp32 weights, one group, and a batch of images of fixed size."""
    x, weight, _, _, _, _, groups = _arguments(node, CONV2D)
    value = weight.meta["val"]
    image = x.meta["val"].shape
    constant = weight.op == "get_attr" and all(type(size) is int for size in image[1:])
    return bool(constant and groups == 1 and value.dtype == torch.float32 and len(image) == 4)


def _arguments(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    return [*node.args, *defaults[len(node.args) :]]


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


@torch.no_grad()
def _replace_convolution(
    graph_module: fx.GraphModule, node: fx.Node, name: str, batch: int, least_sparsity: float, rounds: int
) -> Choice:
    """Fold batch normalization into a convolution, and replace it by a sparse one if that is faster."""
    graph = graph_module.graph

    def value(argument: Any) -> Any:
        return operator.attrgetter(str(argument.target))(graph_module) if isinstance(argument, fx.Node) else argument

    def constant(suffix: str, tensor: Tensor) -> fx.Node:
        graph_module.register_buffer(f"{name}_{suffix}", tensor)
        attribute = graph.get_attr(f"{name}_{suffix}")
        attribute.meta["val"] = tensor
        return attribute

    x, weight_node, bias_node, stride, padding, dilation, _ = _arguments(node, CONV2D)
    weight, bias = value(weight_node), value(bias_node)
    last = node
    if norm := _only_user(last, aten.batch_norm.default):
        scale, shift, mean, variance, _, _, epsilon = (value(argument) for argument in norm.args[1:8])
        weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift)
        last = norm
    weight = weight.detach()
    bias = torch.zeros(len(weight)) if bias is None else bias.detach()
    image = list(x.meta["val"].shape[1:])
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    choice = Choice(weight_node.target, sparsity, None, None, False)
    if sparsity >= least_sparsity:
        *compressed, geometry = compress(weight, image[1:], stride, padding, dilation)
        images = torch.randn(batch, *image)
        dense, sparse = _min_times(
            lambda: F.conv2d(images, weight, bias, stride, padding, dilation),
            lambda: sparse_conv2d(images, *compressed, bias, None, geometry, False),
            rounds,
        )
        choice = Choice(weight_node.target, sparsity, dense, sparse, sparse < dense)
    if not choice.sparse:
        with graph.inserting_before(node):
            constants = [constant("weight", weight), constant("bias", bias)]
            replacement = graph.call_function(aten.conv2d.default, (x, *constants, stride, padding, dilation))
    else:
        residual, relu = None, False
        if (add := _only_user(last, aten.add.Tensor, aten.add_.Tensor)) and not add.kwargs:
            other = next(argument for argument in add.args if argument is not last)
            if isinstance(other, fx.Node) and other.meta["val"].shape == last.meta["val"].shape:
                residual, last = other, add
        if rectified := _only_user(last, aten.relu.default, aten.relu_.default):
            relu, last = True, rectified
        with graph.inserting_before(last):
            constants = [
                constant(suffix, tensor)
                for suffix, tensor in zip(("values", "offsets", "starts", "bias"), (*compressed, bias), strict=True)
            ]
            replacement = graph.call_function(
                torch.ops.sparing.sparse_conv2d.default,
                (x, *constants, residual, geometry, relu),
            )
    replacement.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(replacement)
    for fused in (last, *reversed(_chain(node, last))):
        graph.erase_node(fused)
    return choice


def _chain(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return the nodes from `first` to `last`, without `last`. Each has one user, the next node."""
    chain = []
    while first is not last:
        chain.append(first)
        (first,) = first.users
    return chain


def _min_times(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """Return the minimum seconds of two functions, timed in alternating order.

    The minimum is used because other load on the machine can only increase the time.
    """
    least = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, run in enumerate((first, second)):
            run()
            start = time.perf_counter()
            run()
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0], least[1]
