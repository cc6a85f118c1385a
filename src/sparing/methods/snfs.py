"""SNFS: sparse networks from scratch, by sparse momentum. Weights move to the layers that learn most.

    m ← β m + (1 − β) dL/dS                             every step, of all weights, pruned ones too
    after every ΔT steps until T:
        p = p_T + (p_0 − p_T)/2 · (1 + cos(π t / T))    from p_0 = 0.5 to p_T = 0.005
        per layer: prune the p · active smallest |W| of the active weights
        distribute the pruned number over the layers, in proportion to the mean |m| of their active weights
        per layer: regrow its share of the largest |m| among the others, at zero
    S = W ⊙ M;  a pruned weight is not trained

Source: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019, and
its code (sparse_learning/core.py, funcs.py).
Deviations: the code reads the optimizer's own momentum. Here m belongs to the layer, the same for every optimizer; the
optimizer gets masked gradients, and its state is reset where a weight is regrown. A layer may become dense; the code
regrows at most 99 % of its pruned weights. The number of weights is exactly constant. Counts are rounded down. Updates
come every ΔT steps, in the code once an epoch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.errors import InputError
from sparing.growing import Growing, MaskUpdate
from sparing.masks import apportion, check_scores, keep_top
from sparing.method import Optimizers
from sparing.operators import masked
from sparing.parametrizations import Masked, straight_through
from sparing.schedules import cosine
from sparing.sparsifier import Sparsifier


class MomentumMask(Masked):
    """`DenseGradientMask` that keeps a moving average of the dense gradient, in float32."""

    momentum: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.register_state("momentum", torch.zeros_like(mask, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, masked(weight.detach(), self.mask))


@dataclass(frozen=True, kw_only=True)
class SNFS(Growing):
    """Prune the smallest weights of each layer, and regrow as many in all where the momentum is largest.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`; `fraction`, the p_0 of the formula, `end`,
    `every` and `seed` those of `sparing.growing.Growing`. The budget is that of the start. Groups must have the same
    size in all layers, because they move between layers.

    Args:
        final_fraction: p_T, the share of active weights pruned at the end, in (0, 1) and at most `fraction`.
        momentum: β, the decay of the moving average, in (0, 1).

    Examples:
        >>> SNFS(sparsity=0.9).final_fraction
        0.005
    """

    name = "snfs"
    equal_units = True
    ranges: ClassVar = {**Growing.ranges, "final_fraction": "(0, 1)", "momentum": "(0, 1)"}

    budget: Budget | str = "uniform"
    fraction: float = 0.5
    end: int | float = 1.0
    final_fraction: float = 0.005
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_fraction > self.fraction:
            raise InputError(f"SNFS: final_fraction={self.final_fraction} is larger than fraction={self.fraction}")

    def masked(self, mask: Tensor) -> Masked:
        return MomentumMask(mask)

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        for layer, part in sparsifier.each(MomentumMask):
            gradient = layer.weight.grad
            if gradient is not None:
                unscaled = sparsifier.unscale(gradient)
                part.momentum.lerp_(unscaled.to(part.momentum.dtype), 1 - self.momentum)
                gradient.masked_fill_(~part.mask, 0)

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step = sparsifier.step
        if not self.due(sparsifier, step):
            return
        decay = cosine(step, sparsifier.plan.updates.end, self.fraction - self.final_fraction)
        rate = self.final_fraction + decay
        updates = list(MaskUpdate.each(sparsifier, MomentumMask))
        check_scores({each.layer.name: each.part.momentum.detach for each in updates}, finite=True)
        shares = [_mean_momentum(each.part) for each in updates]
        pruned = []
        for each, share in zip(updates, shares, strict=True):
            free = 1 - each.count / each.units.count
            # As in the code, a nearly dense layer with more momentum than the mean stays nearly dense.
            spared = free < 0.2 and share * len(updates) > sum(shares)
            pruned.append(int(min(rate, free if spared else rate) * each.count))
        kept = [each.count - some for each, some in zip(updates, pruned, strict=True)]
        rooms = [each.units.count - count for each, count in zip(updates, kept, strict=True)]
        regrown = apportion(sum(pruned), shares, rooms)
        for each, keep, regrow in zip(updates, kept, regrown, strict=True):
            stays = each.largest(keep)
            momentum = each.units.norm(each.part.momentum).masked_fill(stays, -1)  # −1 is below every momentum
            each.replace(stays | keep_top(momentum, regrow, each.layer.name), optimizers)


def _mean_momentum(part: MomentumMask) -> float:
    """Return the mean |m| of the active weights; 0 if there are none."""
    return float((part.momentum.abs() * part.mask).sum() / part.mask.sum().clamp(min=1))
