"""Spartan: a differentiable top-k of the whole network, sharpened while training.

    m  = σ(β |W| + μ),   μ such that Σ m = k                   a soft top-k: regularized transport
    M  = the k largest |W|, all layers at once
    S  = W ⊙ m ⊙ M                                             dead weights are exactly zero
    dW = dS ⊙ m + β sign(W) ⊙ m (1 − m) ⊙ (dS ⊙ W − c)         as if S were W ⊙ m
    c  = Σ dS ⊙ W ⊙ m (1 − m) / Σ m (1 − m)                    over all layers; what keeps Σ m = k

k falls linearly to its target until t0, β rises linearly until t1. From t1 on m and M are fixed and
dW = dS ⊙ m ⊙ M.

Source: Tai, Tian & Lim, "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS
2022, and its code (sparsifier.py).
Deviations: k is met exactly, also where weights tie. c has Σ m (1 − m) below, where the code has
k − Σ m²; they are equal once μ is exact, and as in the code it is so to a tolerance. dW is put together
just before the step, so gradients clipped until then are dS. Cost models of FLOPs and blocks are left out,
and k is of the layers made sparse, not of all parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.parametrizations import Masked, Sparse
from sparing.schedules import check_schedule, is_update, to_step
from sparing.sparsify import Method, Sparsifier

MOST_ITERATIONS = 100
TOLERANCE = 0.01
"""Sinkhorn stops when Σ m |W| changes by no more than this share; both are the code's."""


@dataclass(frozen=True)
class Spartan(Method):
    """Let weights compete for k places through a soft mask, which hardens as β rises.

    At a small β the gradient reaches every weight; at a large one m is nearly the mask M itself. β is
    in units of one over the weight.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, of all layers together.
        begin: t0, where k reaches its target: a step (int) or a fraction of `steps` (float).
        end: t1, where β reaches its last value and the masks are fixed, likewise.
        every: optimizer steps between two updates of m and M.
        beta_first: β at the first step, > 0.
        beta_last: β at the last update, at least `beta_first`.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> Spartan(steps=1000, sparsity=0.9)
        Spartan(steps=1000, sparsity=0.9, begin=0.2, end=0.8, every=16, beta_first=1.0, beta_last=20.0)
    """

    name: ClassVar[str] = "spartan"

    steps: int
    sparsity: float
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16
    beta_first: float = 1.0
    beta_last: float = 20.0

    def __post_init__(self) -> None:
        check_target("Spartan", self.sparsity, None)
        check_schedule("Spartan", self.steps, self.begin, self.end, self.every)
        for field, least in (("beta_first", 0.0), ("beta_last", self.beta_first)):
            value = getattr(self, field)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= 0 or value < least:
                allowed = "> 0" if field == "beta_first" else f"at least beta_first={self.beta_first!r}"
                raise InputError(f"Spartan: {field} must be a finite number, {allowed}, got {value!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {name: SoftTopK(layer.weight) for name, layer in layers.items()}

    def beta(self, step: int) -> float:
        """β after that many steps.

        Examples:
            >>> [Spartan(steps=100, sparsity=0.9).beta(step) for step in (0, 40, 90)]
            [1.0, 10.5, 20.0]
        """
        return self.beta_first + (self.beta_last - self.beta_first) * _progress(step, to_step(self.end, self.steps))

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        given = [
            (layer.weight, layer.weight.grad, part.soft, part.mask)
            for layer, part in sparsifier.parts(SoftTopK)
            if layer.weight.grad is not None
        ]
        if sparsifier.step >= to_step(self.end, self.steps):
            for _, gradient, soft, mask in given:
                gradient.mul_(torch.where(mask, soft, 0.0))
            return
        slopes = [soft * (1 - soft) for _, _, soft, _ in given]
        pulls = [
            (gradient * weight * slope).sum() for (weight, gradient, _, _), slope in zip(given, slopes, strict=True)
        ]
        total = sum(slope.sum() for slope in slopes)
        # While nothing is pruned, m is 1 and has no slope: then c is 0.
        c = sum(pulls) / torch.as_tensor(total).clamp_min(1e-30)
        beta = self.beta(sparsifier.step)
        for (weight, gradient, soft, _), slope in zip(given, slopes, strict=True):
            gradient.copy_(gradient * soft + beta * weight.sign() * slope * (gradient * weight - c))

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        step = sparsifier.step
        if not is_update(step, 0, to_step(self.end, self.steps), self.every):
            return
        layers, parts = zip(*sparsifier.parts(SoftTopK), strict=True)
        # At least float32: sums over all weights lose too much in bf16.
        sizes = [layer.weight.abs().to(torch.promote_types(layer.weight.dtype, torch.float32)) for layer in layers]
        sparsity = self.sparsity * _progress(step, to_step(self.begin, self.steps))
        count = count_kept(sum(size.numel() for size in sizes), sparsity)
        softs = soft_top_k(sizes, count, self.beta(step))
        for part, soft, mask in zip(parts, softs, keep_top_together(sizes, count), strict=True):
            part.soft.copy_(soft)
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())


class SoftTopK(Masked):
    """S = W ⊙ m ⊙ M forward, but dW = dS: Spartan makes its own gradient from it.

    `keep` is what the layer has now, as no layer has a number of its own to arrive at.

    Args:
        weight: gives shape and device.
    """

    soft: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ones_like(weight, dtype=torch.bool), weight.numel())
        self.register_buffer("soft", torch.ones_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = _SoftMask.apply(weight, self.mask, self.soft)
        return result


class _SoftMask(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, soft: Tensor) -> Tensor:
        return torch.where(mask, weight * soft.to(weight.dtype), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_output, None, None


def soft_top_k(values: list[Tensor], count: int, beta: float) -> list[Tensor]:
    """m = σ(β v + μ) with Σ m = `count`, over all tensors at once, by Sinkhorn's iteration.

    Args:
        values: v ≥ 0.
        count: k, from 0 to the number of values.
        beta: β > 0.

    Examples:
        >>> [m.sum().round().item() for m in soft_top_k([torch.linspace(0, 1, 100)], 20, beta=20.0)]
        [20.0]
    """
    v = torch.cat([value.reshape(-1) for value in values])
    if count in (0, v.numel()):
        return [torch.full_like(value, float(count > 0)) for value in values]
    # From the middle between the weights kept and the others, where μ = 0 is a good start.
    z = beta * (v - v.topk(count, sorted=False).values.amin())
    nu = -F.softplus(z)
    m = torch.sigmoid(z)
    reached = (m * v).sum()
    for _ in range(MOST_ITERATIONS):
        mu = math.log(count) - torch.logsumexp(z + nu, 0)
        nu = -F.softplus(z + mu)
        m = torch.sigmoid(z + mu)
        before, reached = reached, (m * v).sum()
        if (reached - before).abs() <= TOLERANCE * before.abs():
            break
    parts = m.split([value.numel() for value in values])
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]


def _progress(step: int, end: int) -> float:
    return 1.0 if step >= end else step / end
