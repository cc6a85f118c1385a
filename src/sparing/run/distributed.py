"""Distributed data-parallel training with `torchrun`.

Every rank holds the whole model and trains on its share of each batch. The ranks average their gradients
(DistributedDataParallel), so weights, thresholds and masks stay equal on all of them. A process that was not started
by torchrun is the only rank of its run, and nothing here communicates.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.run.build import pick_device
from sparing.run.watch import ANOTHER_ENDED, Watch

Value = TypeVar("Value")

LOST_CONNECTION = r"Connection (closed|reset|refused)|Broken pipe|Socket|NCCL|remote process exited"
"""Found in the errors of torch's backends if another rank has ended. They have no type of their own."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one model, as seen from this process.

    Attributes:
        device: device of this process.
        rank: number of this process, from 0. Rank 0 writes the run directory.
        count: number of ranks.
        watch: finds a rank that stopped; None if this process is the only one.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    watch: Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which writes and prints."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, in float64, which is exact for counts."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self._enter():
            dist.all_reduce(tensor)
        return tensor

    def max(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over all ranks."""
        if not self._enter():
            return list(numbers)
        tensor = torch.tensor(numbers)  # on the CPU, so that no rank waits for its GPU
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Check that all ranks have the same values.

        Args:
            what: what the values are, for the message.
            values: values by name.

        Raises:
            InputError: they differ. It is raised on every rank, and names the first difference.
        """
        first, *others = self.gather(dict(values))
        for rank, theirs in enumerate(others, start=1):
            for key in first | theirs:
                if first.get(key) != theirs.get(key):
                    raise InputError(
                        f"the ranks have different {what}: {key} is {first.get(key)!r} on rank 0 and "
                        f"{theirs.get(key)!r} on rank {rank}; start all ranks with the same files and options"
                    )

    def run_on_first(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 only, and return its result on every rank.

        Raises:
            InputError: the function raised it; it is raised on every rank.
        """
        if not self._enter():
            return function()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = function()
            except InputError as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, device=self.device)
        if result[1] is not None:
            raise result[1]
        return result[0]  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the order of the ranks, on every rank."""
        values: list[Any] = [value] * self.count
        if self._enter():
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model, wrapped to average gradients over the ranks, with the state of rank 0 on all of them."""
        if self.count == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # Buffers are not broadcast at each step. Masks are computed identically on every rank, and broadcasting them
        # would cost more than averaging the gradients. Statistics of batch normalization: see share_buffers().
        wrapper = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # in torch 2.11 or later
        option: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return wrapper(model, ids, **option)

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0, such as the statistics of batch normalization, to all ranks."""
        if self._enter():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def _enter(self) -> bool:
        """Count the collective operation that is about to begin, and return whether there are several ranks."""
        if self.watch is not None:
            self.watch.entered += 1
        return self.count > 1


@contextmanager
def join(device: str, timeout: float = 300.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun started; a process started without it is the only rank.

    Args:
        device: `device` of the recipe; "auto" gives each rank of a host its own GPU, or the CPU to all of them.
        timeout: seconds after which the run ends if a rank stops; `rank_timeout` of the recipe.

    Raises:
        InputError: the device is not available, or a host has more ranks than GPUs; another rank has ended.
    """
    if not from_torchrun():
        yield Ranks(pick_device(device))
        return
    own = pick_device(device)
    if own.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"rank {local} of this host has no GPU: the host has {gpus}; lower --nproc-per-node")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    # Longer than the watch waits, which names the rank. Small values are exchanged by gloo, without the GPU.
    limit = timedelta(seconds=max(1800.0, 2 * timeout))
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=limit)
    rank, count = dist.get_rank(), dist.get_world_size()
    watch = Watch(rank, count, timeout) if count > 1 else None
    failed = True
    try:
        yield Ranks(own, rank, count, watch)
        dist.barrier()
        failed = False
    except RuntimeError as error:
        if watch is None or not re.search(LOST_CONNECTION, str(error)):
            raise
        raise InputError(f"rank {rank}: {ANOTHER_ENDED}") from error
    finally:
        if watch is None or watch.leave(failed):
            dist.destroy_process_group()


def is_first_process() -> bool:
    """Return whether this process is the one that prints: rank 0, or not started by torchrun."""
    return not from_torchrun() or os.environ["RANK"] == "0"


def from_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
