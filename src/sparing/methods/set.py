"""SET: sparse evolutionary training. Sparse from start to end; weights are pruned by size and regrown at random.

    after every ΔT steps until T_end, per layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of active weights to move
        prune the f · active smallest |W| of the active weights
        regrow as many of the others, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
by network science", Nature Communications 2018; in the form of the code of RigL
(sparse_optimizers_base.SparseSETOptimizerBase).
Deviations: Mocanu et al. prune the smallest positive and the largest negative weights, once an epoch, and a
constant share of them. Ties are broken by position, not by noise. As in the code of RigL, the masks are updated
after the optimizer has taken its step, and a weight pruned and regrown at once keeps its value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, random_score
from sparing.layers import Layer
from sparing.masks import prune_and_regrow
from sparing.method import Optimizers, Plan, Ranking
from sparing.optimizers import reset_state
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_number, cosine
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class SET(Ranking):
    """Keep a constant number of weights, and move the smallest of them to random places.

    Args:
        sparsity, budget, pattern: the target, see `sparing.method.Ranking`.
        end: the last update comes before it: a step (int) or a fraction of the run (float).
        every: ΔT, optimizer steps between two updates; shortened if `end` comes earlier.
        fraction: α, the share of active weights moved by the first update, in (0, 1).
        seed: of the first mask and of all growth; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range.

    Examples:
        >>> SET(sparsity=0.9).fraction
        0.3
    """

    name: ClassVar[str] = "set"
    takes_global: ClassVar[bool] = False
    takes_nm: ClassVar[bool] = False

    budget: Budget | str = "erk"
    end: int | float = 0.75
    every: int = 100
    fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "fraction", "(0, 1)")

    def parametrizations(self, layers: Mapping[str, Layer], plan: Plan) -> dict[str, Sparse]:
        return {name: Mask(mask) for name, mask in plan.allocation.masks(random_score(layers, self.seed)).items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        plan, step = sparsifier.plan, sparsifier.step
        if not plan.updates.due(step) or step >= plan.updates.end:
            return
        random = random_score(sparsifier.layers, self.seed, step)
        for layer, part in sparsifier.each(Mask):
            weight, units = layer.weight, plan.allocation.units[layer.name]
            if not weight.requires_grad:
                continue
            active = units.active(part.mask)
            count = int(cosine(step, plan.updates.end, self.fraction) * int(active.sum()))
            mask = units.expand(prune_and_regrow(active, units.norm(weight), random(layer, units), count))
            regrown = mask & ~part.mask
            weight.masked_fill_(regrown, 0)
            reset_state(optimizers, weight, regrown)
            part.mask.copy_(mask)
