"""RigL: rigging the lottery. Sparse from start to end; weights are dropped by size and grown by gradient.

    every ΔT steps until T_end, a layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of live weights to move
        drop the f · live smallest |W| among the live
        grow as many of the largest |dL/dS| among the others, at zero
    S = W ⊙ M;  a dead weight is moved by nothing

Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3 and
algorithm 1, and its code (sparse_optimizers_base.py).
Deviations: ties are broken by torch's top-k, not by noise. As in the code, a step that rewires moves no
weight, and a weight dropped and grown at once keeps its value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, check_target, kept_counts
from sparing.layers import Layer
from sparing.masks import random_mask, rewire
from sparing.param_groups import reset_state, skip_step
from sparing.parametrizations import DenseGradientMask, Sparse
from sparing.schedules import check_fraction, check_schedule, cosine, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class RigL(Method):
    """Keep a constant number of weights, and move some of them to where the gradient is largest.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of all layers together with budget="erk", of each with "uniform".
        budget: "erk", "uniform", a Budget, a budget file, or a published name.
        end: the last update: a step (int) or a fraction of `steps` (float).
        every: ΔT, optimizer steps between two updates.
        fraction: α, the share of live weights moved by the first update, in (0, 1).
        seed: of the random first mask; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> RigL(steps=1000, sparsity=0.9)
        RigL(steps=1000, sparsity=0.9, budget='erk', end=0.75, every=100, fraction=0.3, seed=0)
    """

    name: ClassVar[str] = "rigl"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = "erk"
    end: int | float = 0.75
    every: int = 100
    fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_target("RigL", self.sparsity, self.budget)
        check_schedule("RigL", self.steps, 0, self.end, self.every)
        check_fraction("RigL", "fraction", self.fraction)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: DenseGradientMask(random_mask(layer.weight, counts[name], self.seed, index), counts[name])
            for index, (name, layer) in enumerate(layers.items())
        }

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        step, end = sparsifier.step, to_step(self.end, self.steps)
        rewires = 0 < step < end and step % self.every == 0
        for layer, part in sparsifier.parts(DenseGradientMask):
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if not rewires:
                gradient.masked_fill_(~part.mask, 0)
                continue
            count = int(cosine(step, end, self.fraction) * int(part.keep))
            mask = rewire(part.mask, layer.weight.abs(), gradient.abs(), count)
            born = mask & ~part.mask
            layer.weight.masked_fill_(born, 0)
            reset_state(sparsifier.optimizers, layer.weight, born)
            part.mask.copy_(mask)
        if rewires:
            skip_step(sparsifier.optimizers)
