"""Export to OpenVINO, Intel's runtime. Requires openvino, onnx, onnxscript and onnxruntime of `sparing[export]`.

OpenVINO has no kernels for unstructured sparsity on x86. In bf16, on processors that support it, it is usually the
fastest dense baseline.
"""

import shutil
import tempfile
from pathlib import Path

from torch import nn

from sparing.errors import InputError
from sparing.export import onnx
from sparing.export.inputs import Example, find_inputs
from sparing.export.network import Written, check_file, plain, refusal, require
from sparing.export.runtimes import import_openvino
from sparing.files import atomic_write


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Export a model to OpenVINO, check its outputs in fp32, and write an .xml and a .bin file.

    Args:
        model: a sparsified or plain model; it is not modified.
        path: output file, `.xml`. The weights are written to a file of the same name with the suffix `.bin`.
        example: as for `sparing.export.onnx.save`.

    Returns:
        Path and size of the files, and the maximum relative error against PyTorch on random inputs.

    Raises:
        InputError: a package is missing; the path has another suffix; the model cannot be exported; OpenVINO cannot
            read it; the outputs differ from PyTorch; a file cannot be written.

    Examples:
        >>> save(sparing.models.resnet8(), "resnet8.xml", (1, 1, 28, 28))  # doctest: +SKIP
    """
    require("openvino", "onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    if path.suffix != ".xml":
        raise InputError(f"{path}: the suffix of an OpenVINO file must be .xml, got {path.suffix!r}")
    openvino = import_openvino()
    network = plain(model)
    program, inputs = onnx.export(network, find_inputs(network, example))
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder, "network.onnx"), Path(folder, "network.xml")
        program.save(source)
        try:
            openvino.save_model(openvino.Core().read_model(source), converted, compress_to_fp16=False)
        except RuntimeError as failure:
            raise refusal("OpenVINO cannot read the network", network, failure) from failure
        error = check_file(path, converted, "openvino_fp32", network, inputs)
        size = converted.stat().st_size + converted.with_suffix(".bin").stat().st_size
        # Both are complete before the first is renamed, the weights: a reader of the new graph finds the new weights.
        with atomic_write(path) as graph, atomic_write(path.with_suffix(".bin")) as weights:
            shutil.copyfile(converted, graph)
            shutil.copyfile(converted.with_suffix(".bin"), weights)
    return Written(path, size, error)
