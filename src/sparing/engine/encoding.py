"""Arguments of operators, and segments of the engine, as JSON."""

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sparing.engine.attention import Attention
from sparing.engine.operations import (
    Affine,
    Binary,
    Convolution,
    Copy,
    Depthwise,
    LayerNorm,
    Mean,
    Operation,
    Pool,
)
from sparing.engine.program import Constant, Ref
from sparing.engine.segment import Port, Segment
from sparing.engine.shapes import Count, Images, Matrix, Shape, Window
from sparing.errors import InputError

OPERATIONS = {
    kind.__name__: kind for kind in (Convolution, Depthwise, Pool, Mean, Affine, Binary, Copy, LayerNorm, Attention)
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip
MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
TEXT = re.compile(r"[A-Za-z0-9_ ,.>-]{0,100}")
"""Strings that are arguments of operators, such as "tanh", "floor" and "bij,bjk->bik"."""


def encode(argument: Any) -> Any:
    """Return an argument of an operator as JSON."""
    if argument is None or type(argument) in (bool, int):
        return argument
    if type(argument) is float:
        return argument if math.isfinite(argument) else {"float": str(argument)}
    if isinstance(argument, str) and TEXT.fullmatch(argument):
        return argument
    if isinstance(argument, Ref):
        return {"value": argument.index}
    if isinstance(argument, Constant):
        return {"constant": argument.name}
    if isinstance(argument, Count):
        return {"count": [argument.factor, argument.per_sample]}
    if isinstance(argument, torch.dtype) and str(argument).removeprefix("torch.") in DTYPES:
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.memory_format) and str(argument).removeprefix("torch.") in MEMORY_FORMATS:
        return {"memory_format": str(argument).removeprefix("torch.")}
    if argument == torch.strided:
        return {"layout": "strided"}
    if argument == torch.device("cpu"):
        return {"device": "cpu"}
    if isinstance(argument, list):
        return [encode(item) for item in argument]
    if isinstance(argument, tuple):
        return {"tuple": [encode(item) for item in argument]}
    if isinstance(argument, dict):
        return {"dict": [[checked(key, str), encode(value)] for key, value in argument.items()]}
    raise InputError(f"{argument!r} of type {type(argument).__name__} cannot be written to a file")


def decode(argument: Any) -> Any:
    """Return the argument that `encode` wrote."""
    if argument is None or type(argument) in (bool, int, float):
        return argument
    if isinstance(argument, str):
        if not TEXT.fullmatch(argument):
            raise InputError("a string is not permitted as an argument")
        return argument
    if isinstance(argument, list):
        return [decode(item) for item in argument]
    ((kind, value),) = argument.items()
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "value":
        return Ref(checked(value, int))
    if kind == "constant":
        return Constant(checked(value, str))
    if kind == "count":
        return decode_counts([value])[0]
    if kind == "dtype":
        return DTYPES[value]
    if kind == "memory_format":
        return MEMORY_FORMATS[value]
    if kind == "layout" and value == "strided":
        return torch.strided
    if kind == "device" and value == "cpu":
        return torch.device("cpu")
    if kind == "tuple":
        return tuple(decode(item) for item in checked(value, list))
    if kind == "dict":
        return {checked(key, str): decode(item) for key, item in checked(value, list)}
    raise InputError(f"unknown kind of argument {kind!r}")


def encode_segment(segment: Segment, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a segment as JSON. Its tensors go into `tensors`."""
    operations = []
    for number, operation in enumerate(segment.operations):
        encoded: dict[str, Any] = {"operation": type(operation).__name__}
        for field in fields(operation):
            value = getattr(operation, field.name)
            if isinstance(value, Tensor):
                if field.name == "columns" and (not len(value) or int(value.max()) < 2**15):
                    value = value.to(torch.int16)
                tensors[f"{prefix}/{number}/{field.name}"] = value
                value = True
            elif isinstance(value, Window):
                value = [list(getattr(value, pair.name)) for pair in fields(Window)]
            encoded[field.name] = value
        operations.append(encoded)
    return {
        "tensors": [_encode_shape(shape) for shape in segment.tensors],
        "operations": operations,
        "inputs": [_encode_port(port) for port in segment.inputs],
        "outputs": [_encode_port(port) for port in segment.outputs],
    }


def decode_segment(encoded: Any, prefix: str, tensors: dict[str, Tensor]) -> Segment:
    """Return a segment. Its tensors are removed from `tensors`."""
    operations: list[Operation] = []
    for number, given in enumerate(checked(encoded["operations"], list)):
        kind = OPERATIONS[given["operation"]]
        values = {}
        for field in fields(kind):
            value = given[field.name]
            if field.type in (Tensor, Tensor | None):
                if value is True:
                    value = tensors.pop(f"{prefix}/{number}/{field.name}")
                    value = value.int() if value.dtype == torch.int16 else value
                elif value is not None or field.type is Tensor:
                    raise InputError(f"{field.name} of {kind.__name__} is missing")
            elif field.type is Window:
                value = Window(*(_pair(pair) for pair in value))
            elif isinstance(value, (list, dict)):
                raise InputError(f"{field.name} of {kind.__name__} must not be {value!r}")
            values[field.name] = value
        operations.append(kind(**values))
    return Segment(
        tuple(_decode_shape(shape) for shape in checked(encoded["tensors"], list)),
        tuple(operations),
        tuple(_decode_port(port) for port in checked(encoded["inputs"], list)),
        tuple(_decode_port(port) for port in checked(encoded["outputs"], list)),
    )


def encode_counts(counts: Iterable[Count]) -> list[Any]:
    return [[count.factor, count.per_sample] for count in counts]


def decode_counts(counts: Any) -> tuple[Count, ...]:
    return tuple(Count(checked(factor, int), checked(per_sample, bool)) for factor, per_sample in counts)


def _encode_shape(shape: Shape) -> list[Any]:
    if isinstance(shape, Matrix):
        return [*encode_counts([shape.rows]), shape.channels]
    return [*encode_counts([shape.images]), shape.channels, shape.height, shape.width]


def _decode_shape(encoded: Any) -> Shape:
    count, *numbers = checked(encoded, list)
    (first,) = decode_counts([count])
    return Matrix(first, *numbers) if len(numbers) == 1 else Images(first, *numbers)


def _encode_port(port: Port) -> list[Any]:
    return [port.tensor, port.channels_last, encode_counts(port.shape)]


def _decode_port(encoded: Any) -> Port:
    tensor, channels_last, shape = encoded
    return Port(checked(tensor, int), checked(channels_last, bool), decode_counts(shape))


def _pair(numbers: Any) -> tuple[int, int]:
    one, other = integers(numbers)
    return one, other


def integers(numbers: Any) -> tuple[int, ...]:
    return tuple(checked(number, int) for number in checked(numbers, list))


def checked(value: Any, kind: type) -> Any:
    """Return a value of a type. A bool is no int."""
    if type(value) is not kind:
        raise InputError(f"{value!r:.100} should be of type {kind.__name__}")
    return value
