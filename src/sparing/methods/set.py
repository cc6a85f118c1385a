"""SET: sparse evolutionary training. Sparse from start to end; weights are pruned by size and regrown at random.

    after every ΔT steps until T_end, per layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of active weights to move
        prune the f · active smallest |W| of the active weights
        regrow as many of the others, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018; in the form of the code of RigL
(sparse_optimizers_base.SparseSETOptimizerBase).
Deviations: Mocanu et al. prune a constant share once an epoch: the smallest positive and the largest negative weights.
Ties are broken by position, not by noise. As in the code of RigL, the masks are updated after the optimizer has taken
its step, and a weight pruned and regrown at once keeps its value.
"""

from dataclasses import dataclass

import torch

from sparing.allocation import random_score
from sparing.growing import Growing, MaskUpdate
from sparing.method import Optimizers
from sparing.parametrizations import Mask
from sparing.schedules import cosine
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class SET(Growing):
    """Keep a constant number of weights, and move the smallest of them to random places.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`; `fraction`, the α of the formula, `end`,
    `every` and `seed` those of `sparing.growing.Growing`.

    Examples:
        >>> SET(sparsity=0.9).fraction
        0.3
    """

    name = "set"

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step = sparsifier.step
        if self.due(sparsifier, step):
            share = cosine(step, sparsifier.plan.updates.end, self.fraction)
            random = random_score(sparsifier.layers, self.seed, step)
            for each in MaskUpdate.each(sparsifier, Mask):
                each.prune_and_regrow(share, random(each.layer, each.units), optimizers)
