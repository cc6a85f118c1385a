"""Export to ONNX. Requires onnx, onnxscript and onnxruntime of `sparing[export]`.

Zeros are stored explicitly because runtimes do not read the sparse tensors of ONNX. The file is as large as that of
the dense network, and ONNX Runtime is not faster. `sparing.export.mnn` converts the file to a sparse one.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.export.network import Written, check, outputs, plain, random_inputs, require
from sparing.files import atomic_write
from sparing.macs import Example


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Export a model to ONNX, check its outputs in ONNX Runtime, and write the file.

    Batch normalization is folded into the preceding convolution, which keeps the sparsity. The batch size, the first
    dimension of every input, is dynamic. The check uses random inputs with another batch size.

    Args:
        model: a sparsified or plain model; it is not modified.
        path: output file, `.onnx`.
        example: the shape of one input, batch first, such as `(1, 3, 224, 224)`; or tensors: one, a tuple, or a
            mapping of keyword arguments.

    Returns:
        Path and size of the file, and the maximum relative error against PyTorch on random inputs.

    Raises:
        InputError: a package is missing; the model cannot be exported; the outputs differ from PyTorch; the file
            cannot be written.

    Examples:
        >>> written = save(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "small.onnx", (1, 8))  # doctest: +SKIP
        >>> written.error < 1e-6  # doctest: +SKIP
        True
    """
    require("onnx", "onnxscript", "onnxruntime")
    network = plain(model)
    exported = export(network, example)
    args, kwargs = random_inputs(example, batch=3)
    with _output_file(path) as temporary:
        exported.save(temporary)
        error = check(
            f"{path} in ONNX Runtime", outputs(network, args, kwargs), _run(temporary, [*args, *kwargs.values()])
        )
        size = temporary.stat().st_size
    return Written(Path(path), size, error)


def export(network: nn.Module, example: Example) -> "torch.onnx.ONNXProgram":
    """Return the ONNX program of a densified model in evaluation mode.

    The inputs are named input0, input1, ..., the outputs output0, output1, ....

    Args:
        network: a densified model in evaluation mode.
        example: as for `save`.

    Raises:
        InputError: torch.export cannot trace the model, or an operator has no ONNX equivalent.
    """
    import onnx_ir  # a dependency of onnxscript

    traced = trace(network, example)
    with _quiet():
        try:
            program = torch.onnx.export(traced, dynamo=True, optimize=True, verbose=False)
        except Exception as error:  # torch and onnxscript raise exceptions of many types
            raise InputError(f"the model cannot be exported to ONNX: {_reason(error)}") from error
    assert program is not None
    graph = program.model.graph
    for node in graph.all_nodes():
        # The default value in ONNX is 0, but MNN's converter reads uninitialized memory if no value is given.
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor([0.0]))
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for index, value in enumerate(values):
            value.name = f"{kind}{index}"
    return program


def trace(network: nn.Module, example: Example) -> "torch.export.ExportedProgram":
    """Trace a densified model in evaluation mode with torch.export, with a dynamic batch size.

    Args:
        network: a densified model in evaluation mode.
        example: as for `save`.

    Raises:
        InputError: torch.export cannot trace the model.
    """
    args, kwargs = random_inputs(example, batch=2)  # torch.export specializes a batch size of 1 to a constant
    batch = torch.export.Dim("batch")
    dynamic_shapes: Any = {name: {0: batch} for name in kwargs} or tuple({0: batch} for _ in args)
    # Other runtimes have no equivalent of fused inference kernels such as that of the transformer encoder.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _quiet():
            return torch.export.export(network, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # torch raises exceptions of many types
        raise InputError(f"the model cannot be traced for export: {_reason(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _output_file(path: str | Path) -> Iterator[Path]:
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def _run(path: Path, inputs: list[Tensor]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence exporter-internal warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the first non-empty line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
