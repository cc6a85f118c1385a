"""Spartan: a differentiable top-k of the whole network, sharpened while training.

    m  = σ(β |W| + μ),   μ such that Σ m = k                   a soft top-k: regularized transport
    M  = the k largest |W|, all layers at once
    S  = W ⊙ m ⊙ M                                             pruned weights are exactly zero
    dW = dS ⊙ m + β sign(W) ⊙ m (1 − m) ⊙ (dS ⊙ W − c)         as if S were W ⊙ m
    c  = Σ dS ⊙ W ⊙ m (1 − m) / Σ m (1 − m)                    over all layers; what keeps Σ m = k

k falls linearly to its target until t0, β rises linearly until t1. From t1 on m and M are fixed and dW = dS ⊙ m ⊙ M.
For groups of weights, |W| is the norm of the group and dS ⊙ W a sum over it.

Source: Tai, Tian & Lim, "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022, and its code
(sparsifier.py).
Deviations: k is met exactly, also where weights tie. c has Σ m (1 − m) below, where the code has k − Σ m²; they are
equal once μ is exact, and as in the code it is so to a tolerance. dW is put together just before the step, so
gradients clipped until then are dS. Cost models of FLOPs are left out, and k is of the layers made sparse, not of all
parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.budget import Budget, magnitude
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import Scores, global_threshold
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Masked, straight_through
from sparing.patterns import Units
from sparing.schedules import Updates, check_number, to_step
from sparing.sparsifier import Sparsifier

MOST_ITERATIONS = 100
TOLERANCE = 0.01
"""Sinkhorn stops when Σ m |W| changes by no more than this share; both are the code's."""


@dataclass(frozen=True, kw_only=True)
class Spartan(Ranking):
    """Let weights compete for k places through a soft mask, which hardens as β rises.

    At a small β the gradient reaches every weight; at a large one m is nearly the mask M itself. β is in units of one
    over the weight.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        begin: t0, where k reaches its target, a step (int) or a fraction of the run (float).
        end: t1, where β reaches its last value and the masks are fixed, likewise.
        every: optimizer steps between two updates of m and M.
        beta_first: β at the first step, > 0.
        beta_last: β at the last update, at least `beta_first`.

    Examples:
        >>> Spartan(sparsity=0.9).beta(step=40, end=80)
        10.5
    """

    name = "spartan"
    takes_nm = False
    equal_units = True

    budget: Budget | str = "global"
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16
    beta_first: float = 1.0
    beta_last: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "beta_first", "(0, inf)")
        check_number(self, "beta_last", "(0, inf)")
        if self.beta_last < self.beta_first:
            raise InputError(
                f"Spartan: beta_last must be at least beta_first={self.beta_first!r}, got {self.beta_last!r}"
            )

    def updates(self, steps: int | None) -> Updates:
        # From the first step on: before t0, k is on its way, and the masks follow it.
        ramp = Updates.resolve(self, self.begin, self.end, self.every, steps)
        return Updates(0, ramp.end, ramp.every)

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: SoftTopK(layer.weight) for name, layer in layers.items()}

    def beta(self, step: int, end: int) -> float:
        """Return β after that many steps, if it stops rising at `end`."""
        return self.beta_first + (self.beta_last - self.beta_first) * _progress(step, end)

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step, end = sparsifier.step, sparsifier.plan.updates.end
        trained = [(layer, part) for layer, part in sparsifier.each(SoftTopK) if layer.weight.grad is not None]
        if step >= end or not trained:
            for layer, part in trained:
                layer.weight.grad.mul_(torch.where(part.mask, part.soft, 0.0))  # type: ignore[union-attr]
            return
        units, beta = sparsifier.plan.allocation.units, self.beta(step, end)
        # Layer by layer, twice: kept for all layers, these would double the memory of the weights.
        sums = [((slope * q).sum(), slope.sum()) for q, slope in (_terms(*pair, units) for pair in trained)]
        pulled, total = (torch.stack(column) for column in zip(*sums, strict=True))
        if isinstance(sparsifier.plan.allocation.kept, int):  # Σ m = k over all layers, else in each of them
            pulled, total = (values.sum().expand(len(trained)) for values in (pulled, total))
        # While nothing is pruned, m is 1 and has no slope: then c is 0.
        constants = pulled / total.clamp_min(1e-30)
        for (layer, part), c in zip(trained, constants, strict=True):
            weight, gradient, each = layer.weight, layer.weight.grad, units[layer.name]
            assert gradient is not None
            q, slope = _terms(layer, part, units)
            direction = weight.sign() if each.weights == 1 else weight / each.expand(each.norm(weight) * each.weights)
            gradient.mul_(part.soft).add_(beta * direction.nan_to_num_() * each.expand(slope * (q - c)))

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step, plan = sparsifier.step, sparsifier.plan
        if not plan.updates.due(step):
            return
        begin = to_step(self.begin, sparsifier.steps)
        progress, beta = _progress(step, begin), self.beta(step, plan.updates.end)
        kept, units = plan.allocation.at(progress), plan.allocation.units
        sizes = {layer.name: _Norm(layer, units[layer.name]) for layer, _ in sparsifier.each(SoftTopK)}
        together = [list(sizes)] if isinstance(kept, int) else [[name] for name in sizes]
        mu: dict[str, Tensor] = {}
        for names in together:
            count = kept // units[names[0]].weights if isinstance(kept, int) else kept[names[0]]
            mu |= dict.fromkeys(names, soft_top_k([sizes[name] for name in names], count, beta))
        for layer, part in sparsifier.each(SoftTopK):
            soft = torch.sigmoid(beta * sizes[layer.name]() + mu[layer.name])
            part.soft.copy_(units[layer.name].expand(soft))
        sparsifier.set_masks(plan.allocation.masks(magnitude, progress))


class SoftTopK(Masked):
    """S = W ⊙ m ⊙ M forward, but dW = dS: Spartan makes its own gradient from it.

    Args:
        weight: gives shape and device.
    """

    soft: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("soft", torch.ones_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, torch.where(self.mask, weight.detach() * self.soft.to(weight.dtype), 0.0))


@dataclass(frozen=True)
class _Norm:
    """Computes the norms of the units of a layer, in float32 or wider: sums over all weights lose too much in bf16."""

    layer: Layer
    units: Units

    def __call__(self) -> Tensor:
        norm = self.units.norm(self.layer.weight.detach())
        return norm.to(torch.promote_types(norm.dtype, torch.float32))


def soft_top_k(values: Sequence[Scores], count: int, beta: float) -> Tensor:
    """Return μ such that Σ σ(β v + μ) = `count` over all values, by Sinkhorn's iteration.

    Args:
        values: functions that return v ≥ 0, layer by layer.
        count: k, from 0 to the number of values.
        beta: β > 0.

    Examples:
        >>> v = torch.linspace(0, 1, 100)
        >>> round(float(torch.sigmoid(20.0 * v + soft_top_k([lambda: v], 20, beta=20.0)).sum()))
        20
    """
    number = sum(value().numel() for value in values)
    if count in (0, number):
        return values[0]().new_tensor(math.inf if count else -math.inf)
    # From the smallest weight that is kept, where μ = 0 is a good start.
    left_out = global_threshold(values, count)
    kept = [value().masked_fill(value() <= left_out, math.inf).amin() for value in values]
    shift = beta * torch.minimum(torch.stack(kept).amin(), torch.stack([value().amax() for value in values]).amax())
    mu = torch.zeros_like(shift)
    reached = _reached(values, beta, mu - shift)
    for _ in range(MOST_ITERATIONS):
        log_sums = []
        for value in values:
            z = beta * value() - shift
            log_sums.append(torch.logsumexp((z - F.softplus(z + mu)).reshape(-1), 0))
        mu = math.log(count) - torch.logsumexp(torch.stack(log_sums), 0)
        before, reached = reached, _reached(values, beta, mu - shift)
        if (reached - before).abs() <= TOLERANCE * before.abs():
            break
    return mu - shift


def _reached(values: Sequence[Scores], beta: float, mu: Tensor) -> Tensor:
    """Return Σ m v."""
    return torch.stack([(torch.sigmoid(beta * value() + mu) * value()).sum() for value in values]).sum()


def _terms(layer: Layer, part: SoftTopK, units: Mapping[str, Units]) -> tuple[Tensor, Tensor]:
    """Return Σ dS ⊙ W and m (1 − m) of each unit."""
    assert layer.weight.grad is not None
    each = units[layer.name]
    soft = each.mean(part.soft)
    return each.mean(layer.weight.grad * layer.weight) * each.weights, soft * (1 - soft)


def _progress(step: int, end: int) -> float:
    return 1.0 if step >= end else step / end
