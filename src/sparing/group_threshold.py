"""Thresholds for groups of weights: the group soft threshold, and the curve of Feather.

    ‖W_G‖ = sqrt(mean of W_i² over the group G)       the root mean square, |W| for a single weight

    soft     S_G = W_G · relu(1 − t / ‖W_G‖)
    feather  S_G = W_G · relu(1 − (t / ‖W_G‖)³)^(1/3)

A group whose norm is at or under the threshold t is exactly zero. For groups of one weight the first line is
the soft threshold of STR, which `soft_threshold` computes faster. A *view* (a shape that splits dimensions of
the weight) and *dims* (the dimensions of that view that a group spans) say what the groups are; see
`sparing.patterns`.

Source: the proximal operator of the group lasso, Yuan & Lin, "Model selection and estimation in regression
with grouped variables", 2006, with the threshold in units of a single weight. Feather: Glentis Georgoulakis,
Retsinas & Maragos, BMVC 2023.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from sparing.operators import Operator, apply_operator, in_forward_mode, masked, save
from sparing.threshold import signed_sum, sum_to

Shape = tuple[int, ...]


def group_norm(weight: Tensor, view: Shape, dims: Shape) -> Tensor:
    """Return the root mean square of each group, in float32 or wider; |W| in its own dtype where `dims` is empty.

    Args:
        weight: any shape.
        view: the shape to view it in.
        dims: the dimensions of `view` that a group spans; they are kept with size 1.

    Examples:
        >>> group_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), (2, 2), (1,)).flatten()
        tensor([3.5355, 0.0000])
    """
    if not dims:
        return weight.abs()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight.reshape(view), dim=dims, keepdim=True, dtype=dtype)
    return norm / prod([view[d] for d in dims]) ** 0.5  # type: ignore[no-any-return]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider: small differences and long sums are lost to rounding in half precision.

    Examples:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype, wide(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def group_soft_threshold(weight: Tensor, threshold: Tensor, view: Shape, dims: Shape) -> Tensor:
    """Shrink every group of weights toward zero by the threshold, and to exactly zero within it.

    S_G = W_G · relu(1 − t / ‖W_G‖)

    dL/dW_G = (1 − t / ‖W_G‖) dL/dS_G + t / (n ‖W_G‖³) · ⟨dL/dS_G, W_G⟩ · W_G      where ‖W_G‖ > t, n = |G|
    dL/dt   = −Σ_G ⟨dL/dS_G, W_G⟩ / ‖W_G‖

    Args:
        weight: W, floating point.
        threshold: t ≥ 0 in units of a single weight, of a shape that broadcasts to the group norms.
        view: the shape to view W in.
        dims: the dimensions of `view` that a group spans.

    Returns:
        The effective weight, with shape and dtype of `weight`.

    Examples:
        >>> group_soft_threshold(torch.tensor([[3.0, 4.0], [0.1, 0.1]]), torch.tensor([1.0]), (2, 2), (1,))
        tensor([[2.1515, 2.8686],
                [0.0000, 0.0000]])
    """
    return apply_operator(_GroupSoftThreshold, weight, threshold, view, dims)


# --8<-- [start:operator]
class _GroupSoftThreshold(Operator):
    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, view: Shape, dims: Shape) -> Tensor:
        norm = group_norm(weight, view, dims)
        t = threshold.to(norm.dtype)
        shrunk = weight.reshape(view) * (1 - t / norm)
        return torch.where(norm <= t, 0.0, shrunk).to(weight.dtype).reshape(weight.shape)  # NaN stays NaN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, threshold, ctx.view, ctx.dims = inputs
        save(ctx, weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, threshold = ctx.saved_tensors
        view, dims = ctx.view, ctx.dims
        norm = group_norm(weight, view, dims)
        t = threshold.to(norm.dtype)
        active = norm > t
        norm = torch.where(active, norm, 1.0)  # The derivative of what is left out would be NaN in a group of zeros.
        grad, w = grad_output.reshape(view).to(norm.dtype), weight.reshape(view).to(norm.dtype)
        product = grad * w
        inner = torch.where(active, product.sum(dims, keepdim=True) if dims else product, 0.0)
        size = prod([view[d] for d in dims])
        radial = inner / norm * (t / norm) / (size * norm)  # not norm³, which underflows for tiny weights
        grad_weight = torch.where(active, grad * (1 - t / norm) + w * radial, 0.0)
        grad_weight = grad_weight.to(weight.dtype).reshape(weight.shape)
        if not ctx.needs_input_grad[1]:
            return grad_weight, None, None, None
        grad_threshold = torch.where(active, -inner / norm, 0.0)
        return grad_weight, sum_to(grad_threshold, threshold.shape, threshold.dtype), None, None


# --8<-- [end:operator]


def feather_threshold(
    weight: Tensor, threshold: Tensor, theta: float, view: Shape | None = None, dims: Shape = ()
) -> Tensor:
    """Zero the groups under the threshold and shrink those just above it, with the gradients of Feather.

    S_G = W_G · relu(1 − (t / ‖W_G‖)³)^(1/3),   M = 1{‖W_G‖ > t}

    dL/dW = dL/dS ⊙ (M + θ (1 − M))
    dL/dt = −Σ dL/dS ⊙ sign(S)                  as for the soft threshold

    Args:
        weight: W, floating point.
        threshold: t ≥ 0, of shape () or (1,).
        theta: θ, the factor on the gradient of pruned weights.
        view: the shape to view W in; None is its own.
        dims: the dimensions of `view` that a group spans.

    Examples:
        >>> feather_threshold(torch.tensor([-0.5, 0.1, 0.3]), torch.tensor(0.2), theta=1.0)
        tensor([-0.4891,  0.0000,  0.2668])
    """
    return apply_operator(_FeatherThreshold, weight, threshold, theta, view or tuple(weight.shape), dims)


# --8<-- [start:feather]
class _FeatherThreshold(Operator):
    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float, view: Shape, dims: Shape) -> Tensor:
        norm = group_norm(weight, view, dims)
        t = threshold.to(norm.dtype)
        # Divided by ‖W‖ before the cube, which would underflow for a small weight.
        norm = wide(norm)
        cube = (t.to(norm.dtype) / norm).pow_(3).neg_().add_(1).clamp_min_(0)
        factor = cube.log2_().div_(3).exp2_()  # the cube root; pow(1 / 3) takes longer on a CPU
        active = (norm <= t).logical_not_()  # NaN stays NaN
        return masked(weight.reshape(view) * factor.to(weight.dtype), active).reshape(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.t, ctx.theta = (inputs[1].shape, inputs[1].dtype), inputs[2]
        # Saved only if it is needed. The layer that uses it saves the same tensor, except under autocast.
        if ctx.theta != 1 or ctx.needs_input_grad[1] or in_forward_mode():
            save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as checkpointing asks
        if not saved:
            return grad_output, None, None, None, None
        (effective,) = saved
        grad = grad_output if ctx.theta == 1 else torch.where(effective != 0, grad_output, ctx.theta * grad_output)
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        shape, dtype = ctx.t
        return grad, -signed_sum(grad_output, effective, shape, dtype), None, None, None


# --8<-- [end:feather]
