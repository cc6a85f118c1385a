"""The soft threshold operator of STR, and its gradient.

    S(W, t) = sign(W) · relu(|W| − t)          t ≥ 0 broadcasts over W

    dL/dW = dL/dS ⊙ 1{S ≠ 0}
    dL/dt = −Σ dL/dS ⊙ sign(S)                 summed over what t was broadcast to

A weight at or under its threshold is exactly zero and gets no gradient; the
others move toward zero by t. In STR the threshold is t = scale · g(s), with s
learned and g one of `MAPS` or any callable from s to numbers ≥ 0.

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for
Learnable Sparsity", ICML 2020, section 3.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.errors import InputError
from sparing.operators import Operator, apply_operator, is_recorded, plain_on_cpu, save

MAPS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "exp": torch.exp}
"""Maps g from the learned number s to a threshold, by the name that recipes use."""


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink every weight toward zero by the threshold, and to exactly zero within it.

    S(W, t) = sign(W) · relu(|W| − t)

    Args:
        weight: W, any shape, floating point.
        threshold: t ≥ 0, of any shape that broadcasts to the shape of `weight`: `(1,)` for one
            threshold per layer, `(out, 1, 1, 1)` for one per filter, `weight.shape` for one per weight.

    Returns:
        The effective weight, with the shape, dtype and memory format of `weight`.

    Raises:
        InputError: the weight is not floating point; the shape of `threshold` does not broadcast to its shape.

    Examples:
        >>> soft_threshold(torch.tensor([-0.5, 0.1, 0.3]), 0.2)
        tensor([-0.3000,  0.0000,  0.1000])
    """
    if not weight.is_floating_point():
        raise InputError(f"soft_threshold needs a floating point weight, got {weight.dtype}")
    threshold = torch.as_tensor(threshold, device=weight.device)
    if not _broadcasts_to(threshold.shape, weight.shape):
        raise InputError(
            f"a threshold of shape {tuple(threshold.shape)} does not broadcast to a weight of shape "
            f"{tuple(weight.shape)}: give (1,) for one per layer, "
            f"{(weight.shape[:1] + (1,) * (weight.dim() - 1)) or (1,)} for one per filter, "
            f"or {tuple(weight.shape)} for one per weight"
        )
    return apply_operator(_SoftThreshold, weight, threshold)


# --8<-- [start:operator]
class _SoftThreshold(Operator):
    """Soft threshold; saves only S, which the layer that uses it saves for its own backward in any case."""

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor) -> Tensor:
        return shrink(weight, threshold.to(weight.dtype))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        save(ctx, output)
        ctx.threshold_shape = inputs[1].shape
        ctx.threshold_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
        (effective,) = ctx.saved_tensors
        if torch.compiler.is_compiling():  # torch.compile fuses this one with what follows
            grad_weight = torch.where(effective == 0, 0.0, grad_output)
        else:  # At λ = 0 the hardshrink backward is grad ⊙ 1{S ≠ 0}: one kernel, no mask in memory.
            grad_weight = torch.ops.aten.hardshrink_backward.default(grad_output, effective, 0.0)
        if not ctx.needs_input_grad[1]:
            return grad_weight, None
        return grad_weight, -signed_sum(grad_weight, effective, ctx.threshold_shape, ctx.threshold_dtype)


def shrink(weight: Tensor, t: Tensor) -> Tensor:
    """Return W − clamp(W, −t, t): the formula to the last bit, in less memory traffic, without negative zeros."""
    if t.numel() == 1 and plain_on_cpu(weight, t) and 0 <= t.item() < math.inf:
        # On a CPU, clamp is vectorized for numbers only. Adding zero makes 0.0 of −0.0.
        return F.softshrink(weight, t.item()).add_(0.0)
    return weight - torch.clamp(weight, -t, t)


# --8<-- [end:operator]


def signed_sum(grad: Tensor, effective: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return Σ grad ⊙ sign(S), summed to a shape in a dtype."""
    sign = effective.sign()
    one = shape.numel() == 1 and dtype == grad.dtype and plain_on_cpu(grad, sign) and not is_recorded(effective)
    if one and sign.stride() == grad.stride() and _is_dense(grad):
        flat = (grad.numel(),), (1,)
        return torch.dot(grad.as_strided(*flat), sign.as_strided(*flat)).view(shape)  # no product in memory
    return sum_to(sign * grad, shape, dtype)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements lie in memory without gaps, in any order."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent + 1 == tensor.numel()


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    aligned = target[len(target) - len(shape) :]
    return all(have in (1, want) for have, want in zip(shape, aligned, strict=True))


def sum_to(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sum a tensor to a shape that broadcasts to it, in `dtype`: a bf16 sum would lose small terms."""
    lead = tensor.dim() - len(shape)
    repeated = [d for d in range(tensor.dim()) if d < lead or (shape[d - lead] == 1 and tensor.shape[d] != 1)]
    if not repeated:
        return tensor.to(dtype).reshape(shape)
    return tensor.sum(repeated, keepdim=True, dtype=dtype).reshape(shape)
