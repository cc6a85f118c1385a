"""Lowering of activations, sums, products and normalization."""

from typing import Any

import torch
from torch import Tensor, fx

from sparing.engine.lowering.lowering import ONE, Cut, Lowering, Place, arguments_of, sizes
from sparing.engine.operations import Affine, Binary, LayerNorm
from sparing.engine.shapes import Images


def activation(low: Lowering, node: fx.Node, name: str) -> Place:
    return low.apply(Affine, low.read(node.args[0]), activation=name)


def gelu(low: Lowering, node: fx.Node) -> Place:
    return activation(low, node, "gelu" if arguments_of(node)["approximate"] == "none" else "gelu_tanh")


def clamp(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    limits = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    names: dict[Any, str] = {(0, None): "relu", (0, 6): "relu6"}
    if any(isinstance(limit, fx.Node) for limit in limits) or limits not in names:
        raise Cut(f"clamp to {limits}")
    return activation(low, node, names[limits])


def binary(low: Lowering, node: fx.Node, kind: str) -> Place:
    given = arguments_of(node)
    if given.get("alpha", 1) != 1:
        raise Cut("add with alpha")
    x, y = given["input"], given["other"]
    if not isinstance(x, fx.Node) or x in low.constants:
        x, y = y, x
    if not isinstance(y, fx.Node) or y in low.constants:
        place, vector = _operands(low, x, y)
        return low.apply(Affine, place, bias=vector) if kind == "add" else low.apply(Affine, place, scale=vector)
    if sizes(x) != sizes(node) or (y in low.lowered and x not in low.lowered and sizes(y) == sizes(node)):
        x, y = y, x
    if sizes(x) != sizes(node):
        raise Cut("operands that are both enlarged")
    place = low.read(x)
    shape = low.shape(place)
    if sizes(x) == sizes(y):
        other = low.read(y, axis=place.axis, shape=shape)
    else:  # one number per channel of each image
        pixel = tuple(size if dim in (0, place.axis) else ONE for dim, size in enumerate(sizes(x)))
        if not isinstance(shape, Images) or sizes(y) != pixel:
            raise Cut("an operand that is enlarged")
        other = low.read(y, axis=place.axis, shape=shape.pixels)
    return low.apply(Binary, place, other=other.tensor, kind=kind)


def subtract(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    if given.get("alpha", 1) != 1:
        raise Cut("sub with alpha")
    place, vector = _operands(low, given["input"], given["other"])
    return low.apply(Affine, place, bias=-vector)


def subtract_from(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    if given.get("alpha", 1) != 1:
        raise Cut("rsub with alpha")
    place, vector = _operands(low, given["input"], given["other"])
    return low.apply(Affine, place, scale=-torch.ones_like(vector), bias=vector)


def divide(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    if given.get("rounding_mode") is not None:
        raise Cut("division with rounding")
    place, vector = _operands(low, given["input"], given["other"])
    return low.apply(Affine, place, scale=1 / vector)


def negate(low: Lowering, node: fx.Node) -> Place:
    place, vector = _operands(low, node.args[0], -1)
    return low.apply(Affine, place, scale=vector)


def _operands(low: Lowering, x: Any, constant: Any) -> tuple[Place, Tensor]:
    """Return the place of x, and a number or constant as one number per channel of x."""
    place = low.read(x)
    return place, _vector(low, constant, x, place.axis)


def _vector(low: Lowering, argument: Any, x: fx.Node, axis: int) -> Tensor:
    shape = sizes(x)
    channels = shape[axis].factor
    if type(argument) in (int, float):
        if abs(argument) > torch.finfo(torch.float32).max:  # False for NaN, which is kept
            raise Cut("a number beyond float32")
        return _numbers(channels, float(argument))
    if not isinstance(argument, fx.Node) or argument not in low.constants:
        raise Cut("another operand than a tensor or constant")
    tensor = low.constants[argument].detach()
    if tensor.is_complex() or tensor.dim() > len(shape):
        raise Cut("a constant with more dimensions")
    first = len(shape) - tensor.dim()
    if any(size != 1 and first + dim != axis for dim, size in enumerate(tensor.shape)):
        raise Cut("a constant that is not one number per channel")
    if tensor.numel() not in (1, channels):
        raise Cut("a constant that enlarges the tensor")
    return tensor.reshape(-1).float().expand(channels).contiguous()


def _numbers(count: int, value: float) -> Tensor:
    return torch.full((count,), value, dtype=torch.float32, device="cpu")


def batch_norm(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    if given["training"] or given["running_mean"] is None:
        raise Cut("batch norm with the statistics of the batch")
    mean, variance = low.constant(given["running_mean"]), low.constant(given["running_var"])
    scale = (variance + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * low.constant(given["weight"])
    bias = -mean * scale
    if given["bias"] is not None:
        bias = bias + low.constant(given["bias"])
    return low.apply(Affine, low.read(given["input"], axis=1), scale=scale, bias=bias)


def layer_norm(low: Lowering, node: fx.Node, centered: bool = True) -> Place:
    given = arguments_of(node)
    x = given["input"]
    if len(given["normalized_shape"]) != 1:
        raise Cut("layer norm over more than one dimension")
    place = low.read(x, axis=x.meta["val"].dim() - 1)
    channels = low.shape(place).channels
    weight = _numbers(channels, 1.0) if given["weight"] is None else low.constant(given["weight"])
    bias = _numbers(channels, 0.0) if given.get("bias") is None else low.constant(given["bias"])
    epsilon = torch.finfo(torch.float32).eps if given["eps"] is None else float(given["eps"])
    return low.apply(LayerNorm, place, weight=weight, bias=bias, epsilon=epsilon, centered=centered)
