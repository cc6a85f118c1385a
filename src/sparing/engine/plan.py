"""Plans: segments with memory and layouts for one batch size, ready to run.

A `Plan` is the C++ side of kernels/engine.h. `Plans` keeps those of one segment.
"""

import ctypes
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.engine import library as compiled
from sparing.engine.segment import Segment
from sparing.errors import InputError

CACHE = 8 * 2**20
"""Bytes of the tensors of a plan, beyond which a large batch runs in parts."""

ROWS = 16
"""The rows of a matrix are computed in vectors of up to so many. Parts of a large batch fill them."""

NO_DATA = "the engine needs tensors with data in memory; pass a plain torch.Tensor"

PLANS = 4
"""Maximum number of batch sizes whose plans are kept."""


class Plans:
    """A segment with its plans, one per batch size.

    A large batch runs in parts whose tensors stay in the cache of the processor: ResNet-50 takes 1.7 times as long per
    image if each operation runs on 16 images before the next one.

    Args:
        segment: what to run.
        threads: number of threads.
        shared: run on the threads of PyTorch, if there are as many and they are those of OpenMP.
    """

    def __init__(self, segment: Segment, threads: int, shared: bool = False):
        self.segment, self.threads, self.shared = segment, threads, shared
        self._clear()

    def _clear(self) -> None:
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._bytes = 0  # of a plan for one sample
        self._lock = threading.Lock()
        self._process = os.getpid()

    def run(self, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
        """Run the operations. Calls from several threads wait for one another.

        Args:
            inputs: one float32 tensor on the CPU per input of the segment, of the shape of its port.
            batch: batch size.

        Returns:
            One new tensor per output of the segment.

        Raises:
            InputError: the inputs have other shapes; the library of the engine is missing, or refuses the operations.
        """
        segment = self.segment
        try:
            given = [tensor.detach().as_subclass(Tensor).contiguous() for tensor in inputs]
        except TypeError as error:  # a subclass that holds other tensors
            raise InputError(NO_DATA) from error
        for tensor, port in zip(given, segment.inputs, strict=True):
            shape = port.at(batch)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise InputError(
                    f"the engine needs a float32 tensor of shape {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
        results = [torch.empty(port.at(batch), dtype=torch.float32, device="cpu") for port in segment.outputs]
        if self._process != os.getpid():  # a forked process has neither threads of the plans nor of OpenMP
            self._clear()
            self.shared = False
        with self._lock:
            step = self._find_step(batch)
            for first in range(0, batch, step):
                count = min(step, batch - first)
                self._find(count).run(
                    [_part(tensor, first, count, batch) for tensor in given],
                    [_part(tensor, first, count, batch) for tensor in results],
                )
        return results

    def prepare(self, batch: int) -> None:
        """Make the plans that a batch size needs, and delete all others."""
        with self._lock:
            step = self._find_step(batch)
            needed = {min(step, batch - first) for first in range(0, batch, step)}
            for count in needed:
                self._find(count)
            for count in self._plans.keys() - needed:
                del self._plans[count]

    def profile(self) -> list[tuple[str, float]]:
        """Return name and seconds of each operation in the last part of a run. The first call turns the clocks on."""
        return next(reversed(self._plans.values())).profile()

    def _find_step(self, batch: int) -> int:
        """Return the number of samples that run at once."""
        if batch == 1 or not self.segment.is_per_sample:
            return batch
        if not self._bytes:
            self._bytes = self._find(1).bytes
        parts = -(-batch // max(self.threads, CACHE // self._bytes))
        step = -(-batch // parts)
        return step if step < ROWS else -(-step // ROWS) * ROWS

    def _find(self, batch: int) -> "Plan":
        if batch not in self._plans:
            shared = self.shared and self.threads == torch.get_num_threads()
            self._plans[batch] = Plan(self.segment, batch, self.threads, shared)
        self._plans.move_to_end(batch)
        while len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return self._plans[batch]


class Plan:
    """A segment for one batch size, ready to run: the C++ side, with memory and layouts.

    Args:
        segment: what to run.
        batch: batch size.
        threads: number of threads.
        shared: run on the threads of OpenMP, if there is one.

    Raises:
        InputError: the library of the engine is missing, or refuses the operations.
    """

    def __init__(self, segment: Segment, batch: int, threads: int, shared: bool = False):
        self._library = library = compiled.library()
        handle = library.sparing_plan(threads, compiled.openmp() if shared else None)
        if not handle:
            raise InputError(f"the engine cannot make a plan: {_error(library)}")
        self._handle: int = handle
        # Not at exit: another thread may be running the plan.
        weakref.finalize(self, _free, library, handle, os.getpid()).atexit = False
        for shape in segment.tensors:
            self._check(library.sparing_tensor(handle, *shape.at(batch)))
        for port in segment.inputs:
            self._check(library.sparing_input(handle, port.tensor, int(port.channels_last)))
        for operation in segment.operations:
            self._check(operation.add_to(library, handle))
        for port in segment.outputs:
            self._check(library.sparing_output(handle, port.tensor, int(port.channels_last)))
        self._check(library.sparing_finish(handle))

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return self._check(self._library.sparing_bytes(self._handle))

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run the operations. The tensors must be contiguous, and fit the ports of the segment."""
        self._check(self._library.sparing_run(self._handle, _pointers(inputs), _pointers(outputs)))

    def profile(self) -> list[tuple[str, float]]:
        """Return name and seconds of each operation of the last run. The first call turns the clocks on."""
        library, handle = self._library, self._handle
        self._check(library.sparing_profile(handle, 1))
        return [
            (library.sparing_operation(handle, index).decode(), library.sparing_seconds(handle, index))
            for index in range(self._check(library.sparing_operations(handle)))
        ]

    def _check(self, result: int) -> int:
        if result < 0:
            raise InputError(f"the engine refuses an operation: {_error(self._library)}")
        return result


def _part(tensor: Tensor, first: int, count: int, batch: int) -> Tensor:
    """Return samples [first, first + count) of a tensor of `batch` samples."""
    if count == batch:
        return tensor  # the first dimension need not be the batch
    rows = len(tensor) // batch
    return tensor[first * rows : (first + count) * rows]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    for tensor in tensors:
        if type(tensor) is not Tensor or (tensor.numel() and not tensor.data_ptr()):
            raise InputError(NO_DATA)
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _free(library: ctypes.CDLL, handle: int, process: int) -> None:
    if os.getpid() == process:  # a forked process has no threads that could be stopped
        library.sparing_free(handle)


def _error(library: ctypes.CDLL) -> str:
    return (library.sparing_error() or b"unknown error").decode(errors="replace")
