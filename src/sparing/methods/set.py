"""SET: sparse evolutionary training. Sparse from start to end; weights are dropped by size and grown at random.

    every ΔT steps until T_end, a layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of live weights to move
        drop the f · live smallest |W| among the live
        grow as many of the others, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018; in the form of the code of RigL
(sparse_optimizers_base.SparseSETOptimizerBase).
Deviations: Mocanu et al. drop the smallest positive and the largest negative weights, once an epoch,
and a constant share of them. Ties are broken by torch's top-k, not by noise. As in the code of RigL, a
step that rewires moves no weight, and a weight dropped and grown at once keeps its value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, check_target, kept_counts
from sparing.layers import Layer
from sparing.masks import random_mask, random_scores, rewire
from sparing.param_groups import reset_state, skip_step
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_fraction, check_schedule, cosine, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class SET(Method):
    """Keep a constant number of weights, and move the smallest of them to random places.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of all layers together with budget="erk", of each with "uniform".
        budget: "erk", "uniform", a Budget, a budget file, or a published name.
        end: the last update: a step (int) or a fraction of `steps` (float).
        every: ΔT, optimizer steps between two updates.
        fraction: α, the share of live weights moved by the first update, in (0, 1).
        seed: of the first mask and of all growth; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> SET(steps=1000, sparsity=0.9)
        SET(steps=1000, sparsity=0.9, budget='erk', end=0.75, every=100, fraction=0.3, seed=0)
    """

    name: ClassVar[str] = "set"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = "erk"
    end: int | float = 0.75
    every: int = 100
    fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_target("SET", self.sparsity, self.budget)
        check_schedule("SET", self.steps, 0, self.end, self.every)
        check_fraction("SET", "fraction", self.fraction)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: Mask(random_mask(layer.weight, counts[name], self.seed, index), counts[name])
            for index, (name, layer) in enumerate(layers.items())
        }

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        step, end = sparsifier.step, to_step(self.end, self.steps)
        if not (0 < step < end and step % self.every == 0):
            return
        for index, (layer, part) in enumerate(sparsifier.parts(Mask)):
            if layer.weight.grad is None:
                continue
            count = int(cosine(step, end, self.fraction) * int(part.keep))
            mask = rewire(part.mask, layer.weight.abs(), random_scores(layer.weight, self.seed, index, step), count)
            born = mask & ~part.mask
            layer.weight.masked_fill_(born, 0)
            reset_state(sparsifier.optimizers, layer.weight, born)
            part.mask.copy_(mask)
        skip_step(sparsifier.optimizers)
