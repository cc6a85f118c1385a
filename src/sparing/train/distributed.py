"""One run on many ranks: what `torchrun` started, and what its ranks do together.

A process that torchrun did not start is the one rank of a run of its own, for which all of this
does nothing. Every rank holds the whole model and trains on its share of each batch; the ranks
average their gradients (DistributedDataParallel), so weights, thresholds and masks stay equal on all.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.train.build import pick_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model.

    Attributes:
        device: where this rank computes.
        rank: its number, from 0. Rank 0 writes the run directory.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks, in float64: exact for counts."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def ask_first(self, question: Callable[[], Value]) -> Value:
        """What rank 0 answers, on every rank; the others do not run it.

        Raises:
            InputError: the answer is a refusal; it is raised on every rank.
        """
        if self.count == 1:
            return question()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = question()
            except InputError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on every rank."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the ranks; starts from what rank 0 holds."""
        if self.count == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # Masks are computed alike everywhere: handing them out before each step would cost more than the
        # gradients do. The statistics of batch normalization are handed out before they are used.
        wrapper = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # from torch 2.11 or so
        option: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return wrapper(model, ids, **option)

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, such as the statistics of batch normalization."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started; a rank alone in any other process.

    Args:
        device: of a recipe; "auto" gives each rank of a host a GPU of its own, or all of them the CPU.

    Raises:
        InputError: there is no such device here, or a host has more ranks than GPUs.
    """
    if not from_torchrun():
        yield Ranks(pick_device(device))
        return
    here = pick_device(device)
    if here.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"rank {local} of this host has no GPU: there are {gpus}; lower --nproc-per-node")
        here = torch.device("cuda", local)
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Ranks(here, dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is rank 0, or alone: the one that prints."""
    return not from_torchrun() or os.environ["RANK"] == "0"


def from_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
