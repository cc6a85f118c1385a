"""MNN: the runtime in which zeros save time. Needs mnn, onnx, onnxscript and onnxruntime of `sparing[export]`.

The converter is always told to look for sparse weights. It stores those without their zeros, and MNN
multiplies by nothing else.

Source: Jiang et al., "MNN: A Universal and Efficient Inference Engine", MLSys 2020; its sparse kernels
for CPUs with AVX2, AVX-512 or NEON.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import nn

from sparing.errors import InputError
from sparing.export import onnx
from sparing.export.network import Written, check, outputs, plain, random_inputs, require
from sparing.export.runtimes import Process, UnavailableError
from sparing.files import atomic_write
from sparing.macs import Example

SPARSE = ("--detectSparseSpeedUp",)

# The package's own command, MNN.tools.mnnconvert, installs a package that reports its use over the
# network; the extension module under it does neither.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def save(model: nn.Module, path: str | Path, example: Example) -> Written:
    """Write a model for MNN, by way of ONNX, and check it in MNN on random inputs.

    Args:
        model: sparsified or plain; it is left as it is.
        path: the file, `.mnn`.
        example: as for `sparing.export.onnx.save`.

    Raises:
        InputError: a package is missing; the model cannot be exported or converted; what was
            converted computes something else; the file cannot be written.

    Examples:
        >>> save(sparing.models.resnet8(), "resnet8.mnn", (1, 1, 28, 28))  # doctest: +SKIP
    """
    require("MNN", "onnx", "onnxscript", "onnxruntime")
    network = plain(model)
    args, kwargs = random_inputs(example, batch=3)
    with tempfile.TemporaryDirectory() as folder:
        between, made = Path(folder, "network.onnx"), Path(folder, "network.mnn")
        onnx.export(network, example).save(between)
        convert(between, made)
        inputs = [tensor.numpy() for tensor in (*args, *kwargs.values())]
        try:
            with Process("mnn", made, threads=1) as process:
                got = process.run(inputs)
        except UnavailableError as failure:
            raise InputError(f"MNN cannot execute the network: {failure}") from failure
        error = check(f"{path} in MNN", outputs(network, args, kwargs), got)
        size = made.stat().st_size
        try:
            with atomic_write(path) as temporary:
                shutil.copyfile(made, temporary)
        except OSError as failure:
            raise InputError(f"{path} cannot be written: {failure.strerror or failure}") from failure
    return Written(Path(path), size, error)


def convert(source: Path, target: Path, flags: tuple[str, ...] = SPARSE) -> None:
    """Make an .mnn file of an .onnx file, in a process of its own: the converter prints, and ends on errors.

    Raises:
        InputError: the converter cannot make it.
    """
    # As a loop of small operations, its other choice for recurrent layers, the converter crashes on a free batch.
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--useOriginRNNImpl", *flags]
    command = [sys.executable, "-c", CONVERT, *arguments, "--bizCode", "sparing"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not target.is_file() or "Converted Success" not in done.stdout:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(f"MNN cannot convert the network: {said[-1] if said else f'status {done.returncode}'}")
