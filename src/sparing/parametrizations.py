"""How an effective weight is made from a dense one: modules for `torch.nn.utils.parametrize`.

What a checkpoint needs is a parameter or a buffer of these modules, so it is
saved, moved and copied with the model it belongs to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.threshold import soft_threshold


class Sparse(nn.Module):
    """Abstract: makes the effective weight, most of it exactly zero, from the dense weight.

    Every subclass is final and defines `forward(weight) -> effective weight`, of the same shape and
    dtype. `sparsify_`, `densify_` and `report` know a sparsified layer by this class.

    Its numbers keep their dtype when the model is moved to a narrower one. In bf16 or fp16 a step of
    weight decay, s ← (1 − 5e-5) s, is lost to rounding and the s of STR would never move.
    """

    def threshold(self) -> Tensor | None:
        """The threshold in force, ≥ 0, in units of the weight; None where there is none."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point():
                return moved
            narrower = torch.finfo(moved.dtype).bits < torch.finfo(tensor.dtype).bits
            # From the tensor itself, not from its rounded copy; to_empty() has nothing to keep.
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(keep_dtype, recurse)


class LearnedThreshold(Sparse):
    """Abstract: a threshold t = scale · g(s) that is learned through s.

    Args:
        s: the learned number, of a shape that broadcasts to the weight. The same Parameter in
            several modules makes them share one threshold.
        g: the map from s to numbers ≥ 0.
        scale: a constant factor, the k of k · sigmoid.
    """

    def __init__(self, s: nn.Parameter, g: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.s = s
        self.g = g
        self.scale = scale

    def threshold(self) -> Tensor:
        t = self.g(self.s)
        return t if self.scale == 1.0 else self.scale * t

    def extra_repr(self) -> str:
        return f"g={getattr(self.g, '__name__', repr(self.g))}, scale={self.scale}, s={tuple(self.s.shape)}"


def learned_number(shape: tuple[int, ...], start: float, weight: Tensor) -> nn.Parameter:
    """The s of a `LearnedThreshold`: trained if the weight is, and float32 whatever its dtype (see `Sparse`)."""
    s = torch.full(shape, float(start), dtype=torch.float32, device=weight.device)
    return nn.Parameter(s, requires_grad=weight.requires_grad)


class SoftThreshold(LearnedThreshold):
    """S(W, t) = sign(W) · relu(|W| − t), with the threshold t = scale · g(s) learned through s.

    Examples:
        >>> soft = SoftThreshold(nn.Parameter(torch.tensor([-2.0])), torch.sigmoid)
        >>> soft(torch.tensor([-0.5, 0.1, 0.3]))
        tensor([-0.3808,  0.0000,  0.1808], grad_fn=<_SoftThresholdBackward>)
    """

    def forward(self, weight: Tensor) -> Tensor:
        return soft_threshold(weight, self.threshold())


class Masked(Sparse):
    """Abstract: the effective weight is the weight where a mask is True, and zero elsewhere.

    Args:
        mask: boolean, of the shape of the weight; a buffer.
        keep: how many weights are to live when the method is done; a buffer, so that a checkpoint
            knows it.
    """

    mask: Tensor
    keep: Tensor

    def __init__(self, mask: Tensor, keep: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("keep", torch.tensor(keep, device=mask.device))

    def extra_repr(self) -> str:
        return f"mask={tuple(self.mask.shape)}"


class Mask(Masked):
    """S = W ⊙ M, and so dW = dS ⊙ M: a dead weight gets no gradient.

    Examples:
        >>> Mask(torch.tensor([True, False]), keep=1)(torch.tensor([3.0, 4.0]))
        tensor([3., 0.])
    """

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


class DenseGradientMask(Masked):
    """S = W ⊙ M forward, but dW = dS: the straight-through estimator.

    A dead weight gets the gradient that the effective weight has in its place. Methods that grow
    weights by their gradient read it there, without a second backward pass.

    Examples:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> DenseGradientMask(torch.tensor([True, False]), keep=1)(weight).sum().backward()
        >>> weight.grad
        tensor([1., 1.])
    """

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = MaskStraightThrough.apply(weight, self.mask)
        return result


class MaskStraightThrough(torch.autograd.Function):
    """S = W ⊙ M forward, dW = dS backward, for parametrizations that need more than `DenseGradientMask`."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output, None


# --8<-- [start:rescaled]
class RescaledSoftThreshold(Sparse):
    """S = c ⊙ sign(W) ⊙ relu(|W| − th) forward, but dW = dS.

    One threshold th, and a scale c a filter: what ST-3 and ST-3σ train.

    Args:
        weight: gives shape, dtype and device.
    """

    th: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        per_filter = weight.shape[:1] + (1,) * (weight.dim() - 1)
        self.register_buffer("th", torch.zeros((), dtype=dtype, device=weight.device))
        self.register_buffer("scale", torch.ones(per_filter, dtype=dtype, device=weight.device))

    def renew(self, th: Tensor, size: Tensor) -> None:
        """Take a new threshold, and the scales that follow for weights of these sizes |W|."""
        self.th.copy_(th)
        size = size.reshape(len(size), -1).to(self.th.dtype)
        # The small number is the code's: it keeps a filter of zeros from dividing by zero.
        q = ((size * (size > self.th)).mean(1) + 1e-6) / (size.mean(1) + 1e-6)
        self.scale.copy_((1.01 / (q + 0.01)).reshape(self.scale.shape))

    def threshold(self) -> Tensor:
        return self.th

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = RescaledStraightThrough.apply(weight, self.th, self.scale)
        return result


class RescaledStraightThrough(torch.autograd.Function):
    """The formula of `RescaledSoftThreshold`, with the identity for a backward."""

    @staticmethod
    def forward(weight: Tensor, th: Tensor, scale: Tensor) -> Tensor:
        th = th.to(weight.dtype)
        return scale.to(weight.dtype) * (weight - weight.clamp(-th, th))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_output, None, None


# --8<-- [end:rescaled]


# --8<-- [start:feather]
class FeatherStraightThrough(torch.autograd.Function):
    """Feather's curve, with gradients that are not its own: what Feather and STR-Feather train.

    S  = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M,   M = 1{|W| > th}
    dW = dS ⊙ (M + θ (1 − M))
    dth = −Σ dS ⊙ sign(S)                              as of the soft threshold
    """

    @staticmethod
    def forward(weight: Tensor, th: Tensor, theta: float) -> Tensor:
        size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        th = th.to(weight.dtype).to(size.dtype)
        # The formula with |W| taken out of the root: the cube of a small weight would underflow.
        factor = (1 - (th / size) ** 3).clamp_min(0) ** (1 / 3)
        return torch.where(size > th, weight * factor.to(weight.dtype), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.th, ctx.theta = (inputs[1].shape, inputs[1].dtype), inputs[2]
        if ctx.theta != 1 or ctx.needs_input_grad[1]:
            ctx.save_for_backward(output)  # the layer that uses it keeps it anyway, but for autocast

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.saved_tensors:
            return grad_output, None, None
        (effective,) = ctx.saved_tensors
        grad = grad_output if ctx.theta == 1 else torch.where(effective != 0, grad_output, ctx.theta * grad_output)
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        shape, dtype = ctx.th
        return grad, -(grad_output * effective.sign()).sum(dtype=dtype).reshape(shape), None


# --8<-- [end:feather]
