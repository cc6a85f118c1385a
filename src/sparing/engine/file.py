"""Compiled networks in a file: safetensors with the program as JSON in the metadata.

The tensors are the constants of the operators in PyTorch and, per convolution of the engine, the nonzero weights with
their positions. Loading runs no code of the file: it builds segments and a program, which check themselves, and the
operators of PyTorch must be permitted.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from sparing.engine.encoding import (
    DTYPES,
    TEXT,
    checked,
    decode,
    decode_counts,
    decode_segment,
    encode,
    encode_counts,
    encode_segment,
    integers,
)
from sparing.engine.library import library
from sparing.engine.module import Engine, check_threads
from sparing.engine.program import INTEGER_FUNCTIONS, Call, Constant, Input, Program, Ref, Run, find_function
from sparing.engine.shapes import Count
from sparing.errors import InputError, SparsityWarning
from sparing.files import atomic_write, open_regular, printable

KEY, FORMAT, VERSION = "sparing.engine", "sparing.engine", 1

INTERNAL = {
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_adaptive_avg_pool2d", "_local_scalar_dense",
    "_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_safe_softmax", "_softmax",
    "_to_copy", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_weight_norm",
}  # fmt: skip
"""Permitted operators with an underscore in front. Others are internal, and some do not check their arguments."""

REFUSED = re.compile(
    r"from_file|as_strided|unsafe_|set_|resize|record_stream|pin_memory|fbgemm_|quantized_|mkldnn_|cudnn_|miopen_|mps_"
    r"|to_mkldnn|to_sparse|sparse_|rename|fused_|.*(backward|empty|quantize|qparams|overrideable|segment_reduce|nested)"
)
"""Names of operators that read files or memory, return memory as it is (empty), make other tensors than dense ones on
the CPU, or are for training only. Networks use none of them, and some check their arguments less than others."""


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
        >>> fast = sparing.engine.compile(nn.Linear(8, 4), (1, 8))
        >>> sparing.engine.save(fast, "model.engine")
        PosixPath('model.engine')
    """
    if not isinstance(engine, Engine):
        raise InputError(f"sparing.engine.save writes what compile returns, got {type(engine).__name__}")
    tensors, metadata = contents(engine)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
    return Path(path)


def contents(engine: Engine) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the safetensors file of a compiled network; see `save` for its errors."""
    program = engine.program
    if engine.returns is not None and (other := _other_container(tree_unflatten(*engine.returns))):
        warnings.warn(
            f"the loaded network returns a dict or tuple in place of {other}", SparsityWarning, stacklevel=3
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, tensor in program.constants.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise InputError(f"constant {name!r} has dtype {tensor.dtype}, which cannot be saved")
        tensors[f"constant/{name}"] = tensor
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(program.steps):
        if isinstance(step, Run):
            segment = encode_segment(step.segment, f"{number}", tensors)
            steps.append({"inputs": list(step.inputs), "outputs": list(step.outputs), "segment": segment})
        else:
            _check_operator(step.name)
            arguments = {"args": encode(step.args), "kwargs": encode(dict(step.kwargs))}
            steps.append({"call": step.name, **arguments, "output": step.output, "reason": step.reason})
    # Tied weights are views of one memory, which safetensors does not write.
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    content = {
        "inputs": [
            {"name": one.name, "shape": encode_counts(one.shape), "dtype": str(one.dtype).removeprefix("torch.")}
            for one in program.inputs
        ],
        "arguments": encode(dict(program.arguments)),
        "positional": program.positional,
        "steps": steps,
        "outputs": encode(program.outputs),
        "weights": program.weights,
    }
    header = {"format": FORMAT, "version": VERSION, "crc32": _checksum(content, tensors), "program": content}
    return tensors, {KEY: json.dumps(header)}


def load(path: str | Path, threads: int | None = None) -> Engine:
    """Load a compiled network.

    A file from somebody else cannot run code, but its operators can take any time and memory, and PyTorch raises errors
    of its own at the first call if their arguments do not fit.

    Args:
        path: a file written by `save`.
        threads: number of threads; None is `torch.get_num_threads()`.

    Raises:
        InputError: there is no C++ compiler; the file cannot be read, is of a newer version, or is damaged.

    Examples:
        >>> path = sparing.engine.save(sparing.engine.compile(nn.Linear(8, 4), (1, 8)), "model.engine")
        >>> sparing.engine.load(path)(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """
    threads = check_threads(threads)
    library()
    try:
        # safetensors raises exceptions of many types if a file cannot be opened.
        with open_regular(path), safe_open(path, "pt") as file:
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
    for number, step in enumerate(checked(content["steps"], list)):
        if "segment" in step:
            segment = decode_segment(step["segment"], f"{number}", remaining)
            steps.append(Run(segment, integers(step["inputs"]), integers(step["outputs"])))
        else:
            name = checked(step["call"], str)
            _check_operator(name)
            args, kwargs = decode(step["args"]), decode(step["kwargs"])
            output, reason = checked(step["output"], int), printable(checked(step["reason"], str))
            _check_call(name, checked(args, tuple), checked(kwargs, dict))
            steps.append(Call(name, args, kwargs, output, reason))
    if remaining:
        raise InputError(f"tensor {min(remaining)!r} belongs to nothing")
    inputs = tuple(
        Input(checked(one["name"], str), decode_counts(one["shape"]), DTYPES[checked(one["dtype"], str)])
        for one in checked(content["inputs"], list)
    )
    for one in inputs:
        if any(size.per_sample and size.factor == 0 for size in one.shape):
            raise InputError(f"input {one.name} has a size of 0 times the batch size")
    arguments, positional = checked(decode(content["arguments"]), dict), checked(content["positional"], int)
    found = _check_arguments(arguments)
    if sorted(found) != list(range(len(inputs))) or not 0 <= positional <= len(arguments):
        raise InputError("the arguments are not the inputs")
    weights = checked(content["weights"], int)
    program = Program(inputs, arguments, positional, tuple(steps), decode(content["outputs"]), constants, weights)
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


def _checksum(content: Any, tensors: Mapping[str, Tensor]) -> int:
    checksum = crc32(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        checksum = crc32(name.encode(), checksum)
        checksum = crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)  # type: ignore[arg-type]
    return checksum


def _other_container(tree: Any) -> str | None:
    """Return the name of the first container that is not a dict, list or tuple."""
    if isinstance(tree, (Ref, Constant, Count, str)):
        return None
    if type(tree) in (dict, list, tuple):
        items = tree.values() if isinstance(tree, dict) else tree
        return next((name for item in items if (name := _other_container(item))), None)
    return type(tree).__name__ if is_dataclass(tree) or isinstance(tree, Iterable) else None
