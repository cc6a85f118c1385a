"""Compiled networks in a file: safetensors with the program as JSON in the metadata.

The tensors are the constants of the operators in PyTorch and, per convolution of the engine, the nonzero weights with
their positions. Loading runs no code of the file: it builds the data classes of plan.py and program.py, which check
themselves, and the operators of PyTorch come from a list of permitted ones.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from sparing.engine.library import library
from sparing.engine.module import Engine, check_threads
from sparing.engine.operations import OPERATIONS, Operation
from sparing.engine.program import INTEGER_FUNCTIONS, Call, Constant, Input, Program, Ref, Run, find_function
from sparing.engine.segment import Port, Segment
from sparing.engine.shapes import Count, Images, Matrix, Shape, Window
from sparing.errors import InputError, SparsityWarning
from sparing.files import atomic_write

KEY, FORMAT, VERSION = "sparing.engine", "sparing.engine", 1

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

INTERNAL = {
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_adaptive_avg_pool2d", "_local_scalar_dense",
    "_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_safe_softmax", "_softmax",
    "_to_copy", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_weight_norm",
}  # fmt: skip
"""Permitted operators with an underscore in front. Others are internal, and some do not check their arguments."""

REFUSED = re.compile(
    r"from_file|as_strided|unsafe_|set_|resize|record_stream|pin_memory|fbgemm_|quantized_|mkldnn_|cudnn_|miopen_|mps_"
    r"|to_mkldnn|to_sparse|sparse_|rename|fused_"
)
"""Beginning of the names of operators that read files or memory, or make other tensors than dense ones on the CPU."""


def save(engine: Engine, path: str | Path) -> Path:
    """Write a compiled network to a file, atomically.

    Args:
        engine: from `compile` or `load`.
        path: output file.

    Returns:
        The path.

    Raises:
        InputError: an operator is not permitted in files, such as one that is not from PyTorch; the file cannot be
            written.

    Warns:
        SparsityWarning: the outputs are in another container than a dict, list or tuple. The loaded network returns a
            dict or tuple instead.

    Examples:
        >>> fast = compile(nn.Linear(8, 4), (1, 8))  # doctest: +SKIP
        >>> save(fast, "model.engine")  # doctest: +SKIP
        PosixPath('model.engine')
    """
    if not isinstance(engine, Engine):
        raise InputError(f"sparing.engine.save writes what compile returns, got {type(engine).__name__}")
    path = Path(path)
    program = engine.program
    if engine.returns is not None and (other := _other_container(tree_unflatten(*engine.returns))):
        warnings.warn(
            f"the loaded network returns a dict or tuple in place of {other}", SparsityWarning, stacklevel=2
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, tensor in program.constants.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise InputError(f"constant {name!r} has dtype {tensor.dtype}, which cannot be saved")
        tensors[f"constant/{name}"] = tensor
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(program.steps):
        if isinstance(step, Run):
            segment = _encode_segment(step.segment, f"{number}", tensors)
            steps.append({"inputs": list(step.inputs), "outputs": list(step.outputs), "segment": segment})
        else:
            _check_operator(step.name)
            arguments = {"args": _encode(step.args), "kwargs": _encode(dict(step.kwargs))}
            steps.append({"call": step.name, **arguments, "output": step.output, "reason": step.reason})
    # Tied weights are views of one memory, which safetensors does not write.
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    content = {
        "inputs": [
            {"name": one.name, "shape": _encode_counts(one.shape), "dtype": str(one.dtype).removeprefix("torch.")}
            for one in program.inputs
        ],
        "arguments": _encode(dict(program.arguments)),
        "positional": program.positional,
        "steps": steps,
        "outputs": _encode(program.outputs),
        "weights": program.weights,
    }
    header = {"format": FORMAT, "version": VERSION, "crc32": _checksum(content, tensors), "program": content}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {KEY: json.dumps(header)})
    except OSError as failure:
        raise InputError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    except SafetensorError as failure:
        raise InputError(f"{path} cannot be written: {failure}") from failure
    return path


def load(path: str | Path, threads: int | None = None) -> Engine:
    """Load a compiled network.

    Args:
        path: a file written by `save`.
        threads: number of threads; None is `torch.get_num_threads()`.

    Raises:
        InputError: there is no C++ compiler; the file cannot be read, is of a newer version, or is damaged.
    """
    threads = check_threads(threads)
    library()
    try:
        with open(path, "rb"):
            pass  # safetensors raises exceptions of many types
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as failure:
        raise InputError(f"{path} cannot be read: {failure.strerror or failure}") from failure
    except Exception as failure:
        raise InputError(f"{path} is not a safetensors file, or it is truncated: {failure}") from failure
    try:
        header = json.loads(metadata.get(KEY, "null"))
    except (ValueError, RecursionError) as failure:
        raise InputError(f"{path} is damaged: its metadata is not JSON: {failure}") from failure
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is a safetensors file, but not one of sparing.engine.save")
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise InputError(f"{path} has version {version}, and this sparing reads version {VERSION}; update sparing")
    try:
        if version != VERSION:
            raise InputError(f"unknown version {version!r}")
        content = header["program"]
        if _checksum(content, tensors) != header["crc32"]:
            raise InputError("its checksum is wrong")
        program = _decode_program(content, tensors)
    except InputError as failure:
        raise InputError(f"{path} is damaged: {failure}") from failure
    except Exception as failure:  # wrong types in the JSON raise exceptions of many types
        raise InputError(
            f"{path} is damaged: its program is malformed ({type(failure).__name__}: {failure})"
        ) from failure
    return Engine(program, threads)


def _decode_program(content: Any, tensors: Mapping[str, Tensor]) -> Program:
    """Return the program of a file. The data classes check what they hold."""
    remaining = dict(tensors)
    names = [name for name in tensors if name.startswith("constant/")]
    constants = {name.removeprefix("constant/"): remaining.pop(name) for name in names}
    steps: list[Call | Run] = []
    for number, step in enumerate(_checked(content["steps"], list)):
        if "segment" in step:
            segment = _decode_segment(step["segment"], f"{number}", remaining)
            steps.append(Run(segment, _integers(step["inputs"]), _integers(step["outputs"])))
        else:
            name = _checked(step["call"], str)
            _check_operator(name)
            args, kwargs = _decode(step["args"]), _decode(step["kwargs"])
            output, reason = _checked(step["output"], int), _checked(step["reason"], str)
            _check_call(name, _checked(args, tuple), _checked(kwargs, dict))
            steps.append(Call(name, args, kwargs, output, reason))
    if remaining:
        raise InputError(f"tensor {min(remaining)!r} belongs to nothing")
    inputs = tuple(
        Input(_checked(one["name"], str), _decode_counts(one["shape"]), DTYPES[_checked(one["dtype"], str)])
        for one in _checked(content["inputs"], list)
    )
    for one in inputs:
        if any(size.per_sample and size.factor == 0 for size in one.shape):
            raise InputError(f"input {one.name} has a size of 0 times the batch size")
    arguments, positional = _checked(_decode(content["arguments"]), dict), _checked(content["positional"], int)
    found = _check_arguments(arguments)
    if sorted(found) != list(range(len(inputs))) or not 0 <= positional <= len(arguments):
        raise InputError("the arguments are not the inputs")
    weights = _checked(content["weights"], int)
    program = Program(inputs, arguments, positional, tuple(steps), _decode(content["outputs"]), constants, weights)
    if weights < program.nonzero:
        raise InputError(f"{program.nonzero} weights of {weights} are not zero")
    return program


def _check_arguments(tree: Any) -> list[int]:
    """Return the numbers of the inputs in the arguments."""
    if isinstance(tree, Ref):
        return [tree.index]
    if not isinstance(tree, (dict, list, tuple)):
        raise InputError(f"{tree!r} is not an input")
    return [number for item in (tree.values() if isinstance(tree, dict) else tree) for number in _check_arguments(item)]


def _check_operator(name: str) -> None:
    """Check that an operator may be in a file.

    Raises:
        InputError: it is not an operator of PyTorch; it changes tensors, is internal, or is in `REFUSED`.
    """
    if name in INTEGER_FUNCTIONS:
        return
    namespace, _, rest = name.partition(".")
    short = rest.partition(".")[0]
    internal = short.startswith("_") and short not in INTERNAL
    if namespace != "aten" or internal or REFUSED.match(short) or not TEXT.fullmatch(name):
        raise InputError(f"operator {name!r} is not permitted in a file")
    if find_function(name)._schema.is_mutable:  # type: ignore[attr-defined]
        raise InputError(f"operator {name!r} changes tensors, and is not permitted in a file")


def _check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the number of arguments and the names of keywords."""
    if name in INTEGER_FUNCTIONS:
        fits = len(args) == (1 if name == "neg" else 2) and not kwargs
    else:
        arguments = find_function(name)._schema.arguments  # type: ignore[attr-defined]
        positional = [one.name for one in arguments if not one.kwarg_only]
        required = {one.name for one in arguments if not one.has_default_value()}
        given = {*positional[: len(args)], *kwargs}
        fits = len(args) <= len(positional) and len(given) == len(args) + len(kwargs)
        fits = fits and required <= given <= {one.name for one in arguments}
    if not fits:
        raise InputError(f"operator {name!r} does not take these arguments")


# Arguments.


def _encode(argument: Any) -> Any:
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
        return [_encode(item) for item in argument]
    if isinstance(argument, tuple):
        return {"tuple": [_encode(item) for item in argument]}
    if isinstance(argument, dict):
        return {"dict": [[_checked(key, str), _encode(value)] for key, value in argument.items()]}
    raise InputError(f"{argument!r} of type {type(argument).__name__} cannot be written to a file")


def _decode(argument: Any) -> Any:
    """Return the argument that `_encode` wrote."""
    if argument is None or type(argument) in (bool, int, float):
        return argument
    if isinstance(argument, str):
        if not TEXT.fullmatch(argument):
            raise InputError("a string is not permitted as an argument")
        return argument
    if isinstance(argument, list):
        return [_decode(item) for item in argument]
    ((kind, value),) = argument.items()
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "value":
        return Ref(_checked(value, int))
    if kind == "constant":
        return Constant(_checked(value, str))
    if kind == "count":
        return _decode_counts([value])[0]
    if kind == "dtype":
        return DTYPES[value]
    if kind == "memory_format":
        return MEMORY_FORMATS[value]
    if kind == "layout" and value == "strided":
        return torch.strided
    if kind == "device" and value == "cpu":
        return torch.device("cpu")
    if kind == "tuple":
        return tuple(_decode(item) for item in _checked(value, list))
    if kind == "dict":
        return {_checked(key, str): _decode(item) for key, item in _checked(value, list)}
    raise InputError(f"unknown kind of argument {kind!r}")


# Segments.


def _encode_segment(segment: Segment, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
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


def _decode_segment(encoded: Any, prefix: str, tensors: dict[str, Tensor]) -> Segment:
    """Return a segment. Its tensors are removed from `tensors`."""
    operations: list[Operation] = []
    for number, given in enumerate(_checked(encoded["operations"], list)):
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
        tuple(_decode_shape(shape) for shape in _checked(encoded["tensors"], list)),
        tuple(operations),
        tuple(_decode_port(port) for port in _checked(encoded["inputs"], list)),
        tuple(_decode_port(port) for port in _checked(encoded["outputs"], list)),
    )


def _encode_counts(counts: Iterable[Count]) -> list[Any]:
    return [[count.factor, count.per_sample] for count in counts]


def _decode_counts(counts: Any) -> tuple[Count, ...]:
    return tuple(Count(_checked(factor, int), _checked(per_sample, bool)) for factor, per_sample in counts)


def _encode_shape(shape: Shape) -> list[Any]:
    if isinstance(shape, Matrix):
        return [*_encode_counts([shape.rows]), shape.channels]
    return [*_encode_counts([shape.images]), shape.channels, shape.height, shape.width]


def _decode_shape(encoded: Any) -> Shape:
    count, *numbers = _checked(encoded, list)
    (first,) = _decode_counts([count])
    return Matrix(first, *numbers) if len(numbers) == 1 else Images(first, *numbers)


def _encode_port(port: Port) -> list[Any]:
    return [port.tensor, port.channels_last, _encode_counts(port.shape)]


def _decode_port(encoded: Any) -> Port:
    tensor, channels_last, shape = encoded
    return Port(_checked(tensor, int), _checked(channels_last, bool), _decode_counts(shape))


def _pair(numbers: Any) -> tuple[int, int]:
    one, other = _integers(numbers)
    return one, other


def _integers(numbers: Any) -> tuple[int, ...]:
    return tuple(_checked(number, int) for number in _checked(numbers, list))


def _checked(value: Any, kind: type) -> Any:
    """Return a value of a type. A bool is no int."""
    if type(value) is not kind:
        raise InputError(f"{value!r:.100} should be of type {kind.__name__}")
    return value


def _checksum(content: Any, tensors: Mapping[str, Tensor]) -> int:
    checksum = crc32(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        checksum = crc32(name.encode(), checksum)
        checksum = crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)  # type: ignore[arg-type]
    return checksum


def _other_container(tree: Any) -> str | None:
    """Return the name of the first container that is not a dict, list or tuple."""
    if isinstance(tree, Count) or not isinstance(tree, Iterable) or isinstance(tree, str):
        return None if not hasattr(tree, "__dataclass_fields__") or _is_leaf(tree) else type(tree).__name__
    if type(tree) not in (dict, list, tuple):
        return type(tree).__name__
    items = tree.values() if isinstance(tree, dict) else tree
    return next((name for item in items if (name := _other_container(item))), None)


def _is_leaf(tree: Any) -> bool:
    return isinstance(tree, (Ref, Constant, Count))
