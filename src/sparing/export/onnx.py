"""ONNX: one graph for every other runtime. Needs onnx, onnxscript and onnxruntime of `sparing[export]`.

Zeros are stored as numbers, as ONNX knows no other way that runtimes read: the file has the size of
the dense network, and ONNX Runtime its speed. What becomes of it in MNN is smaller and faster.
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
    """Write a model as ONNX, and check it in ONNX Runtime on random inputs of another batch size.

    Batch normalization is folded into the convolution before it, which keeps its zeros. The batch
    size, the first dimension of every input, stays free.

    Args:
        model: sparsified or plain; it is left as it is.
        path: the file, `.onnx`.
        example: the shape of one input, batch first, as `(1, 3, 224, 224)`; or tensors: one, a tuple, or a
            mapping of keyword arguments.

    Raises:
        InputError: a package is missing; the model cannot be exported; what was exported computes
            something else; the file cannot be written.

    Examples:
        >>> written = save(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "small.onnx", (1, 8))  # doctest: +SKIP
        >>> written.error < 1e-6  # doctest: +SKIP
        True
    """
    require("onnx", "onnxscript", "onnxruntime")
    network = plain(model)
    exported = export(network, example)
    args, kwargs = random_inputs(example, batch=3)
    with _writing(path) as temporary:
        exported.save(temporary)
        error = check(
            f"{path} in ONNX Runtime", outputs(network, args, kwargs), _run(temporary, [*args, *kwargs.values()])
        )
        size = temporary.stat().st_size
    return Written(Path(path), size, error)


def export(network: nn.Module, example: Example) -> "torch.onnx.ONNXProgram":
    """The ONNX program of a plain model in evaluation mode; inputs and outputs are called input0, output0 and on.

    Raises:
        InputError: torch cannot trace the model, or ONNX has no words for it.
    """
    import onnx_ir  # comes with onnxscript

    traced = trace(network, example)
    with _quiet():
        try:
            program = torch.onnx.export(traced, dynamo=True, optimize=True, verbose=False)
        except Exception as error:  # torch and onnxscript raise almost anything
            raise InputError(f"the model cannot be exported to ONNX: {_reason(error)}") from error
    assert program is not None
    graph = program.model.graph
    for node in graph.all_nodes():
        # Zero is what ONNX means where no value is given; MNN's converter takes what its memory holds.
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor([0.0]))
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for index, value in enumerate(values):
            value.name = f"{kind}{index}"
    return program


def trace(network: nn.Module, example: Example) -> "torch.export.ExportedProgram":
    """The program of a plain model in evaluation mode, as torch.export sees it, with a free batch size.

    Raises:
        InputError: torch cannot trace the model.
    """
    args, kwargs = random_inputs(example, batch=2)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch")
    free: Any = {name: {0: batch} for name in kwargs} or tuple({0: batch} for _ in args)
    # Fused kernels for inference, such as the transformer's, have no counterpart elsewhere.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _quiet():
            return torch.export.export(network, args, kwargs, dynamic_shapes=free)
    except Exception as error:  # torch raises almost anything
        raise InputError(f"the model cannot be traced for export: {_reason(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _writing(path: str | Path) -> Iterator[Path]:
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
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own insides, which nobody who exports can mend."""
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
    """The first line that says something, of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
