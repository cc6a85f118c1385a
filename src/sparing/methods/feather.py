"""Feather: a thresholding between soft and hard, straight-through gradients, one global threshold.

    r_t = r · (1 − (1 − (t − t0) / (t1 − t0))³)                the cubic ramp from 0 to r
    M   = the (1 − r_t) share of largest |W|, all layers at once
    th  = the largest |W| outside M
    S   = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M
    dW  = dS ⊙ (M + θ (1 − M)),   θ = ½ for r > 0.95, else 1

Source: Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN
Sparsification", BMVC 2023, and its code (sparse_utils.py).
Deviations: the code takes th from an interpolated quantile; here the count is exact and th is the
largest weight left out, so a kept weight that ties with th is live and zero. When training is over the
code replaces S by the hard threshold W ⊙ M; here the network stays the one that was trained.
The code takes a new threshold every step (`every=1`); see ST-3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.masks import count_kept, keep_top_together
from sparing.parametrizations import Masked, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.select import Layer
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class Feather(Method):
    """Zero the smallest weights of the whole network, shrink those near the threshold, train them all.

    S = sign(W) ⊙ (|W|³ − th³)^(1/3) is continuous, unlike the hard threshold, and leaves large weights
    almost as they are, unlike the soft one.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, r, of all layers together.
        begin: t0, where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: t1, where it ends, likewise.
        every: optimizer steps between two updates of threshold and masks.
        theta: θ in [0, 1], the factor on the gradient of dead weights; None takes ½ above a sparsity of
            0.95 and 1 up to it.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> Feather(steps=1000, sparsity=0.9)
        Feather(steps=1000, sparsity=0.9, begin=0.0, end=0.5, every=16, theta=None)
    """

    name: ClassVar[str] = "feather"

    steps: int
    sparsity: float
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 16
    theta: float | None = None

    def __post_init__(self) -> None:
        check_target("Feather", self.sparsity, None)
        check_schedule("Feather", self.steps, self.begin, self.end, self.every)
        theta = self.theta
        if theta is None:
            return
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 1:
            raise InputError(f"Feather: theta must be None or a factor from 0 to 1, got {theta!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        theta = self.theta if self.theta is not None else 0.5 if self.sparsity > 0.95 else 1.0
        return {name: FeatherThreshold(layer.weight, theta) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, self.steps, self.every):
            return
        layers, parts = zip(*sparsifier.parts(FeatherThreshold), strict=True)
        sizes = [layer.weight.abs() for layer in layers]
        sparsity = cubic(sparsifier.step, begin, end, self.sparsity)
        masks = keep_top_together(sizes, count_kept(sum(size.numel() for size in sizes), sparsity))
        th = torch.stack([size.masked_fill(mask, 0).amax() for size, mask in zip(sizes, masks, strict=True)]).amax()
        for part, mask in zip(parts, masks, strict=True):
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())
            part.th.copy_(th)


class FeatherThreshold(Masked):
    """S = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M forward, dW = dS ⊙ (M + θ (1 − M)) backward.

    `keep` is what the layer has now, as no layer has a number of its own to arrive at.

    Args:
        weight: gives shape and device.
        theta: θ.
    """

    th: Tensor

    def __init__(self, weight: Tensor, theta: float) -> None:
        super().__init__(torch.ones_like(weight, dtype=torch.bool), weight.numel())
        self.register_buffer("th", torch.zeros((), dtype=torch.float32, device=weight.device))
        self.theta = theta

    def threshold(self) -> Tensor:
        return self.th

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = _Feather.apply(weight, self.mask, self.th, self.theta)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, theta={self.theta}"


class _Feather(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, th: Tensor, theta: float) -> Tensor:
        size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        # The formula with |W| taken out of the root: the cube of a small weight would underflow.
        factor = (1 - (th / size) ** 3).clamp_min(0) ** (1 / 3)
        return torch.where(mask & (size > th), weight * factor.to(weight.dtype), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.theta = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        grad = grad_output if ctx.theta == 1 else torch.where(mask, grad_output, ctx.theta * grad_output)
        return grad, None, None, None
