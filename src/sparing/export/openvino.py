"""OpenVINO: Intel's runtime, fast on dense networks. Needs openvino, onnx, onnxscript and onnxruntime.

It computes with zeros as with any number, but in bf16 where the processor can: without sparse
kernels, that is the rival to beat.
"""

import shutil
import tempfile
from pathlib import Path

from torch import nn

from sparing.errors import InputError
from sparing.export import onnx
from sparing.export.network import Written, check, outputs, plain, random_inputs, require
from sparing.export.runtimes import Process, UnavailableError
from sparing.files import atomic_write
from sparing.macs import Example


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Write a model for OpenVINO, an .xml file with the weights in a .bin file beside it, and check it in fp32.

    Args:
        model: sparsified or plain; it is left as it is.
        path: the file, which must end in `.xml`.
        example: as for `sparing.export.onnx.save`.

    Raises:
        InputError: a package is missing; the path has another suffix; the model cannot be exported, or
            not be read by OpenVINO; what was exported computes something else; a file cannot be written.

    Examples:
        >>> save(sparing.models.resnet8(), "resnet8.xml", (1, 1, 28, 28))  # doctest: +SKIP
    """
    require("openvino", "onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    if path.suffix != ".xml":
        raise InputError(f"{path}: an OpenVINO file must end in .xml; its weights go into a .bin file beside it")
    import openvino

    network = plain(model)
    args, kwargs = random_inputs(example, batch=3)
    with tempfile.TemporaryDirectory() as folder:
        between, made = Path(folder, "network.onnx"), Path(folder, "network.xml")
        onnx.export(network, example).save(between)
        # Not openvino.convert_model, which reports its use over the network.
        try:
            openvino.save_model(openvino.Core().read_model(between), made, compress_to_fp16=False)
        except RuntimeError as failure:
            reason = " ".join(str(failure).split())
            raise InputError(f"OpenVINO cannot read the network: {reason}") from failure
        inputs = [tensor.numpy() for tensor in (*args, *kwargs.values())]
        try:
            with Process("openvino_fp32", made, threads=1) as process:
                got = process.run(inputs)
        except UnavailableError as failure:
            raise InputError(f"OpenVINO cannot execute the network: {failure}") from failure
        error = check(f"{path} in OpenVINO", outputs(network, args, kwargs), got)
        size = made.stat().st_size + made.with_suffix(".bin").stat().st_size
        try:
            # The weights first: a reader that sees the new graph finds the new weights.
            for suffix in (".bin", ".xml"):
                with atomic_write(path.with_suffix(suffix)) as temporary:
                    shutil.copyfile(made.with_suffix(suffix), temporary)
        except OSError as failure:
            raise InputError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    return Written(path, size, error)
