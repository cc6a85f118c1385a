"""Spartan: a differentiable top-k of the whole network, sharpened while training.

    m  = σ(β |W| + μ),   μ such that Σ m = k                   a soft top-k: regularized transport
    M  = the k largest |W|                                     all layers at once
    S  = W ⊙ m ⊙ M                                             pruned weights are exactly zero
    dW = dS ⊙ m + β sign(W) ⊙ m (1 − m) ⊙ (dS ⊙ W − c)         the gradient of S = W ⊙ m
    c  = Σ dS ⊙ W ⊙ m (1 − m) / Σ m (1 − m)                    over all layers: it keeps Σ m = k

k falls linearly to its target until t0, β rises linearly until t1. From t1 on m and M are fixed and dW = dS ⊙ m ⊙ M.
For groups of weights, |W| is the norm of the group and dS ⊙ W a sum over it.

Source: Tai, Tian & Lim, "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022, and its code
(sparsifier.py).
Deviations: M keeps exactly k weights, also where weights are equal. The code divides by k − Σ m² in c, which is equal
up to the tolerance of μ. dW is computed just before the step, so gradient clipping acts on dS. There are no FLOP cost
models, and k counts the sparsified layers, not all parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.allocation import magnitude
from sparing.budget import Budget
from sparing.errors import InputError
from sparing.group_threshold import wide
from sparing.layers import Layer
from sparing.masks import Scores, global_threshold
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.operators import masked
from sparing.parametrizations import Masked, straight_through
from sparing.patterns import Units
from sparing.schedules import Updates, to_step
from sparing.sparsifier import Sparsifier

MOST_ITERATIONS = 100
TOLERANCE = 0.01
"""Sinkhorn's iteration stops when the relative change of Σ m |W| is at most this. Both values are the code's."""


@dataclass(frozen=True, kw_only=True)
class Spartan(Ranking):
    """Train through a soft top-k mask, which becomes a hard one as β rises.

    At a small β every weight gets a gradient; at a large β m is nearly the mask M. β is in units of 1 / weight.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        begin: t0, from which on k is at its target, a step (int) or a fraction of the run (float).
        end: t1, from which on β is at its last value and the masks are fixed, likewise.
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
    ramps = True
    ranges: ClassVar = {"beta_first": "(0, inf)", "beta_last": "(0, inf)"}

    budget: Budget | str = "global"
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16
    beta_first: float = 1.0
    beta_last: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_last < self.beta_first:
            raise InputError(
                f"Spartan: beta_last must be at least beta_first={self.beta_first!r}, got {self.beta_last!r}"
            )

    def updates(self, steps: int | None) -> Updates:
        # From the first step on: k falls, and the masks change, before t0 too.
        ramp = Updates.resolve(self, self.begin, self.end, self.every, steps)
        return Updates(0, ramp.end, ramp.every)

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: SoftTopK(layer.weight) for name, layer in layers.items()}

    def beta(self, step: int, end: int) -> float:
        """Return β after that many steps; it stops rising at `end`."""
        return self.beta_first + (self.beta_last - self.beta_first) * min(step / max(end, 1), 1.0)

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step, end = sparsifier.step, sparsifier.plan.updates.end
        trained = [pair for pair in sparsifier.each(SoftTopK) if pair[0].weight.grad is not None]
        if step >= end or not trained:
            for layer, part in trained:
                layer.weight.grad.mul_(torch.where(part.mask, part.soft, 0.0))  # type: ignore[union-attr]
            return
        units, beta = sparsifier.plan.allocation.units, self.beta(step, end)
        # Computed twice for each layer: kept for all layers, they would take as much memory as the weights.
        sums = [((slope * q).sum(), slope.sum()) for q, slope in (_terms(*pair, units) for pair in trained)]
        upper, lower = (torch.stack(column) for column in zip(*sums, strict=True))
        if isinstance(sparsifier.plan.allocation.kept, int):  # Σ m = k over all layers, else in each of them
            upper, lower = (values.sum().expand(len(trained)) for values in (upper, lower))
        # While nothing is pruned, m is 1 and its slope 0: then c is 0.
        constants = upper / lower.clamp_min(1e-30)
        for (layer, part), c in zip(trained, constants, strict=True):
            weight, gradient, each = layer.weight, layer.weight.grad, units[layer.name]
            assert gradient is not None
            q, slope = _terms(layer, part, units)
            direction = weight.sign() if each.weights == 1 else weight / each.expand(each.norm(weight) * each.weights)
            gradient.mul_(part.soft).add_(beta * direction.nan_to_num_() * each.expand(slope * (q - c)))

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step, plan = sparsifier.step, sparsifier.plan
        if not sparsifier.due:
            return
        start, share = sparsifier.clock.start, step / max(to_step(self.begin, sparsifier.steps), 1)
        progress = start + (1 - start) * share if share < 1 else 1.0
        beta, kept, units = self.beta(step, plan.updates.end), plan.allocation.at(progress), plan.allocation.units
        norms = {layer.name: partial(_norm, layer, units[layer.name]) for layer, _ in sparsifier.each(SoftTopK)}
        if isinstance(kept, int):
            size = next(iter(units.values())).weights
            mu = dict.fromkeys(norms, soft_top_k(norms, kept // size, beta))
        else:
            mu = {name: soft_top_k({name: norm}, kept[name], beta) for name, norm in norms.items()}
        for layer, part in sparsifier.each(SoftTopK):
            soft = torch.sigmoid(beta * norms[layer.name]() + mu[layer.name])
            part.soft.copy_(units[layer.name].expand(soft))
        sparsifier.set_masks(plan.allocation.masks(magnitude, progress))


class SoftTopK(Masked):
    """S = W ⊙ m ⊙ M forward, but dW = dS: `Spartan.before_step` computes the gradient from it.

    Args:
        weight: gives shape and device.
    """

    soft: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ones_like(weight, dtype=torch.bool))
        self.register_state("soft", torch.ones_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, masked(weight.detach() * self.soft.to(weight.dtype), self.mask))


def soft_top_k(layers: Mapping[str, Scores], count: int, beta: float) -> Tensor:
    """Return μ such that Σ σ(β v + μ) = `count` over all values, by Sinkhorn's iteration.

    Args:
        layers: functions that return v ≥ 0, by layer.
        count: k, from 0 to the number of values.
        beta: β > 0.

    Examples:
        >>> v = torch.linspace(0, 1, 100)
        >>> round(float(torch.sigmoid(20.0 * v + soft_top_k({"": lambda: v}, 20, beta=20.0)).sum()))
        20
    """
    values = list(layers.values())
    number = sum(value().numel() for value in values)
    if count in (0, number):
        return values[0]().new_tensor(math.inf if count else -math.inf)
    # Shifted by the smallest value that is kept, so that μ = 0 is a good start.
    left_out = global_threshold(layers, count)
    kept = [value().masked_fill(value() <= left_out, math.inf).amin() for value in values]
    shift = beta * torch.minimum(torch.stack(kept).amin(), torch.stack([value().amax() for value in values]).amax())
    mu = torch.zeros_like(shift)
    reached = _reached(values, beta, mu - shift)
    for _ in range(MOST_ITERATIONS):
        shifted = (beta * value() - shift for value in values)
        log_sums = [torch.logsumexp((z - F.softplus(z + mu)).reshape(-1), 0) for z in shifted]
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


def _norm(layer: Layer, units: Units) -> Tensor:
    return wide(units.norm(layer.weight.detach()))
