"""Implement Top-KAST, a custom method: sparse forward and backward passes with a constant number of weights.

    A = the largest |W|, B = A and the next largest       S = W ⊙ A,   dW = dS ⊙ B
    loss + λ/2 · (Σ_A W² + Σ_{B∖A} W² / D)                 D is the density of A

Source: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020. Use it as
`sparsify_(model, TopKAST(sparsity=0.9), steps=N)`, or in a recipe as `method: {name: top_kast:TopKAST, sparsity: 0.9}`.
"""

from dataclasses import dataclass

import torch

from sparing import Ranking
from sparing.allocation import magnitude
from sparing.parametrizations import Masked, straight_through


class TwoMasks(Masked):
    def __init__(self, mask, backward):
        super().__init__(mask)
        self.register_state("backward", backward)

    def forward(self, weight):
        trained = torch.where(self.backward, weight, weight.detach())
        return straight_through(trained, torch.where(self.mask, weight.detach(), 0.0))


@dataclass(frozen=True, kw_only=True)
class TopKAST(Ranking):
    name = "top_kast"
    backward: float = 0.8  # sparsity of B, as a share of the target sparsity
    weight: float = 1e-4  # λ
    every: int = 1

    def parametrizations(self, layers, plan):
        masks, backward = (plan.allocation.masks(magnitude, share) for share in (1.0, self.backward))
        return {name: TwoMasks(masks[name], backward[name]) for name in layers}

    def penalty(self, sparsifier):
        density = 1 - self.sparsity
        terms = [(layer.weight, part.mask, part.backward) for layer, part in sparsifier.each(TwoMasks)]
        return sum(self.weight / 2 * (w**2 * torch.where(a, 1.0, b / density)).sum() for w, a, b in terms)

    def after_step(self, sparsifier, optimizers):
        if sparsifier.step % self.every == 0:
            backward = sparsifier.plan.allocation.masks(magnitude, self.backward)
            sparsifier.set_masks(sparsifier.plan.allocation.masks(magnitude))
            for layer, part in sparsifier.each(TwoMasks):
                part.backward.copy_(backward[layer.name])
