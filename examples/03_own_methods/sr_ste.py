"""Implement SR-STE, a custom method: 2:4 sparsity from scratch, with weight decay on pruned weights.

    M = the 2 largest |W| of every 4 inputs, recomputed after every step
    S = W ⊙ M,   dW = dS + λ (1 − M) ⊙ W                   the gradient of loss + λ/2 · Σ ((1 − M) ⊙ W)²

Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
"""

from dataclasses import dataclass

from sparing import NM, Ranking
from sparing.allocation import magnitude
from sparing.parametrizations import DenseGradientMask
from sparing.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class SRSTE(Ranking):
    name = "sr_ste"
    pattern: Pattern = NM(2, 4)
    weight: float = 2e-4  # λ

    def parametrizations(self, layers, plan):
        return {name: DenseGradientMask(mask) for name, mask in plan.allocation.masks(magnitude).items()}

    def penalty(self, sparsifier):
        pruned = [layer.weight.masked_fill(part.mask, 0) for layer, part in sparsifier.each(DenseGradientMask)]
        return self.weight / 2 * sum((weight**2).sum() for weight in pruned)

    def after_step(self, sparsifier, optimizers):
        sparsifier.set_masks(sparsifier.plan.allocation.masks(magnitude))
