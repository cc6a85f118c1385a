"""Lowering of convolutions, linear layers and pooling."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparing.engine.lowering.lowering import ONE, Cut, Lowering, Place, arguments_of, sizes
from sparing.engine.operations import MOST_FILTERS, Convolution, Depthwise, Mean, Pool
from sparing.engine.shapes import Count, Images, Matrix, Window

aten = torch.ops.aten


def convolution(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    weight = low.constant(given["weight"])
    dims = weight.dim() - 2
    if dims not in (1, 2) or given["input"].meta["val"].dim() != weight.dim():
        raise Cut(f"convolution of {given['input'].meta['val'].dim()} dimensions")
    bias = low.constant(given["bias"]) if given["bias"] is not None else weight.new_zeros(len(weight))
    if max(len(weight), weight[0, 0].numel()) > MOST_FILTERS:
        raise Cut(f"more than {MOST_FILTERS} filters, or elements of a kernel")
    stride, dilation = pair(given["stride"]), pair(given["dilation"])
    low.dense[node] = weight.numel()
    x, before, after = _unpad(given["input"], dims)
    if dims == 1:
        weight, stride, dilation = weight.unsqueeze(2), (1, stride[1]), (1, dilation[1])
    kernel = (weight.shape[2], weight.shape[3])
    if given["padding"] == "same":  # the end gets the larger part
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        own, own_after = [n // 2 for n in total], [n - n // 2 for n in total]
    else:
        own = [0, 0] if given["padding"] == "valid" else list(pair(given["padding"]))
        own = [0, own[1]] if dims == 1 else own
        own_after = own
    before = [a + b for a, b in zip(before, own, strict=True)]
    after = [a + b for a, b in zip(after, own_after, strict=True)]
    place = low.read(x, axis=1, spatial=True)
    source = low.shape(place)
    out = sizes(node)
    groups = given["groups"]
    if isinstance(source, Matrix):  # images of one pixel: all but one pixel of the kernel are on padding
        if any(size != ONE for size in out[2:]):
            raise Cut("convolution that enlarges one pixel")
        y, x_ = (b // d if b % d == 0 else k for b, d, k in zip(before, dilation, kernel, strict=True))
        inside = y < kernel[0] and x_ < kernel[1]
        pixel = weight[:, :, y, x_] if inside else weight.new_zeros(weight.shape[:2])
        sparse = _compress(pixel[:, :, None, None], groups)
        pixels = Matrix(source.rows, len(weight))
        return low.apply(Convolution, place, pixels, residual=None, window=Window(), bias=bias, **sparse)
    weight, padding = _symmetric(weight, before, after, dilation)
    window = Window((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    height, width = window.output_size((source.height, source.width))
    target = Images(source.images, len(weight), height, width)
    if groups == source.channels == len(weight) and groups > 1:
        return low.apply_window(Depthwise, place, target, window=window, weight=weight[:, 0].contiguous(), bias=bias)
    sparse = _compress(weight, groups)
    return low.apply_window(Convolution, place, target, residual=None, window=window, bias=bias, **sparse)


def _unpad(node: Any, dims: int) -> tuple[Any, list[int], list[int]]:
    """Return the input of a padding with zeros, and the pixels before and after; of another node, the node itself."""
    nothing = node, [0, 0], [0, 0]
    if getattr(node, "target", None) not in (aten.pad.default, aten.constant_pad_nd.default):
        return nothing
    given = arguments_of(node)
    pad = list(given["pad"])
    is_zero = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    if not is_zero or len(pad) > 2 * dims or not all(type(number) is int and number >= 0 for number in pad):
        return nothing
    pad += [0] * (4 - len(pad))  # the last dimension comes first
    return given["input"], [pad[2], pad[0]], [pad[3], pad[1]]


def _symmetric(
    weight: Tensor, before: Sequence[int], after: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Make the padding symmetric. Zeros at one end of the kernel take the place of the missing pixels."""
    padding, zeros = [], []
    for first, last, step in zip(before, after, dilation, strict=True):
        difference = abs(first - last)
        if difference % step:
            raise Cut("asymmetric padding")
        padding.append(max(first, last))
        zeros.append((difference // step, 0) if last > first else (0, difference // step))
    if any(number for pair in zeros for number in pair):
        weight = F.pad(weight, (*zeros[1], *zeros[0]))
    return weight, (padding[0], padding[1])


def _compress(weight: Tensor, groups: int = 1) -> dict[str, Any]:
    """Return starts, columns and values of a weight [filters, channels of a group, height, width]."""
    filters, channels, height, width = weight.shape
    row, channel, y, x = weight.nonzero().unbind(1)
    channel = channel + row // (filters // groups) * channels
    starts = F.pad(torch.bincount(row, minlength=filters).cumsum(0), (1, 0))
    return {
        "starts": starts.int(),
        "columns": ((channel * height + y) * width + x).int(),
        "values": weight[weight != 0],
    }


def linear(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    if node.target.overloadpacket is aten.linear:  # type: ignore[union-attr]
        x, weight, bias = given["input"], low.constant(given["weight"]), given["bias"]
    elif node.target.overloadpacket is aten.addmm:  # type: ignore[union-attr]
        if (given["beta"], given["alpha"]) != (1, 1):
            raise Cut("addmm with factors")
        x, weight, bias = given["mat1"], low.constant(given["mat2"]), given["input"]
    else:
        x, bias = given["input"], None
        weight = low.constant(given.get("mat2", given.get("other")))
    if weight.dim() != 2:
        raise Cut(f"product with a tensor of {weight.dim()} dimensions")
    if node.target.overloadpacket is not aten.linear:  # type: ignore[union-attr]
        weight = weight.t()
    offset = low.constant(bias) if bias is not None else weight.new_zeros(len(weight))
    if len(weight) > MOST_FILTERS:
        raise Cut(f"more than {MOST_FILTERS} outputs")
    if offset.shape != (len(weight),):
        raise Cut(f"bias of shape {list(offset.shape)}")
    place = low.read(x, axis=x.meta["val"].dim() - 1)
    low.dense[node] = weight.numel()
    target = replace(low.shape(place), channels=len(weight))
    sparse = _compress(weight[:, :, None, None])
    return low.apply(Convolution, place, target, residual=None, window=Window(), bias=offset, **sparse)


def pool(low: Lowering, node: fx.Node, dims: int, kind: str) -> Place:
    given = arguments_of(node)
    x = given["input"]
    if x.meta["val"].dim() != dims + 2:
        raise Cut(f"pooling of {x.meta['val'].dim()} dimensions")
    if given.get("divisor_override") is not None:
        raise Cut("pooling with divisor_override")
    if kind == "average" and not given["count_include_pad"]:
        kind = "average_without_padding"
    stride = given["stride"] or given["kernel_size"]
    window = _spatial_window(
        dims, kernel=given["kernel_size"], stride=stride, padding=given["padding"], dilation=given.get("dilation", 1)
    )
    return _pooled(low, node, low.read(x, axis=1, spatial=True), window, kind)


def _pooled(low: Lowering, node: fx.Node, place: Place, window: Window, kind: str) -> Place:
    source, out = low.shape(place), sizes(node)
    if isinstance(source, Matrix):
        if window.padding != (0, 0):
            raise Cut("pooling of one pixel with padding")
        return place  # of one pixel
    height, width = window.output_size((source.height, source.width))
    if (Count(height), Count(width))[2 - len(out[2:]) :] != out[2:]:
        raise Cut("pooling with ceil_mode")
    target = replace(source, height=height, width=width)
    return low.apply_window(Pool, place, target, window=window, kind=kind)


def adaptive_average(low: Lowering, node: fx.Node) -> Place:
    x = arguments_of(node)["input"]
    if x.meta["val"].dim() != node.meta["val"].dim() or x.meta["val"].dim() not in (3, 4):
        raise Cut(f"pooling of {x.meta['val'].dim()} dimensions")
    place = low.read(x, axis=1, spatial=True)
    source, out = low.shape(place), sizes(node)[2:]
    if isinstance(source, Matrix):
        return place  # one pixel
    if all(size == ONE for size in out):
        return low.apply(Mean, place, source.pixels)
    height, width = ((ONE, *out)[-2].factor, out[-1].factor)
    if source.height % height or source.width % width:
        raise Cut("adaptive pooling with windows of different sizes")
    kernel = source.height // height, source.width // width
    return _pooled(low, node, place, Window(kernel, kernel), "average")


def mean(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    x, rank = given["input"], given["input"].meta["val"].dim()
    dims = sorted(dim % rank for dim in given.get("dim") or range(rank))
    if rank not in (3, 4) or len(dims) != rank - 2 or dims[0] == 0 or given["dtype"] not in (None, torch.float32):
        raise Cut("mean over other dimensions than height and width")
    (axis,) = set(range(1, rank)) - set(dims)
    place = low.read(x, axis=axis)
    source = low.shape(place)
    axis = axis if given["keepdim"] else 1
    if isinstance(source, Matrix):
        if any(sizes(x)[dim] != ONE for dim in dims):
            raise Cut("mean over the rows of a matrix")
        return replace(place, axis=axis)  # one pixel
    return replace(low.apply(Mean, place, source.pixels), axis=axis)


def _spatial_window(dims: int, **named: Any) -> Window:
    """Return the window of a one- or two-dimensional operator."""
    neutral = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    pairs = {name: pair(numbers) for name, numbers in named.items()}
    if dims == 1:
        pairs = {name: (neutral[name], pair[1]) for name, pair in pairs.items()}
    return Window(**pairs)


def pair(numbers: Any) -> tuple[int, int]:
    """Return numbers of a one- or two-dimensional operator as a pair: vertical, horizontal."""
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    if not all(type(number) is int for number in numbers):
        raise Cut("a window that depends on the batch size")
    return (numbers[0], numbers[-1])
