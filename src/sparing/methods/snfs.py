"""SNFS: sparse networks from scratch, by sparse momentum. Weights move to the layers that learn most.

    m ← β m + (1 − β) dL/dS                             every step, of all weights, dead ones too
    every ΔT steps until T:
        p = p_T + (p_0 − p_T)/2 · (1 + cos(π t / T))    from p_0 = 0.5 to p_T = 0.005
        a layer: drop the p · live smallest |W| among the live
        share out all that was dropped in proportion to the mean |m| of each layer's live weights
        a layer: grow its share of the largest |m| among the others, at zero
    S = W ⊙ M;  a dead weight is moved by nothing

Source: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
Performance", 2019, and its code (sparse_learning/core.py, funcs.py).
Deviations: the code reads the optimizer's own momentum; here m belongs to the layer, so that it is the
same for every optimizer, and the optimizer sees masked gradients and forgets what stood where a weight
is grown. A layer may become dense; the code stops at 99 % of what is free. The total is conserved
exactly. Rounding is down, and once every ΔT steps rather than an epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import Budget, check_target, kept_counts
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import apportion, keep_top, random_mask
from sparing.param_groups import reset_state
from sparing.parametrizations import Masked, MaskStraightThrough, Sparse
from sparing.schedules import check_fraction, check_schedule, cosine, to_step
from sparing.sparsify import Method, Sparsifier


class MomentumMask(Masked):
    """DenseGradientMask that remembers a moving average of the dense gradient, in float32.

    `keep` is the number that lives now; it changes when weights move between layers.
    """

    momentum: Tensor

    def __init__(self, mask: Tensor, keep: int) -> None:
        super().__init__(mask, keep)
        self.register_buffer("momentum", torch.zeros_like(mask, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = MaskStraightThrough.apply(weight, self.mask)
        return result


@dataclass(frozen=True)
class SNFS(Method):
    """Drop the smallest weights of each layer, and grow as many in all where the momentum is largest.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of all layers together; with "uniform" also of each at the start.
        budget: of the start: "uniform", "erk", a Budget, a budget file, or a published name.
        end: the last update: a step (int) or a fraction of `steps` (float).
        every: ΔT, optimizer steps between two updates.
        fraction: p_0, the share of live weights dropped at the start, in (0, 1).
        final_fraction: p_T, the share at the end, in (0, 1) and at most `fraction`.
        momentum: β, the share of the moving average that a step leaves, in (0, 1).
        seed: of the random first mask; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> SNFS(steps=1000, sparsity=0.9).final_fraction
        0.005
    """

    name: ClassVar[str] = "snfs"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = "uniform"
    end: int | float = 1.0
    every: int = 100
    fraction: float = 0.5
    final_fraction: float = 0.005
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_target("SNFS", self.sparsity, self.budget)
        check_schedule("SNFS", self.steps, 0, self.end, self.every)
        for field in ("fraction", "final_fraction", "momentum"):
            check_fraction("SNFS", field, getattr(self, field))
        if self.final_fraction > self.fraction:
            raise InputError(f"SNFS: final_fraction={self.final_fraction} is larger than fraction={self.fraction}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: MomentumMask(random_mask(layer.weight, counts[name], self.seed, index), counts[name])
            for index, (name, layer) in enumerate(layers.items())
        }

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        for layer, part in sparsifier.parts(MomentumMask):
            gradient = layer.weight.grad
            if gradient is not None:
                part.momentum.lerp_(gradient.to(part.momentum.dtype), 1 - self.momentum)
                gradient.masked_fill_(~part.mask, 0)

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        step, end = sparsifier.step, to_step(self.end, self.steps)
        if not (step < end and step % self.every == 0):
            return
        rate = self.final_fraction + cosine(step, end, self.fraction - self.final_fraction)
        # A frozen layer takes no part: what it gave away or got could not be trained.
        parts = [(layer, part) for layer, part in sparsifier.parts(MomentumMask) if layer.weight.requires_grad]
        live = [int(part.keep) for _, part in parts]
        sizes = [layer.weight.numel() for layer, _ in parts]
        shares = [_mean_momentum(part) for _, part in parts]
        dropped = []
        for count, size, share in zip(live, sizes, shares, strict=True):
            # As in the code: a layer nearly dense that learns more than most is to stay so.
            spared = 1 - count / size < 0.2 and share * len(parts) > sum(shares)
            dropped.append(int(min(rate, 1 - count / size if spared else rate) * count))
        kept = [count - drop for count, drop in zip(live, dropped, strict=True)]
        rooms = [size - count for size, count in zip(sizes, kept, strict=True)]
        grown = apportion(sum(dropped), shares, rooms)
        for (layer, part), keep, grow in zip(parts, kept, grown, strict=True):
            # −1 is below every size and every momentum.
            stays = keep_top(layer.weight.abs().masked_fill(~part.mask, -1), keep)
            mask = stays | keep_top(part.momentum.abs().masked_fill(stays, -1), grow)
            born = mask & ~part.mask
            layer.weight.masked_fill_(born, 0)
            reset_state(sparsifier.optimizers, layer.weight, born)
            part.mask.copy_(mask)
            part.keep.fill_(keep + grow)


def _mean_momentum(part: MomentumMask) -> float:
    """The mean |m| of the live weights; 0 where none lives."""
    return float((part.momentum.abs() * part.mask).sum() / part.mask.sum().clamp(min=1))
