"""GMP: gradual magnitude pruning.

    s_t = s_f · (1 − (1 − (t − t0) / (t1 − t0))³)          the cubic ramp from 0 to s_f
    M   = the (1 − s_t) share of largest |W|, a layer        every so many steps
    S   = W ⊙ M,   dW = dS ⊙ M

Source: Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", 2017.
Deviations: the ramp of the STR repository divides by t1 − t0 + 1 and ends below s_f; here it ends on
it. Dead weights keep their value and decay, as in the TensorFlow code, so one may come back while the
ramp runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, check_target, kept_counts
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class GMP(Method):
    """Prune the smallest weights of each layer, more and more of them, while training.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, of each layer; or of all together with budget="erk".
        budget: "uniform", "erk", a Budget, a budget file, or a published name.
        begin: where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two updates of the masks.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> GMP(steps=1000, sparsity=0.9)
        GMP(steps=1000, sparsity=0.9, budget=None, begin=0.2, end=0.8, every=100)
    """

    name: ClassVar[str] = "gmp"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = None
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 100

    def __post_init__(self) -> None:
        check_target("GMP", self.sparsity, self.budget)
        check_schedule("GMP", self.steps, self.begin, self.end, self.every)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: Mask(torch.ones_like(layer.weight, dtype=torch.bool), counts[name]) for name, layer in layers.items()
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, end, self.every):
            return
        for layer, part in sparsifier.parts(Mask):
            weights = layer.weight.numel()
            sparsity = cubic(sparsifier.step, begin, end, 1 - int(part.keep) / weights)
            part.mask.copy_(keep_top(layer.weight.abs(), count_kept(weights, sparsity)))
