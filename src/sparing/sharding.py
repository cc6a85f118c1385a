"""Parameters that FSDP2 (`fully_shard`) or tensor parallelism has spread over ranks."""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over ranks: a DTensor, whose module not every build of torch can import."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all ranks, if it is sharded; all ranks must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
