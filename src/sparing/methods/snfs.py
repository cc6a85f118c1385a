"""SNFS: sparse networks from scratch, by sparse momentum. Weights move to the layers that learn most.

    m ← β m + (1 − β) dL/dS                             every step, of all weights, pruned ones too
    after every ΔT steps until T:
        p = p_T + (p_0 − p_T)/2 · (1 + cos(π t / T))    from p_0 = 0.5 to p_T = 0.005
        per layer: prune the p · active smallest |W| of the active weights
        share out all that was pruned in proportion to the mean |m| of each layer's active weights
        per layer: regrow its share of the largest |m| among the others, at zero
    S = W ⊙ M;  a pruned weight is moved by nothing

Source: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019, and
its code (sparse_learning/core.py, funcs.py).
Deviations: the code reads the optimizer's own momentum; here m belongs to the layer, so that it is the same for every
optimizer, and the optimizer sees masked gradients and forgets what stood where a weight is regrown. A layer may
become dense; the code stops at 99 % of what is free. The total is conserved exactly. Rounding is down, and once every
ΔT steps rather than an epoch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.errors import InputError
from sparing.growing import Growing, replace_mask
from sparing.masks import apportion, keep_top
from sparing.method import Layers, Optimizers, Parametrizations, Plan
from sparing.parametrizations import Masked, straight_through
from sparing.schedules import check_number, cosine
from sparing.sparsifier import Sparsifier


class MomentumMask(Masked):
    """`DenseGradientMask` that keeps a moving average of the dense gradient, in float32."""

    momentum: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.register_buffer("momentum", torch.zeros_like(mask, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, torch.where(self.mask, weight.detach(), 0.0))


@dataclass(frozen=True, kw_only=True)
class SNFS(Growing):
    """Prune the smallest weights of each layer, and regrow as many in all where the momentum is largest.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`. The budget is that of the start. Groups
    must have the same size in all layers, since they move between layers.

    `end`, `every` and `seed` are those of `sparing.growing.Growing`.

    Args:
        fraction: p_0, the share of active weights pruned at the start, in (0, 1).
        final_fraction: p_T, the share at the end, in (0, 1) and at most `fraction`.
        momentum: β, the share of the moving average that a step leaves, in (0, 1).

    Examples:
        >>> SNFS(sparsity=0.9).final_fraction
        0.005
    """

    name = "snfs"
    equal_units = True

    budget: Budget | str = "uniform"
    end: int | float = 1.0
    fraction: float = 0.5
    final_fraction: float = 0.005
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("fraction", "final_fraction", "momentum"):
            check_number(self, field, "(0, 1)")
        if self.final_fraction > self.fraction:
            raise InputError(f"SNFS: final_fraction={self.final_fraction} is larger than fraction={self.fraction}")

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: MomentumMask(mask) for name, mask in self.first_masks(layers, plan).items()}

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
        plan, step = sparsifier.plan, sparsifier.step
        if not self.due(plan, step):
            return
        rate = self.final_fraction + cosine(step, plan.updates.end, self.fraction - self.final_fraction)
        # A frozen layer takes no part: what it gave away or received could not be trained.
        layers = [pair for pair in sparsifier.each(MomentumMask) if pair[0].weight.requires_grad]
        units = [plan.allocation.units[layer.name] for layer, _ in layers]
        active = [each.active(part.mask) for each, (_, part) in zip(units, layers, strict=True)]
        counts = [int(mask.sum()) for mask in active]
        shares = [_mean_momentum(part) for _, part in layers]
        pruned = []
        for count, each, share in zip(counts, units, shares, strict=True):
            # As in the code: a layer that is nearly dense and learns more than most stays so.
            spared = 1 - count / each.count < 0.2 and share * len(layers) > sum(shares)
            pruned.append(int(min(rate, 1 - count / each.count if spared else rate) * count))
        kept = [count - some for count, some in zip(counts, pruned, strict=True)]
        rooms = [each.count - count for each, count in zip(units, kept, strict=True)]
        grown = apportion(sum(pruned), shares, rooms)
        for (layer, part), each, mask, keep, grow in zip(layers, units, active, kept, grown, strict=True):
            # −1 is below every size and every momentum.
            stays = keep_top(each.norm(layer.weight).masked_fill(~mask, -1), keep)
            chosen = stays | keep_top(each.norm(part.momentum).masked_fill(stays, -1), grow)
            replace_mask(layer, part, each.expand(chosen), optimizers)


def _mean_momentum(part: MomentumMask) -> float:
    """Return the mean |m| of the active weights; 0 if there are none."""
    return float((part.momentum.abs() * part.mask).sum() / part.mask.sum().clamp(min=1))
