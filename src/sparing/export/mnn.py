"""Export to MNN, a runtime with sparse kernels. Requires mnn, onnx, onnxscript and onnxruntime of `sparing[export]`.

The converter runs with sparse weight detection. It stores only the nonzero weights of sparse layers, and the sparse
kernels of MNN multiply only by these.

Source: Jiang et al., "MNN: A Universal and Efficient Inference Engine", MLSys 2020; sparse kernels for
CPUs with AVX2, AVX-512 or NEON.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import nn

from sparing.errors import InputError
from sparing.export import onnx
from sparing.export.inputs import Example, find_inputs
from sparing.export.network import Written, check_file, plain, require
from sparing.files import atomic_write

SPARSE = ("--detectSparseSpeedUp",)

# Call the extension module directly: the command MNN.tools.mnnconvert installs a package that sends usage statistics.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Convert a model to MNN via ONNX, check its outputs in MNN, and write the file.

    Args:
        model: a sparsified or plain model; it is not modified.
        path: output file, `.mnn`.
        example: as for `sparing.export.onnx.save`.

    Returns:
        Path and size of the file, and the maximum relative error against PyTorch on random inputs.

    Raises:
        InputError: a package is missing; the model cannot be exported or converted; the outputs differ from PyTorch;
            the file cannot be written.

    Examples:
        >>> save(sparing.models.resnet8(), "resnet8.mnn", (1, 1, 28, 28))  # doctest: +SKIP
    """
    require("MNN", "onnx", "onnxscript", "onnxruntime")
    network = plain(model)
    program, inputs = onnx.export(network, find_inputs(network, example))
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder, "network.onnx"), Path(folder, "network.mnn")
        program.save(source)
        convert(source, converted)
        error = check_file(path, converted, "mnn", network, inputs)
        size = converted.stat().st_size
        with atomic_write(path) as temporary:
            shutil.copyfile(converted, temporary)
    return Written(Path(path), size, error)


def convert(source: Path, target: Path, flags: tuple[str, ...] = SPARSE) -> None:
    """Convert an .onnx file to an .mnn file.

    The converter runs in a separate process because it prints to stdout and exits on errors.

    Args:
        source: input file, `.onnx`.
        target: output file, `.mnn`.
        flags: additional options of the converter.

    Raises:
        InputError: the converter fails.
    """
    # --useOriginRNNImpl: if the converter expands recurrent layers into a loop, it crashes on a dynamic batch size.
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--useOriginRNNImpl", *flags]
    command = [sys.executable, "-c", CONVERT, *arguments, "--bizCode", "sparing"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not target.is_file() or "Converted Success" not in done.stdout:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise InputError(f"MNN cannot convert the network: {reason}")
