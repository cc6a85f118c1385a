"""Lowering of views, slices and concatenations."""

from dataclasses import replace
from typing import Any

from torch import fx

from sparing.engine.lowering.attention import attention
from sparing.engine.lowering.lowering import ONE, Cut, Lowering, Place, arguments_of, fits, sizes
from sparing.engine.operations import Copy
from sparing.engine.shapes import Images, Matrix


def view(low: Lowering, node: fx.Node) -> Place:
    x: Any = node.args[0]
    if x not in low.lowered:
        return attention(low, node)
    own, out = low.lowered[x].place, sizes(node)
    shape = low.shape(own)
    last = len(out) - 1
    axes = range(last, -1, -1) if isinstance(shape, Matrix) else [1 if own.axis == 1 else last]
    for axis in axes:
        if axis < len(out) and fits(shape, out, axis):
            return replace(low.read(x), axis=axis)
    raise Cut("a view that mixes channels and pixels, or images")


def permute(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    x: Any = node.args[0]
    if x not in low.lowered:
        raise Cut("a view of a tensor in PyTorch")
    rank = x.meta["val"].dim()
    if "dims" in given:
        order = [dim % rank for dim in given["dims"]]
    else:
        order = list(range(rank))
        one, other = given["dim0"] % rank, given["dim1"] % rank
        order[one], order[other] = order[other], order[one]
    own, of_x = low.lowered[x].place, sizes(x)
    axis = order.index(own.axis)
    longer = [dim for dim in order if of_x[dim] != ONE]  # dimensions of one element may be anywhere
    images = isinstance(low.shape(own), Images)
    others = [dim for dim in order if dim != own.axis]
    moved = images and others == sorted(others) and axis in (1, rank - 1)
    if longer != sorted(longer) and not moved:
        raise Cut("a permutation that is not of the channels alone")
    return replace(low.read(x), axis=axis)


def slice_channels(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    x: Any = node.args[0]
    rank = x.meta["val"].dim()
    place = low.read(x)
    start = given.get("start")
    if given["dim"] % rank != place.axis or given.get("step", 1) != 1 or not isinstance(start or 0, int):
        raise Cut("a slice of other dimensions than the channels")
    shape = low.shape(place)
    first = start or 0
    first = min(max(first + shape.channels if first < 0 else first, 0), shape.channels)
    channels = sizes(node)[place.axis].factor
    target = replace(shape, channels=channels)
    return low.apply(Copy, place, target, input_first=first, output_first=0, channels=channels)


def concatenate(low: Lowering, node: fx.Node) -> Place:
    given = arguments_of(node)
    nodes: Any = given["tensors"]
    axis = given["dim"] % node.meta["val"].dim()
    at_axis = [x for x in nodes if x in low.lowered and low.lowered[x].place.axis == axis]
    shape = low.shape(low.read(at_axis[0] if at_axis else nodes[0], axis=axis))
    places = [low.read(x, axis=axis, shape=replace(shape, channels=sizes(x)[axis].factor)) for x in nodes]
    output, first = low.tensor(replace(shape, channels=sizes(node)[axis].factor)), 0
    for place in places:
        channels = low.shape(place).channels
        low.emit(Copy(output=output, input=place.tensor, input_first=0, output_first=first, channels=channels))
        first += channels
    return Place(output, axis)
