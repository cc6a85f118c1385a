"""Time a network in several runtimes, in interleaved rounds.

Each backend runs in its own process. In every round each backend is timed once, in alternating order, so that a change
in the speed of the machine affects all of them.

    speedup in a round = seconds of the backend / seconds of the fastest sparse backend    above 1: sparse is faster
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparing import engine
from sparing.errors import InputError
from sparing.export import mnn, onnx
from sparing.export.inputs import Inputs
from sparing.export.network import arrays, max_relative_error, outputs, tolerance
from sparing.export.runtimes import Process, UnavailableError
from sparing.latency.timings import BF16_BASELINE, SPARSE_BACKENDS, Timing


@dataclass(frozen=True)
class Backend:
    """A runtime, and how to use it.

    Attributes:
        runtime: as for `sparing.export.runtimes.Process`.
        file: name of the file that it loads, one that `write_files` writes.
        threads: number of threads, whatever the number of threads of the group; None for that of the group.
        huge_pages: whether the process uses huge pages; see `sparing.export.runtimes.Process`.
    """

    runtime: str
    file: str
    threads: int | None = None
    huge_pages: bool = True


ENGINE = "sparing.latency.engine_runtime:load"

BACKENDS = {
    "engine": Backend(ENGINE, "model.engine"),
    "MNN sparse": Backend("mnn", "sparse.mnn"),
    "MNN dense": Backend("mnn", "dense.mnn"),
    "ONNX Runtime": Backend("onnxruntime", "network.onnx"),
    "OpenVINO fp32": Backend("openvino_fp32", "network.onnx"),
    BF16_BASELINE: Backend("openvino_bf16", "network.onnx"),
    "torch eager": Backend("torch_eager", "network.pt2"),
    "torch compiled": Backend("torch_compiled", "network.pt2"),
}
"""Backend name → runtime and file."""


def write_files(network: nn.Module, inputs: Inputs, folder: Path, wanted: set[str]) -> dict[str, str]:
    """Write the files that backends load.

    Args:
        network: a densified model in evaluation mode, on the CPU.
        inputs: its inputs.
        folder: directory of the files. It contains `network.onnx`.
        wanted: names of the files to write.

    Returns:
        File name → reason, for each file that could not be written.
    """
    failed: dict[str, str] = {}
    source = folder / "network.onnx"
    writers = {
        "model.engine": lambda path: write_engine(network, inputs, path),
        "sparse.mnn": lambda path: mnn.convert(source, path, mnn.SPARSE),
        "dense.mnn": lambda path: mnn.convert(source, path, ()),
        "network.pt2": lambda path: onnx.write_program(onnx.trace(network, inputs)[0], path),
    }
    for name, write in writers.items():
        if name in wanted:
            try:
                write(folder / name)
            except InputError as error:
                failed[name] = str(error)
    return failed


def write_engine(network: nn.Module, inputs: Inputs, path: Path) -> None:
    """Compile a network for the engine and write it to a file.

    Raises:
        InputError: as `sparing.engine.compile`.
    """
    engine.save(engine.compile(network, inputs), path)


def measure_backends(
    backends: Mapping[str, tuple[Backend, Path]],
    failed: Mapping[str, str],
    network: nn.Module,
    inputs: Inputs,
    batches: Sequence[int],
    threads: int,
    rounds: int,
    turn: float,
    checked: bool = True,
) -> Iterator[Timing]:
    """Load each backend in a process, check its outputs, and time all of them.

    Args:
        backends: backend name → backend and its file.
        failed: file name → reason, for files that could not be written.
        network: the network, as the reference for the outputs.
        inputs: its inputs.
        batches: batch sizes.
        threads: number of threads.
        rounds: number of rounds.
        turn: target duration in seconds of one measurement.
        checked: whether the files have the weights of the network, so that the outputs can be checked.

    Yields:
        One `Timing` per batch size and backend.
    """
    notes = {name: failed[path.name] for name, (_, path) in backends.items() if path.name in failed}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, (backend, path) in backends.items():
            if name not in notes:
                try:
                    process = Process(backend.runtime, path, backend.threads or threads, huge_pages=backend.huge_pages)
                    processes[name] = stack.enter_context(process)
                except UnavailableError as error:
                    notes[name] = str(error)
        for batch in batches:
            args, kwargs = inputs.sample(batch)
            expected = outputs(network, args, kwargs)
            given = arrays(network, (args, kwargs))
            errors: dict[str, float] = {}
            for name, process in list(processes.items()):
                try:
                    got = process.run(given)
                    if checked:
                        errors[name] = max_relative_error(expected, got)
                        if not errors[name] <= _tolerance(name, network):
                            found = f"maximum relative error {errors[name]:.2g}"
                            raise UnavailableError(f"output mismatch with PyTorch: {found}")
                except UnavailableError as error:
                    notes[name] = str(error)
                    processes.pop(name).close()
            passes = _interleaved_times(processes, given, rounds, turn)
            sparse = [_medians(passes[name]) for name in SPARSE_BACKENDS if name in passes]
            reference = min(sparse, key=statistics.median, default=None)
            for name in backends:
                if name in passes:
                    yield _timing(name, batch, threads, passes[name], reference, errors.get(name))
                else:
                    yield Timing(name, batch, threads, note=notes[name])


def _timing(
    name: str, batch: int, threads: int, turns: list[list[float]], reference: list[float] | None, error: float | None
) -> Timing:
    """Summarize the seconds of each forward pass in each round; `reference` has the sparse median of each round."""
    own = _medians(turns)
    speedups = [a / b for a, b in zip(own, reference, strict=True)] if reference else []
    return Timing(
        name, batch, threads, statistics.median(own), min(own), max(own), min(map(min, turns)),
        statistics.median(speedups) if speedups else None, min(speedups, default=None), max(speedups, default=None),
        error,
    )  # fmt: skip


def _medians(turns: list[list[float]]) -> list[float]:
    return [statistics.median(seconds) for seconds in turns]


def _tolerance(name: str, network: nn.Module) -> float:
    """Return the allowed maximum relative error; bf16 has 8 significant bits and rounds in every layer."""
    return max(0.1 if name == BF16_BASELINE else 0.0, tolerance(network))


def _interleaved_times(
    processes: Mapping[str, Process], inputs: list[Any], rounds: int, turn: float
) -> dict[str, list[list[float]]]:
    """Return the seconds of each forward pass of each process in each round."""
    counts = {}
    for name, process in processes.items():
        process.time(inputs, 1)
        counts[name] = max(1, round(turn / min(process.time(inputs, 2))))
    seconds: dict[str, list[list[float]]] = {name: [] for name in processes}
    for index in range(rounds):
        for name in list(processes) if index % 2 == 0 else reversed(list(processes)):
            # Discard the first forward pass: the caches are cold after the other processes ran.
            seconds[name].append(processes[name].time(inputs, counts[name] + 1)[1:])
    return seconds
