"""DSR: dynamic sparse reparameterization. One threshold for all layers drops weights, chance grows them.

    every ΔT steps until T_end:
        drop every live |W| < H, in all layers             K of them
        H ← 2 H    if K < (1 − δ) N                        too few: N is the number aimed for
        H ← H / 2  if K > (1 + δ) N                        too many
        share out K in proportion to the weights that each layer has left
        a layer: grow its share of the others, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic
Sparse Reparameterization", ICML 2019, algorithm 1.
Deviations: written from the paper's description, without its code at hand. N is given as a share of the
live weights, and the defaults are ours. The total is conserved exactly: shares are rounded by Hamilton's
method, and what a full layer cannot take goes to the others. A weight dropped and grown at once starts
at zero like the rest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import Budget, check_target, kept_counts
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import apportion, keep_top, random_mask, random_scores
from sparing.param_groups import reset_state
from sparing.parametrizations import Masked, Sparse
from sparing.schedules import check_fraction, check_schedule, to_step
from sparing.sparsify import Method, Sparsifier


class AdaptiveMask(Masked):
    """Mask that carries the threshold H of the next update, of shape (1,), the same in all layers.

    `keep` is the number that lives now; it changes when weights move between layers.
    """

    cut: Tensor

    def __init__(self, mask: Tensor, keep: int, cut: float) -> None:
        super().__init__(mask, keep)
        self.register_buffer("cut", torch.full((1,), cut, dtype=torch.float32, device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


@dataclass(frozen=True)
class DSR(Method):
    """Keep a constant number of weights in all, and move the smallest to random places of any layer.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of all layers together; with "uniform" also of each at the start.
        budget: of the start: "uniform", "erk", a Budget, a budget file, or a published name.
        end: the last update: a step (int) or a fraction of `steps` (float).
        every: ΔT, optimizer steps between two updates.
        fraction: the share of live weights that an update should move, N of them, in (0, 1).
        threshold: H at the start, in units of the weight, above 0.
        tolerance: δ, how far off N leaves H as it is, a fraction in (0, 1).
        seed: of the first mask and of all growth; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> DSR(steps=1000, sparsity=0.9).threshold
        0.001
    """

    name: ClassVar[str] = "dsr"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = "uniform"
    end: int | float = 1.0
    every: int = 100
    fraction: float = 0.01
    threshold: float = 1e-3
    tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_target("DSR", self.sparsity, self.budget)
        check_schedule("DSR", self.steps, 0, self.end, self.every)
        for field in ("fraction", "tolerance"):
            check_fraction("DSR", field, getattr(self, field))
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(f"DSR: threshold must be a finite number above 0, got {value!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: AdaptiveMask(random_mask(layer.weight, counts[name], self.seed, index), counts[name], self.threshold)
            for index, (name, layer) in enumerate(layers.items())
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        step, end = sparsifier.step, to_step(self.end, self.steps)
        if not (step < end and step % self.every == 0):
            return
        # A frozen layer takes no part: what it gave away or got could not be trained.
        parts = [(layer, part) for layer, part in sparsifier.parts(AdaptiveMask) if layer.weight.requires_grad]
        stays = [part.mask & (layer.weight.abs() >= part.cut) for layer, part in parts]
        left = [int(stay.sum()) for stay in stays]
        total = sum(int(part.keep) for _, part in parts)
        removed, aim = total - sum(left), self.fraction * total
        factor = 2 if removed < (1 - self.tolerance) * aim else 0.5 if removed > (1 + self.tolerance) * aim else 1
        grown = apportion(removed, left, [stay.numel() - count for stay, count in zip(stays, left, strict=True)])
        for index, ((layer, part), stay, grow) in enumerate(zip(parts, stays, grown, strict=True)):
            scores = random_scores(layer.weight, self.seed, index, step)
            born = keep_top(scores.masked_fill(stay, -1), grow)
            layer.weight.masked_fill_(born, 0)
            reset_state(sparsifier.optimizers, layer.weight, born)
            part.mask.copy_(stay | born)
            part.keep.fill_(left[index] + grow)
            # From zero it could not double again.
            part.cut.mul_(factor).clamp_(min=torch.finfo(part.cut.dtype).tiny)
