"""How fast a sparse network is, beside the same network dense in the runtimes people ship.

All contestants execute one and the same trained network: torch with the convolutions of `native` and MNN with
its sparse kernels, the others with the zeros as numbers. Each is loaded into a process of its own, is checked
against torch, and then they take turns, round by round, so that the machine's drift hits all of them alike.

    ratio of a round = seconds of the rival / seconds of the fastest sparse one        above 1: sparse is faster

What is given is the median over the rounds, with the lowest and the highest.
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
from sparing.export.network import PACKAGES, TOLERANCE, largest_error, outputs, plain, random_inputs, require
from sparing.export.runtimes import Process, UnavailableError
from sparing.layers import find_layers
from sparing.macs import Example

SPARSE = "MNN sparse"

CONTESTANTS = {
    SPARSE: ("mnn", "sparse.mnn"),
    "torch sparse": ("torch_sparse", "sparse.pt2"),
    "MNN dense": ("mnn", "dense.mnn"),
    "ONNX Runtime": ("onnxruntime", "network.onnx"),
    "OpenVINO fp32": ("openvino_fp32", "network.onnx"),
    "OpenVINO bf16": ("openvino_bf16", "network.onnx"),
    "torch eager": ("torch_eager", "network.pt2"),
    "torch compiled": ("torch_compiled", "network.pt2"),
}
"""By name: the runtime, and the file it reads. The first is always there."""

SPARSE_ONES = (SPARSE, "torch sparse")

FP32_RIVALS = ("MNN dense", "ONNX Runtime", "OpenVINO fp32", "torch eager", "torch compiled")

SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Timing:
    """One contestant at one batch size and number of threads.

    Attributes:
        name: of the contestant.
        batch: inputs an execution.
        threads: that the runtime may use.
        seconds: of one execution, the median over the rounds; None if there are none.
        lowest: of the rounds.
        highest: of the rounds.
        ratio: seconds of this contestant / seconds of the fastest sparse one, the median over the rounds.
        ratio_lowest: of the rounds.
        ratio_highest: of the rounds.
        error: the largest difference of its outputs to torch's, as a fraction of the largest output.
        note: why it was not measured.
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
    """What `measure` found.

    Attributes:
        rows: a contestant at a batch size and a number of threads each.
        sweep: for batch 1 and one thread, sparsity → how many times as fast MNN sparse is as the
            fastest fp32 rival, had every weight matrix and kernel that sparsity at random places; empty
            if not measured.
        sparsity: of the network's weights.
        machine: processor, logical processors, versions.
        rounds: how many turns each contestant had.
        sizes: bytes of the files that were timed.
    """

    rows: tuple[Timing, ...]
    sweep: Mapping[float, float]
    sparsity: float
    machine: Mapping[str, Any]
    rounds: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    def groups(self) -> dict[tuple[int, int], list[Timing]]:
        """The rows by (batch, threads)."""
        groups: dict[tuple[int, int], list[Timing]] = {}
        for row in self.rows:
            groups.setdefault((row.batch, row.threads), []).append(row)
        return groups

    def verdict(self, batch: int, threads: int) -> str:
        """In one sentence, whether the zeros pay off here."""
        rows = {row.name: row for row in self.groups()[batch, threads] if row.ratio is not None}
        rivals = [rows[name] for name in FP32_RIVALS if name in rows]
        sparse = [rows[name] for name in SPARSE_ONES if name in rows]
        if not sparse or not rivals:
            return "Not measured: it takes one sparse and one dense runtime."
        fastest = min(sparse, key=lambda row: row.ratio or 0).name
        best = min(rivals, key=lambda row: row.ratio or 0)
        bf16 = rows.get("OpenVINO bf16")
        if (best.ratio or 0) > 1:
            text = f"{fastest} is {best.ratio:.2f} times as fast as the fastest dense fp32 rival, {best.name}"
        else:
            text = f"Sparse loses: {best.name}, dense, is {1 / (best.ratio or 1):.2f} times as fast"
        if bf16 is None or bf16.ratio is None:
            return f"{text}; bf16 was not measured."
        if bf16.ratio > 1:
            return f"{text}. It is {bf16.ratio:.2f} times as fast as dense bf16."
        return f"{text}. Dense bf16, OpenVINO's, is {1 / bf16.ratio:.2f} times as fast as sparse."

    def break_even(self) -> str:
        """In one sentence, below which sparsity not to bother."""
        if not self.sweep:
            return "Below which sparsity zeros no longer pay was not measured."
        losing = [sparsity for sparsity, ratio in self.sweep.items() if ratio <= 1]
        winning = [sparsity for sparsity in self.sweep if sparsity > max(losing, default=-1)]
        if not winning:
            return f"At batch 1 and one thread no sparsity up to {100 * max(self.sweep):g} % pays on this network."
        least = min(winning)
        bound = f"from {100 * max(losing):g} % down it does not pay" if losing else "less was not measured"
        gain = f"{100 * least:g} % at random places pays ({self.sweep[least]:.2f} times)"
        return f"At batch 1 and one thread {gain}; {bound}."

    def bars(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """What was measured, as `sparing.plots.latency_bars` takes it."""
        return {
            f"batch {batch}, {_threads(threads)}": {
                row.name: (row.seconds, row.lowest, row.highest)
                for row in rows
                if row.seconds is not None and row.lowest is not None and row.highest is not None
            }
            for (batch, threads), rows in self.groups().items()
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        content = asdict(self) | {"sweep": {str(sparsity): ratio for sparsity, ratio in self.sweep.items()}}
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.machine['processor']}, {self.rounds} rounds, sparsity {100 * self.sparsity:.2f} %"]
        for (batch, threads), rows in self.groups().items():
            lines += ["", f"batch {batch}, {_threads(threads)}"]
            lines.append(f"{'':<16}{'ms':>9}{'lowest':>9}{'highest':>9}   of the fastest sparse")
            for row in sorted(rows, key=lambda row: (row.seconds is None, row.seconds)):
                lines.append(_line(row))
            lines.append(self.verdict(batch, threads))
        return "\n".join([*lines, "", self.break_even()])


def measure(
    model: nn.Module,
    example: Example,
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] | None = None,
    contestants: Sequence[str] = tuple(CONTESTANTS),
    sweep: Sequence[float] = SWEEP,
    rounds: int = 7,
    turn: float = 0.3,
) -> Latency:
    """Time a sparse network in MNN and in torch, and dense in their rivals, in turns.

    A rival that is not installed, or cannot execute the network, has a row that says so.

    Args:
        model: sparsified or plain; it is left as it is.
        example: as for `sparing.export.onnx.save`.
        batches: batch sizes.
        threads: numbers of threads; None measures 1 and as many as the machine has processors.
        contestants: names of `CONTESTANTS`, with or without MNN sparse, which is always there.
        sweep: sparsities at which to look for the point from which zeros pay; () leaves it out.
        rounds: turns of each contestant.
        turn: seconds a turn is meant to last; one execution at least.

    Raises:
        InputError: onnx, onnxscript or mnn is missing; a name is none of the contestants; the model
            cannot be exported.

    Examples:
        >>> print(measure(model, (1, 3, 224, 224), batches=[1], threads=[1]))  # doctest: +SKIP
    """
    require("onnx", "onnxscript", "MNN")
    for name in contestants:
        if name not in CONTESTANTS:
            raise InputError(f"contestant {name!r} is not known; choose from {', '.join(CONTESTANTS)}")
    names = [name for name in CONTESTANTS if name in {SPARSE, *contestants}]
    threads = threads or sorted({1, os.cpu_count() or 1})
    network = plain(model)
    rows: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="sparing-") as folder:
        failed = _write(network, example, Path(folder), {CONTESTANTS[name][1] for name in names})
        files = {name: (CONTESTANTS[name][0], Path(folder, CONTESTANTS[name][1])) for name in names}
        sizes = {
            path.name: path.stat().st_size
            for path in Path(folder).iterdir()
            if path.suffix in (".onnx", ".mnn", ".pt2")
        }
        for count in threads:
            rows += _race(files, failed, network, example, batches, count, rounds, turn)
        ratios = _sweep(Path(folder), names, failed, network, example, sweep, rounds, turn) if sweep else {}
    layers = find_layers(network).values()
    weights, nonzero = sum(layer.weight.numel() for layer in layers), sum(layer.nonzero() for layer in layers)
    return Latency(tuple(rows), ratios, 1 - nonzero / max(weights, 1), machine(), rounds, sizes)


def available() -> bool:
    """Whether what `measure_briefly` needs is installed."""
    return all(find_spec(name) is not None for name in ("MNN", "onnx", "onnxscript", "onnxruntime"))


def measure_briefly(model: nn.Module, example: Example) -> str:
    """In one line and a few seconds: MNN sparse against ONNX Runtime dense.

    Raises:
        InputError: as `measure`.
    """
    measured = measure(
        model, example, batches=(1,), threads=(1,), contestants=("ONNX Runtime",), sweep=(), rounds=5, turn=0.05
    )
    sparse, dense = measured.rows
    if sparse.seconds is None or dense.seconds is None or dense.ratio is None:
        return f"not measured ({sparse.note or dense.note})"
    return (
        f"{1000 * sparse.seconds:.2f} ms sparse in MNN, {1000 * dense.seconds:.2f} ms dense in ONNX Runtime "
        f"({dense.ratio:.2f} times as fast)"
    )


def _write(network: nn.Module, example: Example, folder: Path, wanted: set[str]) -> dict[str, str]:
    """Write the files the contestants read; what cannot be written is returned with the reason."""
    failed: dict[str, str] = {}
    source = folder / "network.onnx"
    onnx.export(network, example).save(source)
    for name, flags in (("sparse.mnn", mnn.SPARSE), ("dense.mnn", ())):
        if name in wanted:
            try:
                mnn.convert(source, folder / name, flags)
            except InputError as error:
                failed[name] = str(error)
    if "sparse.pt2" in wanted:
        try:
            native.save(network, folder / "sparse.pt2", example)
        except InputError as error:
            failed["sparse.pt2"] = str(error)
    if "network.pt2" in wanted:
        try:
            torch.export.save(onnx.trace(network, example), folder / "network.pt2")
        except InputError as error:
            failed["network.pt2"] = str(error)
    return failed


def _race(
    files: Mapping[str, tuple[str, Path]],
    failed: Mapping[str, str],
    network: nn.Module,
    example: Example,
    batches: Sequence[int],
    threads: int,
    rounds: int,
    turn: float,
) -> Iterator[Timing]:
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
            args, kwargs = random_inputs(example, batch)
            expected = outputs(network, args, kwargs)
            inputs = [tensor.numpy() for tensor in (*args, *kwargs.values())]
            errors: dict[str, float] = {}
            for name, process in list(processes.items()):
                try:
                    errors[name] = largest_error(expected, process.run(inputs))
                except UnavailableError as error:
                    notes[name] = str(error)
                    processes.pop(name).close()
                    continue
                # The files of a sweep, named by their sparsity, hold other weights than what was expected.
                if name in CONTESTANTS and not errors[name] <= _allowed(name):
                    notes[name] = f"gives other outputs than torch: {errors[name]:.2g} of the largest"
                    processes.pop(name).close()
            seconds = _turns(processes, inputs, rounds, turn)
            sparse = [seconds[name] for name in SPARSE_ONES if name in seconds]
            reference = min(sparse, key=statistics.median, default=None)
            for name in files:
                if name in seconds:
                    yield _timing(name, batch, threads, seconds[name], reference, errors[name])
                else:
                    yield Timing(name, batch, threads, note=notes[name])


def _allowed(name: str) -> float:
    """The largest difference to torch, of the largest output; bf16 keeps 8 bits, layer after layer."""
    return 0.1 if name == "OpenVINO bf16" else TOLERANCE


def _turns(processes: Mapping[str, Process], inputs: list[Any], rounds: int, turn: float) -> dict[str, list[float]]:
    """The median seconds of every turn of every process."""
    counts = {}
    for name, process in processes.items():
        process.time(inputs, 1)
        counts[name] = max(1, round(turn / min(process.time(inputs, 2))))
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for index in range(rounds):
        for name in list(processes) if index % 2 == 0 else reversed(list(processes)):
            # Idle since its last turn, a process finds cold caches: the first execution does not count.
            seconds[name].append(statistics.median(processes[name].time(inputs, counts[name] + 1)[1:]))
    return seconds


def _timing(
    name: str, batch: int, threads: int, seconds: list[float], sparse: list[float] | None, error: float
) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(seconds, sparse, strict=True)] if sparse else []
    return Timing(
        name, batch, threads, statistics.median(seconds), min(seconds), max(seconds),
        statistics.median(ratios) if ratios else None, min(ratios, default=None), max(ratios, default=None), error,
    )  # fmt: skip


def _sweep(
    folder: Path,
    names: Sequence[str],
    failed: Mapping[str, str],
    network: nn.Module,
    example: Example,
    sparsities: Sequence[float],
    rounds: int,
    turn: float,
) -> dict[float, float]:
    """Sparsity at random places → how many times as fast as the fastest of the quick fp32 rivals."""
    rivals = {name: CONTESTANTS[name] for name in names if name in ("MNN dense", "ONNX Runtime", "OpenVINO fp32")}
    files = {name: (runtime, folder / file) for name, (runtime, file) in rivals.items()}
    for sparsity in sparsities:
        thinned = folder / f"{sparsity}.onnx"
        _thin(folder / "network.onnx", thinned, sparsity)
        try:
            mnn.convert(thinned, thinned.with_suffix(".mnn"))
        except InputError:
            return {}
        files[str(sparsity)] = ("mnn", thinned.with_suffix(".mnn"))
    rows = {row.name: row for row in _race(files, failed, network, example, [1], 1, rounds, turn)}
    dense = [row.seconds for name, row in rows.items() if name in rivals and row.seconds is not None]
    timed = {sparsity: rows[str(sparsity)].seconds for sparsity in sparsities}
    return {sparsity: min(dense) / seconds for sparsity, seconds in timed.items() if dense and seconds is not None}


def _thin(source: Path, target: Path, sparsity: float) -> None:
    """The network with normal weights, of which this share is zero at random places."""
    import numpy
    import onnx as package

    model = package.load(source)
    random = numpy.random.default_rng(0)
    for initializer in model.graph.initializer:
        weight = package.numpy_helper.to_array(initializer)
        if weight.ndim < 2 or weight.dtype != numpy.float32:
            continue
        drawn = random.normal(0, weight[weight != 0].std() if weight.any() else 1.0, weight.shape)
        drawn[random.random(weight.shape) < sparsity] = 0
        initializer.CopyFrom(package.numpy_helper.from_array(drawn.astype(numpy.float32), initializer.name))
    package.save(model, target)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _line(row: Timing) -> str:
    if row.seconds is None or row.lowest is None or row.highest is None:
        return f"{row.name:<16}{row.note}"
    text = f"{row.name:<16}{1000 * row.seconds:>9.3f}{1000 * row.lowest:>9.3f}{1000 * row.highest:>9.3f}"
    if row.ratio is None:
        return text
    return f"{text}   {row.ratio:.2f} ({row.ratio_lowest:.2f} to {row.ratio_highest:.2f})"


def machine() -> dict[str, Any]:
    """The processor, how many there are, and the versions of what computes."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = named[0] if named else processor
    versions = {"torch": str(torch.__version__)}
    for package in PACKAGES.values():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": processor, "processors": os.cpu_count(), "versions": versions}
