"""Sparse convolutions in torch: compiled for the machine they run on, they multiply by nonzero weights alone.

    y[f, p] = b[f] + r[f, p] + Σ_j w[f, j] · x[o[f, j] + p]        and max(·, 0) where the network says so

The image x is laid out with its padding, and once for each column of the kernel, so that pixel p of the output
reads pixel p + o of it: a nonzero weight is a number w and an offset o, of its channel, row and column alike. A
tile of neighbouring pixels is kept in registers while the weights of a filter go by. A batch normalization
before, a residual r and a ReLU after it cost no pass of their own.

Where zeros are few a dense convolution is faster, so each is measured. It takes a C++ compiler, `c++` or the
one that CXX names: GCC, or Clang.

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
from sparing.export.network import Written, check, outputs, plain, random_inputs
from sparing.export.onnx import trace
from sparing.files import atomic_write
from sparing.macs import Example

aten = torch.ops.aten

# What aten.conv2d takes where a graph says nothing: x, weight, bias, stride, padding, dilation, groups.
CONV2D = (None, None, None, [1, 1], [0, 0], [1, 1], 1)

LANES, TILE = 16, 7 * 16  # pixels, as in native.cpp
CACHE = 64 * 1024  # bytes that a tile of a block of channels may take: the nearest cache, and some of the next


@dataclass(frozen=True)
class Choice:
    """What was found out about one convolution.

    Attributes:
        name: of its weight.
        sparsity: of its weight.
        dense_seconds: of torch's convolution, the fastest of the turns; None if it was not tried.
        sparse_seconds: of the sparse one.
        sparse: whether it is in the network now.
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
    """A network that computes what the model does, with sparse convolutions where those are faster here.

    Every plain Conv2d that is sparse enough is timed both ways, in turns, on inputs of the shape it gets in
    the model, with as many threads as torch uses now. Images keep their size, the batch size stays free.

    Args:
        model: sparsified or plain; it is left as it is.
        example: as for `sparing.export.onnx.save`.
        batch: the batch size to be fast for.
        least_sparsity: convolutions below it are not tried.
        rounds: turns of each.

    Returns:
        The network, for inference on the CPU, and a `Choice` for each Conv2d in it.

    Raises:
        InputError: there is no C++ compiler, or it fails; torch cannot trace the model; the network
            computes something else.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> network, choices = accelerate(model, (1, 3, 16, 16))  # doctest: +SKIP
    """
    library()
    network = plain(model)
    graph_module: Any = trace(network, example).module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    choices = []
    for index, node in enumerate(list(graph_module.graph.nodes)):
        if node.target is aten.max_pool2d.default:
            _pool(graph_module, node)
        if node.target is aten.conv2d.default and _constant(node):
            choices.append(_convolution(graph_module, node, f"convolution{index}", batch, least_sparsity, rounds))
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    args, kwargs = random_inputs(example, batch=3)
    check("the accelerated network", outputs(network, args, kwargs), outputs(graph_module, args, kwargs))
    return graph_module, choices


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Write the network of `accelerate` as a program of torch.export, for `load`.

    Args:
        model: sparsified or plain; it is left as it is.
        path: the file, `.pt2`.
        example: as for `sparing.export.onnx.save`.

    Raises:
        InputError: as `accelerate`; the file cannot be written.
    """
    program = trace(accelerate(model, example)[0], example)
    args, kwargs = random_inputs(example, batch=3)
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.export.save(program, file)
            error = check(str(path), outputs(plain(model), args, kwargs), outputs(load(temporary), args, kwargs))
    except OSError as failure:
        raise InputError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    return Written(Path(path), Path(path).stat().st_size, error)


def load(path: str | Path) -> nn.Module:
    """The network in a file of `save`, for inference on the CPU.

    Raises:
        InputError: there is no C++ compiler, or it fails.
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
    """native.cpp, compiled for this processor, once a process.

    Raises:
        InputError: there is no C++ compiler, or it fails.
    """
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        raise InputError(f"sparse convolutions take a C++ compiler, and {name} is not installed")
    source = Path(__file__).with_name("native.cpp")
    with tempfile.TemporaryDirectory(prefix="sparing-") as folder:
        made = Path(folder, "native.so")
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise InputError(f"{name} cannot compile sparse convolutions: {said[0].strip()}")
        function = ctypes.CDLL(str(made)).sparse_conv2d
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
    """(N, C, H, W) → (N, F, H', W'), as the equation above, with weights and geometry from `compress`.

    Raises:
        InputError: x holds other images than the offsets are for.
    """
    if list(x.shape[1:]) != geometry[:3] or x.dtype != torch.float32:
        raise InputError(
            f"this network takes {geometry[:3]} images in float32, and these are {list(x.shape[1:])} in {x.dtype}"
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
    """Max pooling of (N, C, H, W): torch's own, by way of oneDNN, which is many times as fast on this layout."""
    if not torch.backends.mkldnn.is_available():
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    return torch.mkldnn_max_pool2d(x.contiguous().to_mkldnn(), kernel, stride, padding, ceil_mode=ceil).to_dense()


@max_pool2d.register_fake
def _(x, kernel, stride, padding, ceil):  # type: ignore[no-untyped-def]
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)


def compress(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A kernel (F, C, K_y, K_x) for images of a size, as `sparse_conv2d` takes it.

    Channels come in blocks that the nearest cache holds, and in each of them the filters.

    Returns:
        The nonzero weights; their offsets in the image as it is laid out; where each filter of each block
        begins; and the geometry of both.
    """
    filters, channels, *kernel = weight.shape
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    lengths = [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    phases, rows, columns = min(stride[0], reach[0] + 1), lengths[0] + reach[0] // stride[0], lengths[1]
    phase = -(-rows * columns // LANES) * LANES  # whole vectors
    window = 4 * kernel[1] * (TILE + reach[0] // stride[0] * columns)
    block = channels if kernel == [1, 1] else max(1, CACHE // window)
    blocks = -(-channels // block)
    by_block = F.pad(weight, (0, 0, 0, 0, 0, blocks * block - channels)).unflatten(1, (blocks, block)).transpose(0, 1)
    part, number, channel, y, x = by_block.nonzero().unbind(1)
    y = y * dilation[0]
    plane = ((part * block + channel) * kernel[1] + x) * phases + y % stride[0]
    offsets = plane * phase + y // stride[0] * columns
    counts = torch.bincount(part * filters + number, minlength=blocks * filters)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    geometry = [
        channels, *size, filters, *lengths, *stride, *padding, dilation[1],
        kernel[1], phases, rows, phase, blocks,
    ]  # fmt: skip
    return by_block[by_block != 0].contiguous(), offsets.int(), starts.int(), geometry


def _pool(graph_module: fx.GraphModule, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = _arguments(node, [None, None, [], [0, 0], [1, 1], False])
    value = x.meta["val"]
    if value.dim() == 4 and value.dtype == torch.float32 and set(dilation) == {1}:
        node.target = torch.ops.sparing.max_pool2d.default
        node.args = (x, kernel, stride or kernel, padding, ceil)


def _constant(node: fx.Node) -> bool:
    """Whether a conv2d is one we know: weights that are constants, fp32, not grouped, padded by numbers."""
    x, weight, _, _, _, _, groups = _arguments(node, CONV2D)
    value = weight.meta["val"]
    return bool(weight.op == "get_attr" and groups == 1 and value.dtype == torch.float32 and x.meta["val"].dim() == 4)


def _arguments(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    return [*node.args, *defaults[len(node.args) :]]


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


@torch.no_grad()
def _convolution(
    graph_module: fx.GraphModule, node: fx.Node, name: str, batch: int, least_sparsity: float, rounds: int
) -> Choice:
    """Fold batch normalization into a convolution, and make it sparse if that is faster."""
    graph = graph_module.graph

    def value(given: Any) -> Any:
        return operator.attrgetter(str(given.target))(graph_module) if isinstance(given, fx.Node) else given

    def constant(part: str, tensor: Tensor) -> fx.Node:
        graph_module.register_buffer(f"{name}_{part}", tensor)
        made = graph.get_attr(f"{name}_{part}")
        made.meta["val"] = tensor
        return made

    x, weight_node, bias_node, stride, padding, dilation, _ = _arguments(node, CONV2D)
    weight, bias = value(weight_node), value(bias_node)
    last = node
    if norm := _only_user(last, aten.batch_norm.default):
        scale, shift, mean, variance, _, _, epsilon = (value(part) for part in norm.args[1:8])
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
        drawn = torch.randn(batch, *image)
        dense, sparse = _fastest(
            lambda: F.conv2d(drawn, weight, bias, stride, padding, dilation),
            lambda: sparse_conv2d(drawn, *compressed, bias, None, geometry, False),
            rounds,
        )
        choice = Choice(weight_node.target, sparsity, dense, sparse, sparse < dense)
    if not choice.sparse:
        with graph.inserting_before(node):
            parts = [constant("weight", weight), constant("bias", bias)]
            made = graph.call_function(aten.conv2d.default, (x, *parts, stride, padding, dilation))
    else:
        residual, relu = None, False
        if (add := _only_user(last, aten.add.Tensor, aten.add_.Tensor)) and not add.kwargs:
            other = next(part for part in add.args if part is not last)
            if isinstance(other, fx.Node) and other.meta["val"].shape == last.meta["val"].shape:
                residual, last = other, add
        if rectified := _only_user(last, aten.relu.default, aten.relu_.default):
            relu, last = True, rectified
        with graph.inserting_before(last):
            parts = [
                constant(part, tensor)
                for part, tensor in zip(("values", "offsets", "starts", "bias"), (*compressed, bias), strict=True)
            ]
            made = graph.call_function(
                torch.ops.sparing.sparse_conv2d.default,
                (x, *parts, residual, geometry, relu),
            )
    made.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(made)
    for gone in (last, *reversed(list(_between(node, last)))):
        graph.erase_node(gone)
    return choice


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The chain of nodes from the first to the one before the last."""
    chain = []
    while first is not last:
        chain.append(first)
        (first,) = first.users
    return chain


def _fastest(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """The least seconds of each, in turns: whatever else the machine does only ever adds."""
    least = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, run in enumerate((first, second)):
            run()
            start = time.perf_counter()
            run()
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0], least[1]
