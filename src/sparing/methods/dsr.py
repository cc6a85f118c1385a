"""DSR: dynamic sparse reparameterization. One threshold for all layers prunes weights; they regrow at random.

    after every ΔT steps until T_end; ΔT doubles after each quarter of the run:
        prune every active |W| < H, in all layers          K of them; one stays in a layer that would be empty
        H ← 2 H    if K < (1 − δ) N                        too few: N is the number wanted
        H ← H / 2  if K > (1 + δ) N                        too many
        distribute K over the layers, in proportion to the weights that each layer has left
        per layer: regrow its share of the positions that were not active, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
Reparameterization", ICML 2019, algorithm 1, and its code (parameterized_tensors.py, main.py).
Deviations: N is a share of the active weights, in the code a number of weights: 9 % in its ImageNet runs at 80 %
sparsity, 18 % at 90 %. The code doubles ΔT at these quarters on ImageNet and MNIST, at epochs 25, 80 and 140 of 200 on
CIFAR. The number of weights is exactly constant: shares are rounded by Hamilton's method, and what a full layer cannot
take goes to the others. The momentum of a regrown weight is cleared; in the code it has decayed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.allocation import random_score
from sparing.budget import Budget
from sparing.growing import Growing, MaskUpdate
from sparing.masks import apportion, keep_top
from sparing.method import Optimizers
from sparing.parametrizations import Masked
from sparing.sparsifier import Sparsifier


class AdaptiveMask(Masked):
    """S = W ⊙ M, with the threshold H of the next update, of shape (1,), the same in all layers."""

    cut: Tensor

    def __init__(self, mask: Tensor, cut: float) -> None:
        super().__init__(mask)
        self.register_state("cut", torch.full((1,), cut, dtype=torch.float32, device=mask.device))


@dataclass(frozen=True, kw_only=True)
class DSR(Growing):
    """Keep a constant number of weights in all, and move the smallest to random places of any layer.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`; `end`, `every` and `seed` those of
    `sparing.growing.Growing`. The budget is that of the start. Groups must have the same size in all layers, because
    they move between layers.

    Args:
        fraction: the share of active weights that every update should move, N of them, in (0, 1).
        threshold: H at the start, in units of the weight, above 0.
        tolerance: δ, the deviation from N up to which H stays, a fraction of N in (0, 1).

    Examples:
        >>> DSR(sparsity=0.9).threshold
        0.001
    """

    name = "dsr"
    equal_units = True
    ranges: ClassVar = {**Growing.ranges, "threshold": "(0, inf)", "tolerance": "(0, 1)"}

    budget: Budget | str = "uniform"
    fraction: float = 0.14
    end: int | float = 0.95
    threshold: float = 1e-3
    tolerance: float = 0.1

    def masked(self, mask: Tensor) -> Masked:
        return AdaptiveMask(mask, self.threshold)

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step, steps = sparsifier.step, sparsifier.steps
        quarters = 0 if steps is None else min(4 * step // steps, 3)
        if not self.due(sparsifier, step) or step % (sparsifier.plan.updates.every * 2**quarters):
            return
        random = random_score(sparsifier.layers, self.seed, step)
        updates = list(MaskUpdate.each(sparsifier, AdaptiveMask))
        stays = [_stays(each) for each in updates]
        left = [int(mask.sum()) for mask in stays]
        total = sum(each.count for each in updates)
        pruned, aim = total - sum(left), self.fraction * total
        factor = 2 if pruned < (1 - self.tolerance) * aim else 0.5 if pruned > (1 + self.tolerance) * aim else 1
        # A unit just pruned is regrown only where there are too few others.
        enough = sum(each.units.count for each in updates) - total >= pruned
        taken = [each.active for each in updates] if enough else stays
        regrown = apportion(pruned, left, [mask.numel() - int(mask.sum()) for mask in taken])
        for each, stay, full, regrow in zip(updates, stays, taken, regrown, strict=True):
            chosen = keep_top(random(each.layer, each.units).masked_fill(full, -1), regrow)
            each.replace(stay | chosen, optimizers)
            # Doubling would not bring it back from zero.
            each.part.cut.mul_(factor).clamp_(min=torch.finfo(each.part.cut.dtype).tiny)


def _stays(update: MaskUpdate[AdaptiveMask]) -> Tensor:
    """Return the active units that are not pruned: those of norm ≥ H, or NaN, but at least one."""
    stays = update.active & ~(update.norm() < update.part.cut)
    return stays if bool(stays.any()) else update.largest(min(update.count, 1))
