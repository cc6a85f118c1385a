"""SET: sparse evolutionary training. Sparse from start to end; weights are pruned by size and regrown at random.

    after every ΔT steps until T_end, per layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of active weights to move
        prune the f · active smallest |W| of the active weights
        regrow as many of the others, drawn uniformly, at zero
    S = W ⊙ M,   dW = dS ⊙ M

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018; in the form of the code of RigL
(sparse_optimizers_base.SparseSETOptimizerBase).
Deviations: Mocanu et al. prune the smallest positive and the largest negative weights, once an epoch, and a constant
share of them. Ties are broken by position, not by noise. As in the code of RigL, the masks are updated after the
optimizer has taken its step, and a weight pruned and regrown at once keeps its value.
"""

from dataclasses import dataclass

import torch

from sparing.budget import random_score
from sparing.growing import Growing, replace_mask
from sparing.masks import prune_and_regrow
from sparing.method import Layers, Optimizers, Parametrizations, Plan
from sparing.parametrizations import Mask
from sparing.schedules import check_number, cosine
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class SET(Growing):
    """Keep a constant number of weights, and move the smallest of them to random places.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    `end`, `every` and `seed` are those of `sparing.growing.Growing`.

    Args:
        fraction: α, the share of active weights moved by the first update, in (0, 1).

    Examples:
        >>> SET(sparsity=0.9).fraction
        0.3
    """

    name = "set"

    fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "fraction", "(0, 1)")

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: Mask(mask) for name, mask in self.first_masks(layers, plan).items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        plan, step = sparsifier.plan, sparsifier.step
        if not self.due(plan, step):
            return
        random = random_score(sparsifier.layers, self.seed, step)
        for layer, part in sparsifier.each(Mask):
            weight, units = layer.weight, plan.allocation.units[layer.name]
            if not weight.requires_grad:
                continue
            active = units.active(part.mask)
            count = int(cosine(step, plan.updates.end, self.fraction) * int(active.sum()))
            chosen = prune_and_regrow(active, units.norm(weight), random(layer, units), count)
            replace_mask(layer, part, units.expand(chosen), optimizers)
