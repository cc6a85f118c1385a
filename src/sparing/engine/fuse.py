"""Fuse operations of the engine."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparing.engine.operations import Affine, Binary, Convolution, Depthwise, LayerNorm, Operation
from sparing.engine.shapes import Shape


def fuse(operations: Sequence[Operation], outputs: set[int], shapes: Sequence[Shape]) -> list[Operation]:
    """Fuse batch norm, sums and activations into the operation before them.

    Args:
        operations: in the order of execution.
        outputs: tensors that are read outside.
        shapes: shape of each tensor.
    """
    fused = list(operations)
    while (pair := _find_pair(fused, outputs, shapes)) is not None:
        before, after, operation = pair
        fused[after] = operation
        del fused[before]
    return fused


def _find_pair(
    operations: Sequence[Operation], outputs: set[int], shapes: Sequence[Shape]
) -> tuple[int, int, Operation] | None:
    """Return the positions of two operations that are one operation, and that one; or None."""
    uses = Counter(tensor for operation in operations for tensor in operation.reads)
    producers = {operation.output: position for position, operation in enumerate(operations)}
    for after, operation in enumerate(operations):
        if not isinstance(operation, (Affine, Binary)):
            continue
        tensors = [t for t in set(operation.reads) if t in producers and uses[t] == 1 and t not in outputs]
        for tensor in sorted(tensors, key=producers.__getitem__, reverse=True):
            before = operations[producers[tensor]]
            if isinstance(operation, Affine):
                merged = _with_affine(before, operation)
            else:
                merged = _with_sum(before, operation, shapes)
            if merged is not None:
                return producers[tensor], after, merged
    return None


def _with_affine(before: Operation, after: Affine) -> Operation | None:
    is_norm = isinstance(before, LayerNorm) and after.activation == "identity"
    if not is_norm and getattr(before, "activation", None) != "identity":
        return None
    changes: dict[str, Any] = {"output": after.output}
    if not is_norm:
        changes["activation"] = after.activation
    scale, bias = after.scale, after.bias
    if scale is None and bias is None:
        return replace(before, **changes)
    if isinstance(before, Affine):
        changes["scale"] = before.scale if scale is None else scale if before.scale is None else before.scale * scale
    elif isinstance(before, LayerNorm):
        changes["weight"] = before.weight if scale is None else before.weight * scale
    elif isinstance(before, Depthwise):
        changes["weight"] = before.weight if scale is None else before.weight * scale[:, None, None]
    elif isinstance(before, Convolution) and (before.residual is None or scale is None):
        if scale is not None:
            changes |= _scaled(before, scale)
    else:
        return None
    own = before.bias
    if own is not None and scale is not None:
        own = own * scale
    changes["bias"] = own if bias is None else bias if own is None else own + bias
    return replace(before, **changes)


def _scaled(convolution: Convolution, scale: Tensor) -> dict[str, Tensor]:
    """Return the weights of a convolution times a factor per filter. A factor of zero removes weights."""
    counts = convolution.starts.diff().long()
    values = convolution.values * scale.repeat_interleave(counts)
    kept = values != 0
    filters = torch.arange(len(counts)).repeat_interleave(counts)[kept]
    starts = torch.bincount(filters, minlength=len(counts)).cumsum(0).int()
    return {
        "values": values[kept],
        "columns": convolution.columns[kept],
        "starts": torch.cat([starts.new_zeros(1), starts]),
    }


def _with_sum(before: Operation, after: Binary, shapes: Sequence[Shape]) -> Operation | None:
    if not isinstance(before, Convolution) or before.activation != "identity" or before.residual is not None:
        return None
    (residual,) = set(after.reads) - {before.output}
    if after.kind != "add" or shapes[residual] != shapes[before.output]:
        return None
    return replace(before, output=after.output, residual=residual, activation=after.activation)
