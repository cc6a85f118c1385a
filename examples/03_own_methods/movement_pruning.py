"""Implement movement pruning, a custom method that ranks weights by a trained score.

    M = the (1 − s_t) share of largest scores v, on the cubic ramp
    S = W ⊙ M,   dW = dS ⊙ M,   dv = dS ⊙ W                straight through

v grows where W moves away from zero. v must not get weight decay, so `decays` does not name it.

Source: Sanh, Wolf & Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sparing import Ranking
from sparing.parametrizations import Masked, straight_through


class ScoredMask(Masked):
    def __init__(self, weight):
        super().__init__(torch.ones_like(weight, dtype=torch.bool))
        self.scores = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight):
        return weight * straight_through(self.scores, self.mask.float()).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class MovementPruning(Ranking):
    name = "movement_pruning"
    budget: str = "global"
    begin: float = 0.1
    end: float = 0.7
    every: int = 1

    def parametrizations(self, layers, plan):
        return {name: ScoredMask(layer.weight) for name, layer in layers.items()}

    def after_step(self, sparsifier, optimizers):
        plan = sparsifier.plan
        if plan.updates.due(sparsifier.step):
            score = lambda layer, units: units.mean(layer.parametrization.scores)  # noqa: E731
            sparsifier.set_masks(plan.allocation.masks(score, sparsifier.progress))
