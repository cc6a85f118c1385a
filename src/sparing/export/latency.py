"""Latency of a sparse network against dense baselines in common runtimes.

All backends run the same trained network: PyTorch with the sparse convolutions of `native` and MNN with its sparse
kernels skip the zeros, the dense baselines do not. Each backend is loaded in a separate process and its outputs are
checked against PyTorch. The backends are then timed in interleaved rounds, so that a change in the speed of the machine
affects all of them.

    ratio of a round = seconds of the backend / seconds of the fastest sparse backend    above 1: sparse is faster

The results are the median, minimum and maximum over the rounds.
"""

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparing.errors import InputError
from sparing.export import mnn, native, onnx
from sparing.export.inputs import Example, Inputs, find_inputs
from sparing.export.network import (
    PACKAGES,
    arrays,
    check_weights,
    max_relative_error,
    outputs,
    plain,
    require,
    tolerance,
)
from sparing.export.runtimes import Process, UnavailableError
from sparing.layers import find_layers

SPARSE = "MNN sparse"

BACKENDS = {
    SPARSE: ("mnn", "sparse.mnn"),
    "torch sparse": ("torch_sparse", "sparse.pt2"),
    "MNN dense": ("mnn", "dense.mnn"),
    "ONNX Runtime": ("onnxruntime", "network.onnx"),
    "OpenVINO fp32": ("openvino_fp32", "network.onnx"),
    "OpenVINO bf16": ("openvino_bf16", "network.onnx"),
    "torch eager": ("torch_eager", "network.pt2"),
    "torch compiled": ("torch_compiled", "network.pt2"),
}
"""Backend name → runtime and the file that it loads. The first is always measured."""

SPARSE_BACKENDS = (SPARSE, "torch sparse")

FP32_BASELINES = ("MNN dense", "ONNX Runtime", "OpenVINO fp32", "torch eager", "torch compiled")

SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Timing:
    """Latency of one backend for one batch size and number of threads.

    Attributes:
        name: backend name.
        batch: batch size.
        threads: number of threads that the runtime may use.
        seconds: seconds per forward pass, median over the rounds; None if not measured.
        lowest: minimum of `seconds` over the rounds.
        highest: maximum of `seconds` over the rounds.
        ratio: seconds of this backend / seconds of the fastest sparse backend, median over the rounds.
        ratio_lowest: minimum of `ratio` over the rounds.
        ratio_highest: maximum of `ratio` over the rounds.
        error: maximum relative error against PyTorch.
        note: reason if the backend was not measured.
    """

    name: str
    batch: int
    threads: int
    seconds: float | None = None
    lowest: float | None = None
    highest: float | None = None
    ratio: float | None = None
    ratio_lowest: float | None = None
    ratio_highest: float | None = None
    error: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Latency:
    """Result of `measure`.

    Attributes:
        rows: one row per backend, batch size and number of threads.
        sweep: sparsity → speedup of MNN sparse over the fastest fp32 baseline of MNN dense, ONNX Runtime and OpenVINO,
            for batch 1, one thread, and uniform sparsity with zeros at random positions; empty if not measured.
        sparsity: sparsity of the network's weights, in [0, 1].
        machine: processor name, number of logical processors, package versions.
        rounds: number of rounds.
        sizes: file name → size in bytes.
    """

    rows: tuple[Timing, ...]
    sweep: Mapping[float, float]
    sparsity: float
    machine: Mapping[str, Any]
    rounds: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    def groups(self) -> dict[tuple[int, int], list[Timing]]:
        """Return the rows grouped by (batch, threads)."""
        groups: dict[tuple[int, int], list[Timing]] = {}
        for row in self.rows:
            groups.setdefault((row.batch, row.threads), []).append(row)
        return groups

    def verdict(self, batch: int, threads: int) -> str:
        """Compare the fastest sparse backend with the dense baselines in one or two sentences.

        Args:
            batch: a batch size that was measured.
            threads: a number of threads that was measured.
        """
        rows = {row.name: row for row in self.groups()[batch, threads] if row.ratio is not None}
        baselines = [rows[name] for name in FP32_BASELINES if name in rows]
        sparse = [rows[name] for name in SPARSE_BACKENDS if name in rows]
        if not sparse or not baselines:
            return "Not measured: requires at least one sparse backend and one dense fp32 baseline."
        fastest = min(sparse, key=lambda row: row.ratio or 0).name
        best = min(baselines, key=lambda row: row.ratio or 0)
        bf16 = rows.get("OpenVINO bf16")
        if (best.ratio or 0) > 1:
            text = f"{fastest} is {best.ratio:.2f}x faster than the fastest dense fp32 baseline, {best.name}"
        else:
            ratio = 1 / (best.ratio or 1)
            text = f"{fastest} is {ratio:.2f}x slower than the fastest dense fp32 baseline, {best.name}"
        if bf16 is None or bf16.ratio is None:
            return f"{text}; bf16 was not measured."
        if bf16.ratio > 1:
            return f"{text}. It is {bf16.ratio:.2f}x faster than dense bf16 (OpenVINO)."
        return f"{text}. It is {1 / bf16.ratio:.2f}x slower than dense bf16 (OpenVINO)."

    def break_even(self) -> str:
        """Describe the break-even sparsity in one sentence."""
        if not self.sweep:
            return "Break-even sparsity was not measured."
        conditions = "batch 1, one thread, zeros at random positions"
        losing = [sparsity for sparsity, ratio in self.sweep.items() if ratio <= 1]
        winning = [sparsity for sparsity in self.sweep if sparsity > max(losing, default=-1)]
        if not winning:
            return f"Break-even sparsity is above {100 * max(self.sweep):g} % ({conditions})."
        least = min(winning)
        if losing:
            bound = f"between {100 * max(losing):g} and {100 * least:g} %"
        else:
            bound = f"at most {100 * least:g} %, the lowest that was measured"
        return (
            f"Break-even sparsity is {bound} ({conditions}); speedup of {self.sweep[least]:.2f}x at {100 * least:g} %."
        )

    def bars(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Return the measured times as the argument of `sparing.plots.latency_bars`."""
        return {
            f"batch {batch}, {_format_threads(threads)}": {
                row.name: (row.seconds, row.lowest, row.highest)
                for row in rows
                if row.seconds is not None and row.lowest is not None and row.highest is not None
            }
            for (batch, threads), rows in self.groups().items()
        }

    def to_json(self) -> str:
        """Return all fields as JSON."""
        content = asdict(self) | {"sweep": {str(sparsity): ratio for sparsity, ratio in self.sweep.items()}}
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.machine['processor']}, {self.rounds} rounds, sparsity {100 * self.sparsity:.2f} %"]
        for (batch, threads), rows in self.groups().items():
            lines += ["", f"batch {batch}, {_format_threads(threads)}"]
            lines.append(f"{'':<16}{'ms':>9}{'min':>9}{'max':>9}   time / fastest sparse (min to max)")
            for row in sorted(rows, key=lambda row: (row.seconds is None, row.seconds)):
                lines.append(_format_row(row))
            lines.append(self.verdict(batch, threads))
        return "\n".join([*lines, "", self.break_even()])


def measure(
    model: nn.Module,
    example: Example,
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] | None = None,
    backends: Sequence[str] = tuple(BACKENDS),
    sweep: Sequence[float] = SWEEP,
    rounds: int = 7,
    turn: float = 0.3,
) -> Latency:
    """Measure the latency of a network in sparse backends and dense baselines, in interleaved rounds.

    If a backend is not installed or cannot run the network, the `note` of its rows gives the reason.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: as for `sparing.export.onnx.save`.
        batches: batch sizes; (1,) if the batch size of the model is fixed at that of the example.
        threads: numbers of threads; None measures 1 and the number of logical processors.
        backends: keys of `BACKENDS`. MNN sparse is always measured.
        sweep: sparsities, in [0, 1], at which to search for the break-even sparsity; () skips the search.
        rounds: number of rounds; each backend is measured once per round.
        turn: target duration in seconds of one measurement, which has at least one forward pass.

    Returns:
        A `Latency`; `print` shows it as a table.

    Raises:
        InputError: onnx, onnxscript or mnn is missing; a backend is unknown; the model cannot be exported, is
            quantized, has inputs in bf16, or has a fixed batch size that is not in `batches`.

    Examples:
        >>> print(measure(model, (1, 3, 224, 224), batches=[1], threads=[1]))  # doctest: +SKIP
    """
    require("onnx", "onnxscript", "MNN")
    for name in backends:
        if name not in BACKENDS:
            raise InputError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    names = [name for name in BACKENDS if name in {SPARSE, *backends}]
    threads = threads or sorted({1, os.cpu_count() or 1})
    network = plain(model)
    check_weights(network)
    program, inputs = onnx.export(network, find_inputs(network, example))
    if inputs.fixed and set(batches) != {1}:
        raise InputError(
            f"batches must be (1,), got {tuple(batches)}: the batch size of the model is fixed at that of the example"
        )
    rows: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="sparing-") as folder:
        program.save(Path(folder, "network.onnx"))
        failed = _write_files(network, inputs, Path(folder), {BACKENDS[name][1] for name in names})
        files = {name: (BACKENDS[name][0], Path(folder, BACKENDS[name][1])) for name in names}
        sizes = {
            path.name: path.stat().st_size
            for path in Path(folder).iterdir()
            if path.suffix in (".onnx", ".mnn", ".pt2")
        }
        for count in threads:
            rows += _measure_backends(files, failed, network, inputs, batches, count, rounds, turn)
        speedups = _sweep(Path(folder), names, failed, network, inputs, sweep, rounds, turn) if sweep else {}
    layers = find_layers(network).values()
    weights, nonzero = sum(layer.weight.numel() for layer in layers), sum(layer.nonzero() for layer in layers)
    return Latency(tuple(rows), speedups, 1 - nonzero / max(weights, 1), machine(), rounds, sizes)


def available() -> bool:
    """Return whether the packages that `measure_briefly` requires are installed."""
    return all(find_spec(name) is not None for name in ("MNN", "onnx", "onnxscript", "onnxruntime"))


def measure_briefly(model: nn.Module, example: Example) -> str:
    """Measure MNN sparse against ONNX Runtime dense in a few seconds. Return the result as one line.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: as for `sparing.export.onnx.save`.

    Raises:
        InputError: as `measure`.
    """
    measured = measure(
        model, example, batches=(1,), threads=(1,), backends=("ONNX Runtime",), sweep=(), rounds=5, turn=0.05
    )
    sparse, dense = measured.rows
    if sparse.seconds is None or dense.seconds is None or dense.ratio is None:
        return f"not measured ({sparse.note or dense.note})"
    return (
        f"{1000 * sparse.seconds:.2f} ms sparse in MNN, {1000 * dense.seconds:.2f} ms dense in ONNX Runtime "
        f"(speedup of {dense.ratio:.2f}x)"
    )


def _write_files(network: nn.Module, inputs: Inputs, folder: Path, wanted: set[str]) -> dict[str, str]:
    """Write the files that the backends load, from network.onnx. Return file name → reason for each that failed."""
    failed: dict[str, str] = {}
    source = folder / "network.onnx"
    for name, flags in (("sparse.mnn", mnn.SPARSE), ("dense.mnn", ())):
        if name in wanted:
            try:
                mnn.convert(source, folder / name, flags)
            except InputError as error:
                failed[name] = str(error)
    if "sparse.pt2" in wanted:
        try:
            native.save(network, folder / "sparse.pt2", inputs)
        except InputError as error:
            failed["sparse.pt2"] = str(error)
    if "network.pt2" in wanted:
        try:
            native.write(onnx.trace(network, inputs)[0], folder / "network.pt2")
        except InputError as error:
            failed["network.pt2"] = str(error)
    return failed


def _measure_backends(
    files: Mapping[str, tuple[str, Path]],
    failed: Mapping[str, str],
    network: nn.Module,
    inputs: Inputs,
    batches: Sequence[int],
    threads: int,
    rounds: int,
    turn: float,
) -> Iterator[Timing]:
    """Load each backend in a process, check its outputs, time all of them. Yield one `Timing` per backend and batch."""
    notes = {name: failed[path.name] for name, (_, path) in files.items() if path.name in failed}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, (runtime, path) in files.items():
            if name not in notes:
                try:
                    processes[name] = stack.enter_context(Process(runtime, path, threads))
                except UnavailableError as error:
                    notes[name] = str(error)
        for batch in batches:
            args, kwargs = inputs.sample(batch)
            expected = outputs(network, args, kwargs)
            given = arrays(network, (args, kwargs))
            errors: dict[str, float] = {}
            for name, process in list(processes.items()):
                try:
                    errors[name] = max_relative_error(expected, process.run(given))
                except UnavailableError as error:
                    notes[name] = str(error)
                    processes.pop(name).close()
                    continue
                # Do not check the files of a sweep (named by their sparsity): they have other weights.
                if name in BACKENDS and not errors[name] <= _tolerance(name, network):
                    notes[name] = f"output mismatch with PyTorch: maximum relative error {errors[name]:.2g}"
                    processes.pop(name).close()
            seconds = _interleaved_times(processes, given, rounds, turn)
            sparse = [seconds[name] for name in SPARSE_BACKENDS if name in seconds]
            reference = min(sparse, key=statistics.median, default=None)
            for name in files:
                if name in seconds:
                    yield _timing(name, batch, threads, seconds[name], reference, errors[name])
                else:
                    yield Timing(name, batch, threads, note=notes[name])


def _tolerance(name: str, network: nn.Module) -> float:
    """Return the allowed maximum relative error; bf16 has 8 significant bits and rounds in every layer."""
    return max(0.1 if name == "OpenVINO bf16" else 0.0, tolerance(network))


def _interleaved_times(
    processes: Mapping[str, Process], inputs: list[Any], rounds: int, turn: float
) -> dict[str, list[float]]:
    """Return the median seconds per forward pass of each process in each round."""
    counts = {}
    for name, process in processes.items():
        process.time(inputs, 1)
        counts[name] = max(1, round(turn / min(process.time(inputs, 2))))
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for index in range(rounds):
        for name in list(processes) if index % 2 == 0 else reversed(list(processes)):
            # Discard the first forward pass: the caches are cold after the other processes ran.
            seconds[name].append(statistics.median(processes[name].time(inputs, counts[name] + 1)[1:]))
    return seconds


def _timing(
    name: str, batch: int, threads: int, seconds: list[float], sparse: list[float] | None, error: float
) -> Timing:
    ratios = [own / reference for own, reference in zip(seconds, sparse, strict=True)] if sparse else []
    return Timing(
        name, batch, threads, statistics.median(seconds), min(seconds), max(seconds),
        statistics.median(ratios) if ratios else None, min(ratios, default=None), max(ratios, default=None), error,
    )  # fmt: skip


def _sweep(
    folder: Path,
    names: Sequence[str],
    failed: Mapping[str, str],
    network: nn.Module,
    inputs: Inputs,
    sparsities: Sequence[float],
    rounds: int,
    turn: float,
) -> dict[float, float]:
    """Return sparsity → speedup of MNN sparse over the fastest of three fp32 baselines."""
    baselines = {name: BACKENDS[name] for name in names if name in ("MNN dense", "ONNX Runtime", "OpenVINO fp32")}
    files = {name: (runtime, folder / file) for name, (runtime, file) in baselines.items()}
    for sparsity in sparsities:
        sparse = folder / f"{sparsity}.onnx"
        _write_random_sparse(folder / "network.onnx", sparse, sparsity)
        try:
            mnn.convert(sparse, sparse.with_suffix(".mnn"))
        except InputError:
            return {}
        files[str(sparsity)] = ("mnn", sparse.with_suffix(".mnn"))
    rows = {row.name: row for row in _measure_backends(files, failed, network, inputs, [1], 1, rounds, turn)}
    dense = [row.seconds for name, row in rows.items() if name in baselines and row.seconds is not None]
    timed = {sparsity: rows[str(sparsity)].seconds for sparsity in sparsities}
    return {sparsity: min(dense) / seconds for sparsity, seconds in timed.items() if dense and seconds is not None}


def _write_random_sparse(source: Path, target: Path, sparsity: float) -> None:
    """Write the network with random normal weights and zeros at random positions, at a uniform sparsity."""
    import numpy
    import onnx as package

    model = package.load(source)
    random = numpy.random.default_rng(0)
    for initializer in model.graph.initializer:
        weight = package.numpy_helper.to_array(initializer)
        if weight.ndim < 2 or weight.dtype != numpy.float32:
            continue
        sampled = random.normal(0, weight[weight != 0].std() if weight.any() else 1.0, weight.shape)
        sampled[random.random(weight.shape) < sparsity] = 0
        initializer.CopyFrom(package.numpy_helper.from_array(sampled.astype(numpy.float32), initializer.name))
    package.save(model, target)


def _format_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _format_row(row: Timing) -> str:
    if row.seconds is None or row.lowest is None or row.highest is None:
        return f"{row.name:<16}{row.note}"
    text = f"{row.name:<16}{1000 * row.seconds:>9.3f}{1000 * row.lowest:>9.3f}{1000 * row.highest:>9.3f}"
    if row.ratio is None:
        return text
    return f"{text}   {row.ratio:.2f} ({row.ratio_lowest:.2f} to {row.ratio_highest:.2f})"


def machine() -> dict[str, Any]:
    """Return the processor name, the number of logical processors and the package versions."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    versions = {"torch": str(torch.__version__)}
    for package in PACKAGES.values():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": processor, "processors": os.cpu_count(), "versions": versions}
