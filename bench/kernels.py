"""Measure the nonzero multiplications per second of sparse convolutions, and those of torch's dense convolution.

    python bench/kernels.py

One thread, batch 1, layers of a ResNet-50 with random masks: the sparse operation of MNN alone, timed with its
profiling hook; the sparse convolution of sparing.export.native; and torch's dense convolution. The time is the minimum
of many interleaved executions, since other processes only add time. Writes results/export/kernels.json.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sparing.export import latency, mnn, native, onnx
from sparing.export.inputs import find_inputs
from sparing.files import write_text

ROOT = Path(__file__).parent.parent
# Input channels, output channels, kernel size, image size.
LAYERS = [
    (64, 64, 3, 56), (64, 256, 1, 56), (256, 64, 1, 56), (128, 128, 3, 28), (512, 128, 1, 28),
    (256, 256, 3, 14), (1024, 256, 1, 14), (256, 1024, 1, 14), (512, 512, 3, 7), (2048, 512, 1, 7), (512, 2048, 1, 7),
]  # fmt: skip
SPARSITIES = (0.9, 0.95)
ROUNDS, CALLS = 10, 8


def in_mnn(layer, x, folder):
    """Return a function that runs the layer in MNN and returns the seconds of its convolution."""
    import MNN

    onnx.export(layer, find_inputs(layer, tuple(x.shape)))[0].save(folder / "layer.onnx")
    mnn.convert(folder / "layer.onnx", folder / "layer.mnn")
    interpreter = MNN.Interpreter(str(folder / "layer.mnn"))
    session = interpreter.createSession({"backend": "CPU", "numThread": 1, "precision": "normal"})
    tensor = interpreter.getSessionInput(session)
    interpreter.resizeTensor(tensor, tuple(x.shape))
    interpreter.resizeSession(session)
    shape, kind = tuple(x.shape), MNN.Tensor_DimensionType_Caffe
    tensor.copyFrom(MNN.Tensor(shape, MNN.Halide_Type_Float, x.numpy(), kind))
    began, took = [0.0], [0.0]

    def before(tensors, info):
        began[0] = time.perf_counter()
        return True

    def after(tensors, info):
        if info.getType() == "Convolution":
            took[0] = time.perf_counter() - began[0]
        return True

    def run():
        interpreter.runSessionWithCallBackInfo(session, before, after)
        return took[0]

    return run


def timed(function):
    def run():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


@torch.inference_mode()
def measure(channels, filters, kernel, side, sparsity, folder):
    layer = nn.Conv2d(channels, filters, kernel, padding=kernel // 2).eval()
    weight = torch.where(torch.rand(layer.weight.shape) < sparsity, 0.0, layer.weight.detach())
    layer.weight.data = weight
    x, bias, padding = torch.randn(1, channels, side, side), layer.bias.detach(), [kernel // 2] * 2
    *compressed, geometry = native.compress(weight, (side, side), (1, 1), padding, (1, 1))
    ours = lambda: native.sparse_conv2d(x, *compressed, bias, None, geometry, False)  # noqa: E731
    torch.testing.assert_close(ours(), F.conv2d(x, weight, bias, padding=padding), rtol=1e-3, atol=1e-4)
    runs = {
        "mnn": in_mnn(layer, x, folder),
        "native": timed(ours),
        "torch_dense": timed(lambda: F.conv2d(x, weight, bias, padding=padding)),
    }
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seconds[name] = min([seconds[name], *(run() for _ in range(CALLS))])
    nonzero = int(torch.count_nonzero(weight)) * side**2
    return {
        "layer": [channels, filters, kernel, side], "sparsity": sparsity, "seconds": seconds,
        "nonzero_macs": nonzero, "macs": weight.numel() * side**2,
    }  # fmt: skip


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(*layer, sparsity, Path(folder)) for sparsity in SPARSITIES for layer in LAYERS]
    for row in rows:
        rates = "  ".join(f"{name} {row['nonzero_macs'] / s / 1e9:6.1f}" for name, s in row["seconds"].items())
        print(f"{row['layer']!s:<22}{row['sparsity']:.2f}  nonzero GMAC/s: {rates}")
    result = {"recipe": "bench/kernels.py", "commit": commit or None, "seed": 0, "runs": 1}
    result |= {"machine": latency.machine(), "rounds": ROUNDS * CALLS, "rows": rows}
    write_text(ROOT / "results" / "export" / "kernels.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
