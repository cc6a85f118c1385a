"""Export to ONNX. Requires onnx, onnxscript and onnxruntime of `sparing[export]`.

Zeros are stored explicitly because runtimes do not read the sparse tensors of ONNX. The file is as large as that of
the dense network, and ONNX Runtime is not faster. `sparing.export.mnn` converts the file to a sparse one.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sparing.errors import InputError, SparsityWarning
from sparing.export.inputs import Example, Inputs, find_inputs, output_names
from sparing.export.network import Written, check_file, plain, require, root_cause
from sparing.files import atomic_write

LARGEST = 1536 * 1024**2
"""Maximum bytes of weights. torch.onnx writes the weights of a larger network to a second file."""


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Export a model to ONNX, check its outputs in ONNX Runtime, and write the file.

    Batch normalization is folded into the preceding convolution, which keeps the sparsity.

    The batch size is dynamic if a dimension of the inputs is a batch: usually the first one, but for example the second
    one of the state of an LSTM. The check uses random inputs with another batch size. If the batch size is not dynamic,
    it is that of the example.

    The inputs are named as the keywords of a mapping, or as the parameters of the model's `forward`. The outputs are
    named output0, output1, .... A model that returns a mapping, a named tuple or a data class gives them other names.

    Args:
        model: a sparsified or plain model; it is not modified.
        path: output file, `.onnx`.
        example: the shape of one input, batch first, such as `(1, 3, 224, 224)`; or tensors: one, a tuple, or a
            mapping of keyword arguments, whose values may be nested tuples, lists and mappings.

    Returns:
        Path and size of the file, and the maximum relative error against PyTorch on random inputs.

    Raises:
        InputError: a package is missing; the model cannot be exported; the weights have more than 2 GB; ONNX Runtime
            cannot run the model, for example in bf16; the outputs differ from PyTorch; the file cannot be written.

    Warns:
        SparsityWarning: the batch size is fixed.

    Examples:
        >>> written = save(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "small.onnx", (1, 8))  # doctest: +SKIP
        >>> written.error < 1e-6  # doctest: +SKIP
        True
    """
    require("onnx", "onnxscript", "onnxruntime")
    network = plain(model)
    program, inputs = export(network, find_inputs(network, example))
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    weights = sum(constant.nbytes for constant in constants if constant is not None)
    if weights > LARGEST:
        raise InputError(
            f"the model has {weights:,} bytes of weights, more than the {LARGEST:,} of one .onnx file; "
            "export it with sparing.export.openvino.save"
        )
    with atomic_write(path) as temporary:
        program.save(temporary)
        error = check_file(path, temporary, "onnxruntime", network, inputs)
        size = temporary.stat().st_size
    return Written(Path(path), size, error)


def export(network: nn.Module, inputs: Inputs) -> "tuple[torch.onnx.ONNXProgram, Inputs]":
    """Return the ONNX program of a network, and its inputs as `trace` does.

    Args:
        network: a densified model in evaluation mode.
        inputs: its inputs, from `find_inputs`.

    Raises:
        InputError: torch.export cannot trace the model, or an operator has no ONNX equivalent.
    """
    import onnx_ir  # a dependency of onnxscript
    from onnx_ir.passes.common import NameFixPass

    traced, inputs = trace(network, inputs)
    args, kwargs = inputs.sample(2)
    with torch.no_grad():
        result = network(*args, **kwargs)
    input_names = inputs.names(network)
    names = [*input_names, *output_names(result, input_names)]
    with _quiet():
        try:
            program = torch.onnx.export(traced, dynamo=True, optimize=True, verbose=False)
        except Exception as error:  # torch and onnxscript raise exceptions of many types
            raise InputError(f"the model cannot be exported to ONNX: {root_cause(error)}") from error
    assert program is not None
    graph = program.model.graph
    for node in graph.all_nodes():
        # The default value in ONNX is 0, but MNN's converter reads uninitialized memory if no value is given.
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor([0.0]))
    for value, name in zip([*graph.inputs, *graph.outputs], names, strict=True):
        value.name = name
    _name_batch(graph)
    NameFixPass()(program.model)  # renames weights and intermediate values that have the name of an input or output
    return program, inputs


def _name_batch(graph: Any) -> None:
    """Name the dynamic dimension of the inputs batch. torch names it s0, s77 or the like."""
    import onnx_ir

    symbols = {dim.value for value in graph.inputs for dim in value.shape if isinstance(dim, onnx_ir.SymbolicDim)}
    for symbol in symbols:
        for value in [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]:
            sizes = [getattr(dim, "value", dim) for dim in value.shape or ()]  # a number, an expression, or None
            if any(isinstance(size, str) for size in sizes):
                named = [re.sub(rf"\b{symbol}\b", "batch", size) if isinstance(size, str) else size for size in sizes]
                value.shape = onnx_ir.Shape(named)


def trace(network: nn.Module, inputs: Inputs) -> "tuple[torch.export.ExportedProgram, Inputs]":
    """Trace a network with torch.export, with a dynamic batch size where possible.

    Args:
        network: a densified model in evaluation mode.
        inputs: its inputs, from `find_inputs`.

    Returns:
        The program, and its inputs, whose batch size is fixed if the network cannot be traced with a dynamic one.

    Raises:
        InputError: torch.export cannot trace the model.

    Warns:
        SparsityWarning: the batch size is fixed.
    """
    try:
        return _trace(network, inputs), inputs
    except InputError as error:
        if inputs.fixed:
            raise
        fixed = inputs.with_fixed_batch()
        program = _trace(network, fixed)
        reason = f"torch.export cannot trace the model with a dynamic batch size ({root_cause(error)})"
        warnings.warn(f"the batch size is fixed at that of the example: {reason}", SparsityWarning, stacklevel=4)
        return program, fixed


def write_program(program: "torch.export.ExportedProgram", path: Path) -> None:
    """Write a program of torch.export to a .pt2 file.

    Raises:
        InputError: torch.export cannot write it.
    """
    with open(path, "wb") as file:
        try:
            torch.export.save(program, file)
        except Exception as error:  # torch raises exceptions of many types
            raise InputError(f"torch.export cannot write the network: {root_cause(error)}") from error


def _trace(network: nn.Module, inputs: Inputs) -> "torch.export.ExportedProgram":
    args, kwargs = inputs.sample(2)  # torch.export specializes a batch size of 1 to a constant
    batch, shapes = torch.export.Dim("batch"), torch.export.ShapesCollection()
    for tensor, dim in zip(tree_leaves((args, kwargs)), inputs.batch_dims, strict=True):
        if dim is not None:
            shapes[tensor] = {dim: batch}
    # Other runtimes have no equivalent of fused inference kernels such as that of the transformer encoder.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _quiet():
            return torch.export.export(network, args, kwargs, dynamic_shapes=shapes)  # type: ignore[arg-type]
    except Exception as error:  # torch raises exceptions of many types
        quantized = [name for name, module in network.named_modules() if "ao.nn.quantized" in type(module).__module__]
        reason = f"{quantized[0]!r} is quantized; export before quantization" if quantized else root_cause(error)
        raise InputError(f"the model cannot be traced for export: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


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
