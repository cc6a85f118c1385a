"""Latency of a sparse network against dense baselines in common runtimes.

All backends run the same trained network: the engine of sparing and MNN with its sparse kernels skip the zeros, the
dense baselines do not. Each backend is loaded in a separate process, its outputs are checked against PyTorch, and the
rounds of all backends are interleaved; see `sparing.latency.backends`.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from sparing.errors import InputError, SparsityWarning
from sparing.export import onnx
from sparing.export.inputs import Example, Inputs, find_inputs
from sparing.export.network import check_weights, plain, require
from sparing.latency.backends import BACKENDS, ENGINE, Backend, measure_backends, write_engine, write_files
from sparing.latency.machine import machine
from sparing.latency.timings import Latency, Timing
from sparing.layers import find_layers

SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Sparsities at which `measure` searches for the break-even sparsity."""

SWEEP_BASELINES = ("MNN dense", "ONNX Runtime", "OpenVINO fp32")


def measure(
    model: nn.Module,
    example: Example,
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] | None = None,
    backends: Mapping[str, Backend] = BACKENDS,
    sweep: Sequence[float] = SWEEP,
    rounds: int = 7,
    turn: float = 0.3,
    say: Callable[[str], object] = lambda stage: None,
) -> Latency:
    """Measure the latency of a network in sparse backends and dense baselines, in interleaved rounds.

    If a backend is not installed or cannot run the network, the `note` of its rows gives the reason.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: as for `sparing.export.onnx.save`.
        batches: batch sizes; (1,) if the batch size of the model is fixed at that of the example.
        threads: numbers of threads; None measures 1 and the number of logical processors.
        backends: backend name → backend.
        sweep: sparsities, in [0, 1), at which to search for the break-even sparsity; () skips the search.
        rounds: number of rounds; each backend is measured once per round.
        turn: target duration in seconds of one measurement, which has at least one forward pass.
        say: called with a text when a stage of the measurement begins.

    Returns:
        A `Latency`; `print` shows it as a table.

    Raises:
        InputError: onnx or onnxscript is missing; there are fewer processors than threads; the model cannot be
            exported, is quantized, has inputs in bf16, or has a fixed batch size that is not in `batches`.

    Warns:
        SparsityWarning: the engine could not be measured at a sparsity of the sweep.

    Examples:
        >>> print(measure(model, (1, 3, 224, 224), batches=[1], threads=[1]))  # doctest: +SKIP
    """
    require("onnx", "onnxscript")
    processors = os.cpu_count() or 1
    threads = threads or sorted({1, processors})
    if wrong := [count for count in threads if not 1 <= count <= processors]:
        raise InputError(f"threads must be from 1 to {processors}, the number of logical processors, got {wrong[0]}")
    network = plain(model)
    check_weights(network)
    program, inputs = onnx.export(network, find_inputs(network, example))
    if inputs.fixed and set(batches) != {1}:
        raise InputError(
            f"batches must be (1,), got {tuple(batches)}: the batch size of the model is fixed at that of the example"
        )
    rows: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="sparing-") as name:
        folder = Path(name)
        say("writing the files of the runtimes")
        program.save(folder / "network.onnx")
        failed = write_files(network, inputs, folder, {backend.file for backend in backends.values()})
        files = {name: (backend, folder / backend.file) for name, backend in backends.items()}
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        for count in threads:
            say(f"measuring with {count} thread{'s' if count > 1 else ''}: {', '.join(files)}")
            rows += measure_backends(files, failed, network, inputs, batches, count, rounds, turn)
        if sweep:
            say(f"searching for the break-even sparsity: {', '.join(f'{sparsity:.0%}' for sparsity in sweep)}")
        speedups = _sweep(folder, files, failed, network, inputs, sweep, rounds, turn) if sweep else {}
    layers = find_layers(network).values()
    weights, nonzero = sum(layer.weight.numel() for layer in layers), sum(layer.nonzero() for layer in layers)
    return Latency(tuple(rows), speedups, 1 - nonzero / max(weights, 1), machine(), rounds, sizes)


def available() -> bool:
    """Return whether the packages that `measure_briefly` requires are installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))


def measure_briefly(model: nn.Module, example: Example) -> str:
    """Measure the engine against ONNX Runtime dense in a few seconds. Return the result as one line.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: as for `sparing.export.onnx.save`.

    Raises:
        InputError: as `measure`.
    """
    backends = {name: BACKENDS[name] for name in ("engine", "ONNX Runtime")}
    measured = measure(model, example, batches=(1,), threads=(1,), backends=backends, sweep=(), rounds=5, turn=0.05)
    sparse, dense = measured.rows
    if sparse.seconds is None or dense.seconds is None or dense.speedup is None:
        return f"not measured ({sparse.note or dense.note})"
    return (
        f"{1000 * sparse.seconds:.2f} ms sparse in the engine, {1000 * dense.seconds:.2f} ms dense in ONNX Runtime "
        f"(speedup of {dense.speedup:.2f}x)"
    )


def _sweep(
    folder: Path,
    files: Mapping[str, tuple[Backend, Path]],
    failed: Mapping[str, str],
    network: nn.Module,
    inputs: Inputs,
    sparsities: Sequence[float],
    rounds: int,
    turn: float,
) -> dict[float, float]:
    """Return sparsity → speedup of the engine over the fastest of three fp32 baselines."""
    baselines = {name: files[name] for name in SWEEP_BASELINES if name in files}
    pruned = dict(baselines)
    for sparsity in sparsities:
        path = folder / f"{sparsity}.engine"
        pruned[str(sparsity)] = (Backend(ENGINE, path.name), path)
        try:
            write_engine(randomly_pruned(network, sparsity), inputs, path)
        except InputError as error:
            failed = {**failed, path.name: str(error)}
    seconds: dict[str, float] = {}
    for row in measure_backends(pruned, failed, network, inputs, [1], 1, rounds, turn, checked=False):
        if row.seconds is not None:
            seconds[row.name] = row.seconds
        elif row.name not in baselines:
            warnings.warn(
                f"the engine was not measured at a sparsity of {row.name}: {row.note}", SparsityWarning, stacklevel=3
            )
    dense = [seconds[name] for name in baselines if name in seconds]
    return {s: min(dense) / seconds[str(s)] for s in sparsities if dense and str(s) in seconds}


@torch.no_grad()
def randomly_pruned(network: nn.Module, sparsity: float) -> nn.Module:
    """Return a copy with random normal weights and zeros at random positions, at a uniform sparsity.

    Each weight keeps its Frobenius norm, so that activations keep their magnitude: arithmetic with denormal numbers is
    slow.

    Args:
        network: a densified model.
        sparsity: probability that a weight is zero, in [0, 1).
    """
    pruned, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for layer in find_layers(pruned).values():
        weight = torch.randn(layer.weight.shape, generator=generator).to(layer.weight.dtype)
        weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
        layer.weight.copy_(weight * (layer.weight.norm() / weight.norm().clamp(min=1e-12)))
    return pruned
