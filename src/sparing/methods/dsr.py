"""DSR: dynamic sparse reparameterization. One threshold for all layers prunes weights; they regrow at random.

    after every ΔT steps until T_end; ΔT doubles after each quarter of the run:
        prune every active |W| < H, in all layers          K of them; one stays in a layer that would empty
        H ← 2 H    if K < (1 − δ) N                        too few: N is the number aimed for
        H ← H / 2  if K > (1 + δ) N                        too many
        share out K in proportion to the weights that each layer has left
        per layer: regrow its share of the positions that were not active, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
Reparameterization", ICML 2019, algorithm 1, and its code (parameterized_tensors.py, main.py).
Deviations: the code gives N as a number of weights, here it is a share of the active ones; the code's ImageNet runs
have 9 % at 80 % sparsity and 18 % at 90 %. The code doubles ΔT at these quarters on ImageNet and MNIST, at epochs 25,
80 and 140 of 200 on CIFAR. The total is conserved exactly: shares are rounded by Hamilton's method, and what a full
layer cannot take goes to the others. The momentum of a regrown weight is cleared; in the code it has decayed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget, random_score
from sparing.growing import Growing, replace_mask
from sparing.masks import apportion, keep_top
from sparing.method import Layers, Optimizers, Parametrizations, Plan
from sparing.parametrizations import Masked
from sparing.schedules import check_number
from sparing.sparsifier import Sparsifier


class AdaptiveMask(Masked):
    """`Mask` that carries the threshold H of the next update, of shape (1,), the same in all layers."""

    cut: Tensor

    def __init__(self, mask: Tensor, cut: float) -> None:
        super().__init__(mask)
        self.register_buffer("cut", torch.full((1,), cut, dtype=torch.float32, device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


@dataclass(frozen=True, kw_only=True)
class DSR(Growing):
    """Keep a constant number of weights in all, and move the smallest to random places of any layer.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`. The budget is that of the start. Groups
    must have the same size in all layers, since they move between layers.

    `end`, `every` and `seed` are those of `sparing.growing.Growing`.

    Args:
        fraction: the share of active weights that an update should move, N of them, in (0, 1).
        threshold: H at the start, in units of the weight, above 0.
        tolerance: δ, how far off N leaves H as it is, a fraction in (0, 1).

    Examples:
        >>> DSR(sparsity=0.9).threshold
        0.001
    """

    name = "dsr"
    equal_units = True

    budget: Budget | str = "uniform"
    end: int | float = 0.95
    fraction: float = 0.14
    threshold: float = 1e-3
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("fraction", "tolerance"):
            check_number(self, field, "(0, 1)")
        check_number(self, "threshold", "(0, inf)")

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        masks = self.first_masks(layers, plan)
        return {name: AdaptiveMask(mask, self.threshold) for name, mask in masks.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        plan, step = sparsifier.plan, sparsifier.step
        if not self.due(plan, step) or step % _interval(plan, step, sparsifier.steps):
            return
        random = random_score(sparsifier.layers, self.seed, step)
        # A frozen layer takes no part: what it gave away or received could not be trained.
        layers = [pair for pair in sparsifier.each(AdaptiveMask) if pair[0].weight.requires_grad]
        units = [plan.allocation.units[layer.name] for layer, _ in layers]
        active = [each.active(part.mask) for each, (_, part) in zip(units, layers, strict=True)]
        stays = [
            _stays(mask, each.norm(layer.weight), part.cut)
            for each, mask, (layer, part) in zip(units, active, layers, strict=True)
        ]
        left = [int(mask.sum()) for mask in stays]
        total = sum(int(mask.sum()) for mask in active)
        pruned, aim = total - sum(left), self.fraction * total
        factor = 2 if pruned < (1 - self.tolerance) * aim else 0.5 if pruned > (1 + self.tolerance) * aim else 1
        # What was just pruned is not regrown, unless there is no other place for all of it.
        enough = sum(mask.numel() for mask in active) - total >= pruned
        taken = active if enough else stays
        grown = apportion(pruned, left, [mask.numel() - int(mask.sum()) for mask in taken])
        for (layer, part), each, stay, full, grow in zip(layers, units, stays, taken, grown, strict=True):
            chosen = keep_top(random(layer, each).masked_fill(full, -1), grow)
            replace_mask(layer, part, each.expand(stay | chosen), optimizers)
            # From zero it could not double again.
            part.cut.mul_(factor).clamp_(min=torch.finfo(part.cut.dtype).tiny)


def _interval(plan: Plan, step: int, steps: int | None) -> int:
    assert plan.updates is not None
    quarters = 0 if steps is None else min(4 * step // steps, 3)
    return int(plan.updates.every * 2**quarters)


def _stays(active: Tensor, norm: Tensor, cut: Tensor) -> Tensor:
    """Return the active units that are not pruned: those of norm ≥ H, but at least one."""
    stays = active & (norm >= cut)
    return stays if bool(stays.any()) else keep_top(norm.masked_fill(~active, -1), min(int(active.sum()), 1))
