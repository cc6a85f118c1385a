"""Results of a latency measurement: tables, JSON and sentences."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SPARSE_BACKENDS = ("engine", "MNN sparse")
"""Backends that skip zeros. Speedups are those of the fastest one."""

FP32_BASELINES = ("MNN dense", "ONNX Runtime", "OpenVINO fp32", "torch eager", "torch compiled")
"""Dense backends that compute in fp32, as the sparse ones do."""

BF16_BASELINE = "OpenVINO bf16"

DENSE_BACKENDS = (*FP32_BASELINES, BF16_BASELINE)


@dataclass(frozen=True)
class Timing:
    """Latency of one backend for one batch size and number of threads.

    Attributes:
        name: backend name.
        batch: batch size.
        threads: number of threads that the runtimes of the group may use.
        seconds: seconds per forward pass, median over the rounds of the median of each round; None if not measured.
        lowest: minimum over the rounds of the median of each round.
        highest: maximum over the rounds of the median of each round.
        minimum: minimum over all forward passes.
        speedup: seconds of this backend / seconds of the fastest sparse backend, median over the rounds. Below 1, this
            backend is faster than the sparse ones.
        speedup_lowest: minimum of `speedup` over the rounds.
        speedup_highest: maximum of `speedup` over the rounds.
        error: maximum relative error against PyTorch; None if it was not checked.
        note: reason if the backend was not measured.
    """

    name: str
    batch: int
    threads: int
    seconds: float | None = None
    lowest: float | None = None
    highest: float | None = None
    minimum: float | None = None
    speedup: float | None = None
    speedup_lowest: float | None = None
    speedup_highest: float | None = None
    error: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Latency:
    """Result of `sparing.latency.measure`.

    Attributes:
        rows: one row per backend, batch size and number of threads.
        sweep: sparsity → speedup of the engine over the fastest of MNN dense, ONNX Runtime and OpenVINO in fp32, for
            batch 1, one thread, and uniform sparsity with zeros at random positions; empty if not measured.
        sparsity: sparsity of the network's weights, in [0, 1].
        machine: processor name and flags, number of logical processors, package versions.
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

    def fastest(self, batch: int, threads: int) -> str | None:
        """Return the name of the fastest sparse backend; None if none was measured.

        Args:
            batch: a batch size that was measured.
            threads: a number of threads that was measured.
        """
        rows = [row for row in self.groups()[batch, threads] if row.name in SPARSE_BACKENDS and row.seconds]
        return min(rows, key=lambda row: row.seconds or 0).name if rows else None

    def verdict(self, batch: int, threads: int) -> str:
        """Compare the fastest sparse backend with the dense baselines in one or two sentences.

        Args:
            batch: a batch size that was measured.
            threads: a number of threads that was measured.
        """
        speedups = {row.name: row.speedup for row in self.groups()[batch, threads] if row.speedup is not None}
        baselines = {name: speedups[name] for name in FP32_BASELINES if name in speedups}
        sparse = self.fastest(batch, threads)
        if sparse is None or not baselines:
            return "Not measured: requires at least one sparse backend and one dense fp32 baseline."
        best = min(baselines, key=lambda name: baselines[name])
        text = f"{sparse} is {_compare(baselines[best])} the fastest dense fp32 baseline, {best}"
        if BF16_BASELINE not in speedups:
            return f"{text}; bf16 was not measured."
        return f"{text}. It is {_compare(speedups[BF16_BASELINE])} dense bf16 (OpenVINO)."

    def losses(self) -> str:
        """Name the dense baselines that are faster than the sparse network, in one sentence."""
        dense = [row for row in self.rows if row.name in DENSE_BACKENDS and row.speedup is not None]
        losing = [
            f"{row.name} at batch {row.batch}, {format_threads(row.threads)} ({1 / row.speedup:.2f}x faster)"
            for row in dense
            if row.speedup is not None and _loses(row)
        ]
        if not dense:
            return "Where sparse loses was not measured."
        return f"Sparse loses to {'; '.join(losing)}." if losing else "Sparse loses to no dense baseline."

    def break_even(self) -> str:
        """Describe the break-even sparsity in one sentence."""
        if not self.sweep:
            return "Break-even sparsity was not measured."
        conditions = "batch 1, one thread, zeros at random positions"
        losing = [sparsity for sparsity, speedup in self.sweep.items() if speedup <= 1]
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

    def bars(self) -> dict[str, dict[str, tuple[float, float, float, str]]]:
        """Return the measured times and speedups as the argument of `sparing.plots.latency_bars`."""
        groups: dict[str, dict[str, tuple[float, float, float, str]]] = {}
        for (batch, threads), rows in self.groups().items():
            sparse = self.fastest(batch, threads)
            panel = groups.setdefault(f"batch {batch}, {format_threads(threads)}", {})
            for row in rows:
                if row.seconds is not None and row.lowest is not None and row.highest is not None:
                    label = "" if row.name == sparse or row.speedup is None else f"{row.speedup:.2f}x{_mark(row)}"
                    panel[row.name] = (row.seconds, row.lowest, row.highest, label)
        return groups

    def to_json(self) -> str:
        """Return all fields as JSON."""
        content = asdict(self) | {"sweep": {str(sparsity): ratio for sparsity, ratio in self.sweep.items()}}
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.machine['processor']}, {self.rounds} rounds, sparsity {100 * self.sparsity:.2f} %"]
        for (batch, threads), rows in self.groups().items():
            sparse = self.fastest(batch, threads)
            lines += ["", f"batch {batch}, {format_threads(threads)}"]
            heading = "" if sparse is None else f"   speedup of {sparse} (min to max)"
            lines.append(f"{'':<18}{'ms':>9}{'min':>9}{'max':>9}{heading}")
            for row in sorted(rows, key=lambda row: (row.seconds is None, row.seconds)):
                lines.append(_format_row(row, sparse))
            lines.append(self.verdict(batch, threads))
        return "\n".join([*lines, "", self.losses(), self.break_even()])


def format_threads(count: int) -> str:
    """Return a number of threads as text."""
    return f"{count} thread{'s' if count > 1 else ''}"


def _compare(speedup: float) -> str:
    if round(speedup, 2) == 1:
        return "as fast as"
    return f"{speedup:.2f}x faster than" if speedup > 1 else f"{1 / speedup:.2f}x slower than"


def _loses(row: Timing) -> bool:
    return row.name in DENSE_BACKENDS and row.speedup is not None and round(row.speedup, 2) < 1


def _mark(row: Timing) -> str:
    return ", sparse loses" if _loses(row) else ""


def _format_row(row: Timing, sparse: str | None) -> str:
    if row.seconds is None or row.lowest is None or row.highest is None:
        return f"{row.name:<18}{row.note}"
    text = f"{row.name:<18}{1000 * row.seconds:>9.3f}{1000 * row.lowest:>9.3f}{1000 * row.highest:>9.3f}"
    if row.speedup is None or row.name == sparse:
        return text
    spread = f"({row.speedup_lowest:.2f} to {row.speedup_highest:.2f})"
    return f"{text}   {row.speedup:.2f}x {spread}{_mark(row)}"
